// Sizes of the sm_80 kernel and the choice between them; host and device.
#pragma once

#include "block_iter.cuh"

namespace svdit {

constexpr int kSm80Warps = 4;
constexpr int kSm80BlocksPerMultiprocessor = 2;  // what 255 registers a thread allow
constexpr int kSharedReservedPerBlock = 1024;    // by the system, on every GPU from sm_80 on
constexpr int kSm80ControlBytes = 640;           // the item and where its list of keys stands

// Q of one item, and one step's K and V.
SVDIT_HOST_DEVICE constexpr int sm80_shared_bytes(int head_dim, int key_rows) {
  return 2 * head_dim * (kBlockRows + 2 * key_rows);
}

SVDIT_HOST_DEVICE constexpr bool sm80_fits(int head_dim, int key_rows, int shared_per_multiprocessor) {
  const int block = sm80_shared_bytes(head_dim, key_rows) + kSm80ControlBytes + kSharedReservedPerBlock;
  return kSm80BlocksPerMultiprocessor * block <= shared_per_multiprocessor;
}

// Keys of one step: what registers hold without spilling (scores and output of 32 rows a warp), fewer where two thread
// blocks would not fit the shared memory of a multiprocessor.
SVDIT_HOST_DEVICE constexpr int sm80_key_rows(int head_dim, int shared_per_multiprocessor) {
  return sm80_fits(head_dim, 64, shared_per_multiprocessor) ? 64 : 32;
}

// Shared memory of a multiprocessor by compute capability, times 10 (CUDA programming guide, "technical specifications").
SVDIT_HOST_DEVICE constexpr int shared_per_multiprocessor(int architecture) {
  if (architecture == 80 || architecture == 87) return 164 * 1024;
  return architecture >= 90 && architecture < 120 ? 228 * 1024 : 100 * 1024;
}

static_assert(sm80_key_rows(128, 164 * 1024) == 64, "A100");
static_assert(sm80_key_rows(128, 100 * 1024) == 32, "RTX 30, 40, 50 and L40S");
static_assert(sm80_key_rows(64, 100 * 1024) == 64 && sm80_fits(128, 32, 100 * 1024), "99 KB a block");

}  // namespace svdit

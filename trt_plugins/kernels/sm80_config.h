// Sizes of the sm_80 kernel and the choice between them; host and device.
#pragma once

#include "block_iter.cuh"

namespace svdit {

constexpr int kSm80Warps = 4;
constexpr int kSm80BlocksPerMultiprocessor = 2;  // what 255 registers a thread allow
constexpr int kSharedReservedPerBlock = 1024;    // by the system, on every GPU from sm_80 on
constexpr int kSm80ControlBytes = 640;           // the item and the runs of its keys

// Q of one item, and one step's K and V.
SVDIT_HOST_DEVICE constexpr int sm80_shared_bytes(int head_dim, int key_rows) {
  return 2 * head_dim * (kBlockRows + 2 * key_rows);
}

SVDIT_HOST_DEVICE constexpr bool sm80_fits(int head_dim, int key_rows, int shared_per_multiprocessor) {
  const int block = sm80_shared_bytes(head_dim, key_rows) + kSm80ControlBytes + kSharedReservedPerBlock;
  return kSm80BlocksPerMultiprocessor * block <= shared_per_multiprocessor;
}

// Shared memory of a multiprocessor by compute capability, times 10 (CUDA programming guide, "technical specifications").
SVDIT_HOST_DEVICE constexpr int shared_per_multiprocessor(int architecture) {
  if (architecture == 80 || architecture == 87) return 164 * 1024;
  return architecture >= 90 && architecture < 120 ? 228 * 1024 : 100 * 1024;
}

// Keys of one step at most: scores and output of 32 rows a warp without spilling, for which sm_100 and newer need more
// registers than the others.
SVDIT_HOST_DEVICE constexpr int sm80_most_key_rows(int head_dim, int architecture) {
  return head_dim == 64 && architecture < 100 ? 128 : 64;
}

// Keys of one step: half of it where two thread blocks would not fit the shared memory of a multiprocessor.
SVDIT_HOST_DEVICE constexpr int sm80_key_rows(int head_dim, int architecture) {
  const int most = sm80_most_key_rows(head_dim, architecture);
  return sm80_fits(head_dim, most, shared_per_multiprocessor(architecture)) ? most : most / 2;
}

}  // namespace svdit

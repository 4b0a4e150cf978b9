// The shared memory of the sm_90 kernel and who waits for whom in it.
//
// Key blocks form one endless stream, across items: block g of a thread block uses stage g % kStages of the
// K ring and of the V ring, and (g / kStages) % 2 is the parity of both its barriers. Q has two slots that
// alternate by item. A block that opens an item carries that item's Q on its own K barrier.
#pragma once

#include <cstdint>

#include "block_iter.cuh"
#include "epilogue.cuh"
#include "tile_scheduler.cuh"

namespace svdit {

template <typename Element_, int kHeadDim_>
struct Sm90Config {
  static_assert(kHeadDim_ == 64 || kHeadDim_ == 128, "the sm_90 kernel is built for head sizes 64 and 128");
  static_assert(sizeof(Element_) == 2, "the sm_90 kernel takes 16-bit types");
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kStages = kHeadDim == 128 ? 2 : 4;
  static constexpr int kQuerySlots = 2;
  static constexpr int kMathWarpgroups = 2;
  static constexpr int kMathThreads = kMathWarpgroups * 128;
  static constexpr int kThreads = kMathThreads + 128;
  static constexpr int kProducerRegisters = 56;
  static constexpr int kMathRegisters = 224;
  static_assert(kProducerRegisters + kMathWarpgroups * kMathRegisters <= 3 * 168, "register file exceeded");

  static constexpr uint32_t kHalfBytes = kBlockRows * 128;  // 128 rows x 64 columns
  static constexpr uint32_t kBlockBytes = kHalfBytes * (kHeadDim / 64);
  static constexpr uint32_t kQuery = 0;
  static constexpr uint32_t kKeys = kQuery + kQuerySlots * kBlockBytes;
  static constexpr uint32_t kValues = kKeys + kStages * kBlockBytes;
  static constexpr uint32_t kOutput = kValues + kStages * kBlockBytes;
  static constexpr uint32_t kControl = kOutput + kBlockBytes;
};

// What a consumer must know of the block in a stage: its rows, and whether the item or the work ends here.
constexpr int kBlockRowsMask = 0xff;
constexpr int kBlockIsLast = 1 << 8;
constexpr int kBlockIsStop = 1 << 9;

template <int kStages, int kQuerySlots>
struct ControlOf {
  uint64_t keys_full[kStages];
  uint64_t keys_empty[kStages];
  uint64_t values_full[kStages];
  uint64_t values_empty[kStages];
  uint64_t query_empty[kQuerySlots];
  uint64_t item_full;
  uint64_t item_empty;
  int block[kStages];
  QueryRows query[kQuerySlots];
  WorkItem item;
  Rows chunk[kListChunk];
};

template <typename Config>
using Control = ControlOf<Config::kStages, Config::kQuerySlots>;

constexpr uint32_t kMaxSharedBytes = 232448;

template <typename Config>
constexpr uint32_t shared_bytes() {
  constexpr uint32_t bytes = Config::kControl + sizeof(Control<Config>);
  static_assert(bytes <= kMaxSharedBytes, "shared memory exceeded");
  return bytes;
}

enum NamedBarrier : int { kTurn = 1, kStore = 3 };  // + warpgroup

}  // namespace svdit

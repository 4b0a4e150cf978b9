// The shared memory of the sm_90 kernel and who waits for whom in it.
//
// Key blocks form one endless stream, across items: block g of a thread block uses stage g % kStages of the
// K ring and of the V ring, and (g / kStages) % 2 is the parity of both its barriers. Q has two slots that
// alternate by item. A block that opens an item carries that item's Q on its own K barrier.
//
// An item is one list of keys and, for each math warpgroup, a slice of up to 64 query rows.
#pragma once

#include <cstdint>

#include "block_iter.cuh"
#include "epilogue.cuh"
#include "sm90_slices.cuh"

namespace svdit {

template <typename Element_, int kHeadDim_>
struct Sm90Config {
  static_assert(kHeadDim_ == 64 || kHeadDim_ == 128, "the sm_90 kernel is built for head sizes 64 and 128");
  static_assert(sizeof(Element_) == 2, "the sm_90 kernel takes 16-bit types");
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kStages = 2;
  static constexpr int kQuerySlots = 2;
  static constexpr int kSlices = kHeadDim == 128 ? 2 : 3;  // math warpgroups
  static constexpr int kMathThreads = kSlices * 128;
  static constexpr int kThreads = kMathThreads + 128;
  static constexpr int kProducerRegisters = kSlices == 2 ? 56 : 32;
  static constexpr int kMathRegisters = kSlices == 2 ? 224 : 160;
  static constexpr int kLaunchRegisters = 65536 / kThreads / 8 * 8;
  static_assert(kProducerRegisters * (kThreads - kMathThreads) + kMathRegisters * kMathThreads <=
                    kLaunchRegisters * kThreads, "register file exceeded");

  static constexpr uint32_t kHalfBytes = kBlockRows * 128;  // 128 rows x 64 columns
  static constexpr uint32_t kBlockBytes = kHalfBytes * (kHeadDim / 64);
  static constexpr uint32_t kSliceHalfBytes = kSliceRows * 128;
  static constexpr uint32_t kSliceBytes = kSliceHalfBytes * (kHeadDim / 64);
  static constexpr uint32_t kQueryBytes = kSlices * kSliceBytes;
  static constexpr uint32_t kQuery = 0;
  static constexpr uint32_t kKeys = kQuery + kQuerySlots * kQueryBytes;
  static constexpr uint32_t kValues = kKeys + kStages * kBlockBytes;
  static constexpr uint32_t kOutput = kValues + kStages * kBlockBytes;
  static constexpr uint32_t kControl = kOutput + kQueryBytes;
};

// What a consumer must know of the block in a stage: its rows, and whether the item or the work ends here.
constexpr int kBlockRowsMask = 0xff;
constexpr int kBlockIsLast = 1 << 8;
constexpr int kBlockIsStop = 1 << 9;
constexpr int kBlockIsIdle = 1 << 10;  // added by a warpgroup that has no rows of the item

template <int kStages, int kQuerySlots, int kSlices>
struct ControlOf {
  uint64_t keys_full[kStages];
  uint64_t keys_empty[kStages];
  uint64_t values_full[kStages];
  uint64_t values_empty[kStages];
  uint64_t query_empty[kQuerySlots];
  uint64_t item_full;
  uint64_t item_empty;
  int block[kStages];
  QueryRows query[kQuerySlots][kSlices];
  WorkItem item;
  QueryRows slices[kSlices];
  Rows chunk[kListChunk];
  WorkItem current;  // the producer's copy of item, and the block before the one in hand
  Rows previous;
};

template <typename Config>
using Control = ControlOf<Config::kStages, Config::kQuerySlots, Config::kSlices>;

constexpr uint32_t kMaxSharedBytes = 232448;

template <typename Config>
constexpr uint32_t shared_bytes() {
  constexpr uint32_t bytes = Config::kControl + sizeof(Control<Config>);
  static_assert(bytes <= kMaxSharedBytes, "shared memory exceeded");
  return bytes;
}

enum NamedBarrier : int { kTurn = 1, kStore = 4 };  // + warpgroup

}  // namespace svdit

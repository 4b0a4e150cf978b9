// The two warps that feed the math warpgroups: one draws and decodes work items, one walks their lists and
// starts the copies.
#pragma once

#include "sm90_pipeline.cuh"

namespace svdit {

struct Sm90Params {
  CUtensorMap query_map;   // {64 columns, tokens, heads * D / 64, batch}
  CUtensorMap key_map;     // the same of K
  CUtensorMap value_map;   // ragged: rows past the end of a short block read as zero
  CUtensorMap output_map;  // ragged: rows past the end of a short item are not written
  WorkTables tables;
  void *output;
  int *counter;
  float scale_log2;          // scale * log2(e)
  float inverse_scale_log2;  // and its inverse
};

template <typename Config>
__device__ __forceinline__ void init_barriers(Control<Config> &control) {
  constexpr int kMathWarps = Config::kMathThreads / 32;
  for (int i = 0; i < Config::kStages; ++i) {
    sm90::barrier_init(sm90::shared_address(&control.keys_full[i]), 1);
    sm90::barrier_init(sm90::shared_address(&control.values_full[i]), 1);
    sm90::barrier_init(sm90::shared_address(&control.keys_empty[i]), kMathWarps);
    sm90::barrier_init(sm90::shared_address(&control.values_empty[i]), kMathWarps);
  }
  for (int i = 0; i < Config::kQuerySlots; ++i) sm90::barrier_init(sm90::shared_address(&control.query_empty[i]), kMathWarps);
  sm90::barrier_init(sm90::shared_address(&control.item_full), kLanes);
  sm90::barrier_init(sm90::shared_address(&control.item_empty), kLanes);
  sm90::barrier_init_fence();
}

// Scheduler warp: publishes items, each with the first kListChunk row ranges of its list.
template <typename Config>
__device__ __forceinline__ void schedule(const Sm90Params &params, Control<Config> &control) {
  const int lane = threadIdx.x % 32;
  Queue queue(params.tables, params.counter);
  uint32_t parity = 1;
  while (true) {
    sm90::barrier_wait(sm90::shared_address(&control.item_empty), parity);
    parity ^= 1;
    Rows rows{0, 0};
    QueryRows slice{0, 0, 0, 0};
    const WorkItem item = next_item<Config::kSlices>(queue, rows, slice);
    control.chunk[lane] = rows;
    if (lane < Config::kSlices) control.slices[lane] = slice;
    if (lane == 0) control.item = item;
    sm90::barrier_arrive(sm90::shared_address(&control.item_full));
    if (item.rows == 0) return;
  }
}

// Producer warp. All lanes follow the same path; lane 0 starts the copies. What it knows of an item lies in shared
// memory: beside three math warpgroups it has 32 registers.
template <typename Config>
class Sm90Producer {
  static constexpr int kStages = Config::kStages;

 public:
  __device__ __forceinline__ Sm90Producer(const Sm90Params &params, Control<Config> &control, uint32_t shared)
      : params_(params), control_(control), shared_(shared), lane_(threadIdx.x % 32) {}

  __device__ __forceinline__ void run() {
    uint32_t parity = 0;
    while (true) {
      sm90::barrier_wait(sm90::shared_address(&control_.query_empty[query_slot_]), query_parity_ ^ 1);
      sm90::barrier_wait(sm90::shared_address(&control_.item_full), parity);
      parity ^= 1;
      if (control_.item.rows == 0) break;
      feed();
    }
    stop();
  }

 private:
  // The scheduler may replace control_.item as soon as it is asked for the next; control_.current is this warp's own.
  __device__ __forceinline__ void feed() {
    if (lane_ == 0) {
      control_.current = control_.item;
      for (int i = 0; i < Config::kSlices; ++i) control_.query[query_slot_][i] = control_.slices[i];
    }
    Rows chunk = control_.chunk[lane_];
    __syncwarp();
    const int num_ranges = item().num_ranges;
    const int request_at = item().request_at;
    bool requested = false;
    opens_item_ = true;
    BlockStream stream;
    Rows following = load_ranges(kListChunk, num_ranges);
    for (int i = 0;; ++i) {
      if (i > 0 && i % kListChunk == 0) {
        chunk = following;
        following = load_ranges(i + kListChunk, num_ranges);
      }
      const bool at_end = i == num_ranges;
      Rows range{__shfl_sync(kAllLanes, chunk.begin, i % kListChunk), __shfl_sync(kAllLanes, chunk.end, i % kListChunk)};
      Rows block;
      while (stream.pop(range, at_end, block)) emit(block, at_end && stream.is_empty());
      if (!requested && (i >= request_at || at_end)) {
        sm90::barrier_arrive(sm90::shared_address(&control_.item_empty));
        requested = true;
      }
      if (at_end) break;
      stream.push(range);
    }
    if (opens_item_) {
      store_zero_rows();
    } else {
      load_values();
      query_parity_ ^= query_slot_;
      query_slot_ ^= 1;
    }
  }

  __device__ __forceinline__ const volatile WorkItem &item() const { return control_.current; }

  // The range of this lane's number in the chunk that starts at base.
  __device__ __forceinline__ Rows load_ranges(int base, int num_ranges) const {
    if (base + lane_ >= num_ranges) return Rows{0, 0};
    const int tile = __ldg(params_.tables.tile_index + item().list_begin + base + lane_);
    return tile_rows(params_.tables, tile, item().text_len);
  }

  __device__ __forceinline__ void store_zero_rows() {
    using T = typename Config::Element;
    for (int i = 0; i < Config::kSlices; ++i) {
      const volatile QueryRows &slice = control_.query[query_slot_][i];
      store_zeros<T, Config::kHeadDim>(static_cast<T *>(params_.output), params_.tables.tokens, params_.tables.heads,
                                       QueryRows{slice.first_row, slice.rows, slice.head, slice.batch});
    }
    __syncwarp();
  }

  // V of the block before, then K of this one: the order in which the consumers free their stages.
  __device__ __forceinline__ void emit(Rows block, bool last) {
    if (!opens_item_) load_values();
    const int stage = count_ % kStages;
    const uint32_t full = sm90::shared_address(&control_.keys_full[stage]);
    sm90::barrier_wait(sm90::shared_address(&control_.keys_empty[stage]), (count_ / kStages & 1) ^ 1);
#ifdef SVDIT_WHATIF_ONE_TILE
    block = Rows{0, block.end - block.begin};
#endif
    if (lane_ == 0) {
      control_.block[stage] = (block.end - block.begin) | (last ? kBlockIsLast : 0);
      sm90::barrier_arrive_expect(full, Config::kBlockBytes + (opens_item_ ? Config::kQueryBytes : 0));
    }
    __syncwarp();
    if (opens_item_ && lane_ < Config::kSlices) load_query(full);
    if (lane_ == 0) {
      sm90::load_box_4d(shared_ + Config::kKeys + stage * Config::kBlockBytes, &params_.key_map, full, sm90::Keep::kNormal, 0,
                        block.begin, item().head * (Config::kHeadDim / 64), item().batch);
    }
    __syncwarp();
    if (lane_ == 0) control_.previous = block;
    opens_item_ = false;
    ++count_;
  }

  // One slice a lane.
  __device__ __forceinline__ void load_query(uint32_t full) {
    const volatile QueryRows &slice = control_.query[query_slot_][lane_];
    sm90::load_box_4d(shared_ + Config::kQuery + query_slot_ * Config::kQueryBytes + lane_ * Config::kSliceBytes,
                      &params_.query_map, full, sm90::Keep::kShort, 0, slice.first_row,
                      slice.head * (Config::kHeadDim / 64), slice.batch);
  }

  // V of block count_ - 1.
  __device__ __forceinline__ void load_values() {
    const int index = count_ - 1;
    const int stage = index % kStages;
    sm90::barrier_wait(sm90::shared_address(&control_.values_empty[stage]), (index / kStages & 1) ^ 1);
    if (lane_ == 0) {
      const uint32_t full = sm90::shared_address(&control_.values_full[stage]);
      const volatile Rows &block = control_.previous;
      const int end = block.end;
      sm90::barrier_arrive_expect(full, Config::kBlockBytes);
      sm90::load_box_5d(shared_ + Config::kValues + stage * Config::kBlockBytes, &params_.value_map, full,
                        sm90::Keep::kNormal, 0, kRaggedRows - (end - block.begin), item().head * (Config::kHeadDim / 64),
                        item().batch, end);
    }
    __syncwarp();
  }

  __device__ __forceinline__ void stop() {
    const int stage = count_ % kStages;
    sm90::barrier_wait(sm90::shared_address(&control_.keys_empty[stage]), (count_ / kStages & 1) ^ 1);
    if (lane_ == 0) {
      control_.block[stage] = kBlockRows | kBlockIsStop;
      sm90::barrier_arrive(sm90::shared_address(&control_.keys_full[stage]));
    }
    ++count_;
  }

  const Sm90Params &params_;
  Control<Config> &control_;
  const uint32_t shared_;
  const int lane_;
  bool opens_item_ = false;  // no block of the item has been emitted yet
  uint32_t count_ = 0;       // blocks of the stream
  int query_slot_ = 0;
  uint32_t query_parity_ = 0;
};

}  // namespace svdit

// The two warps that feed the math warpgroups: one draws and decodes work items, one walks their lists and
// starts the copies.
#pragma once

#include "sm90_pipeline.cuh"

namespace svdit {

constexpr int kKeepPeriod = 16;

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
  int kept_blocks;           // of each kKeepPeriod blocks of a full head, how many stay in the L2 cache
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
  sm90::barrier_init(sm90::shared_address(&control.item_full), 1);
  sm90::barrier_init(sm90::shared_address(&control.item_empty), 1);
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
    const WorkItem item = queue.next(rows);
    control.chunk[lane] = rows;
    if (lane == 0) control.item = item;
    __syncwarp();
    if (lane == 0) sm90::barrier_arrive(sm90::shared_address(&control.item_full));
    if (item.rows == 0) return;
  }
}

// Producer warp. All lanes follow the same path; lane 0 starts the copies.
template <typename Config>
class Sm90Producer {
  static constexpr int kStages = Config::kStages;

 public:
  __device__ __forceinline__ Sm90Producer(const Sm90Params &params, Control<Config> &control, uint32_t shared)
      : params_(params), control_(control), shared_(shared), lane_(threadIdx.x % 32) {}

  __device__ __forceinline__ void run() {
    uint32_t parity = 0;
    while (true) {
      sm90::barrier_wait(sm90::shared_address(&control_.item_full), parity);
      parity ^= 1;
      item_ = control_.item;
      const Rows chunk = control_.chunk[lane_];
      __syncwarp();
      if (item_.rows == 0) break;
      feed(chunk);
    }
    stop();
  }

 private:
  __device__ __forceinline__ void feed(Rows chunk) {
    BlockStream stream;
    requested_ = false;
    num_blocks_ = 0;
    const auto emit = [this](int row, int rows, bool last) { this->emit(row, rows, last); };
    for (int base = 0; base < item_.num_ranges; base += kListChunk) {
      const int ranges = min(kListChunk, item_.num_ranges - base);
      Rows following{0, 0};
      if (base + kListChunk + lane_ < item_.num_ranges) {
        const int *index = params_.tables.tile_index + item_.list_begin + base + kListChunk;
        following = tile_rows(params_.tables, __ldg(index + lane_), item_.text_len);
      }
      for (int i = 0; i < ranges; ++i) {
        if (base + i >= item_.request_at) request();
        stream.push(Rows{__shfl_sync(kAllLanes, chunk.begin, i), __shfl_sync(kAllLanes, chunk.end, i)}, emit);
      }
      chunk = following;
    }
    const bool any = stream.finish(emit);
    request();
    if (any) {
      load_values();
      query_parity_ ^= query_slot_;
      query_slot_ ^= 1;
    } else {
      using T = typename Config::Element;
      store_zeros<T, Config::kHeadDim>(static_cast<T *>(params_.output), params_.tables.tokens, params_.tables.heads,
                                       QueryRows{item_.first_row, item_.rows, item_.head, item_.batch});
    }
  }

  __device__ __forceinline__ void request() {
    if (!requested_ && lane_ == 0) sm90::barrier_arrive(sm90::shared_address(&control_.item_empty));
    requested_ = true;
  }

  // K of this block, then V of the one before: the order in which the consumers need them.
  __device__ __forceinline__ void emit(int row, int rows, bool last) {
    const int stage = count_ % kStages;
    const uint32_t parity = count_ / kStages & 1;
    const bool opens_item = num_blocks_ == 0;
    if (opens_item) sm90::barrier_wait(sm90::shared_address(&control_.query_empty[query_slot_]), query_parity_ ^ 1);
    sm90::barrier_wait(sm90::shared_address(&control_.keys_empty[stage]), parity ^ 1);
#ifdef SVDIT_WHATIF_ONE_TILE
    row = 0;
#endif
    if (lane_ == 0) {
      const uint32_t full = sm90::shared_address(&control_.keys_full[stage]);
      const int column = item_.head * (Config::kHeadDim / 64);
      control_.block[stage] = rows | (last ? kBlockIsLast : 0);
      if (opens_item) {
        control_.query[query_slot_] = QueryRows{item_.first_row, item_.rows, item_.head, item_.batch};
        sm90::barrier_arrive_expect(full, 2 * Config::kBlockBytes);
        sm90::load_box_4d(shared_ + Config::kQuery + query_slot_ * Config::kBlockBytes, &params_.query_map, full, sm90::Keep::kShort, 0,
                          item_.first_row, column, item_.batch);
      } else {
        sm90::barrier_arrive_expect(full, Config::kBlockBytes);
      }
      sm90::load_box_4d(shared_ + Config::kKeys + stage * Config::kBlockBytes, &params_.key_map, full, keep(row), 0, row, column,
                        item_.batch);
    }
    __syncwarp();
    if (!opens_item) load_values();
    previous_row_ = row;
    previous_rows_ = rows;
    ++num_blocks_;
    ++count_;
  }

  // All thread blocks sweep K and V of a full head from end to end, and drift apart. Where the two exceed the
  // L2 cache, least-recently-used replacement would then lose every block before its next use; so a fixed share
  // of the blocks is kept and the others pass through.
  __device__ __forceinline__ sm90::Keep keep(int row) const {
    if (!item_.is_full) return sm90::Keep::kNormal;
    return row / kBlockRows % kKeepPeriod < params_.kept_blocks ? sm90::Keep::kLong : sm90::Keep::kShort;
  }

  // V of block count_ - 1.
  __device__ __forceinline__ void load_values() {
    const int index = count_ - 1;
    const int stage = index % kStages;
    const uint32_t parity = index / kStages & 1;
    sm90::barrier_wait(sm90::shared_address(&control_.values_empty[stage]), parity ^ 1);
    if (lane_ == 0) {
      const uint32_t full = sm90::shared_address(&control_.values_full[stage]);
      sm90::barrier_arrive_expect(full, Config::kBlockBytes);
      sm90::load_box_5d(shared_ + Config::kValues + stage * Config::kBlockBytes, &params_.value_map, full, keep(previous_row_), 0,
                        kRaggedRows - previous_rows_, item_.head * (Config::kHeadDim / 64), item_.batch,
                        previous_row_ + previous_rows_);
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
  WorkItem item_;
  bool requested_ = false;
  int num_blocks_ = 0;         // of this item
  uint32_t count_ = 0;         // of the stream
  int previous_row_ = 0;
  int previous_rows_ = 0;
  int query_slot_ = 0;
  uint32_t query_parity_ = 0;
};

}  // namespace svdit

// Which query rows a thread block works on next: one warp draws items from a queue and decodes them.
#pragma once

#include "block_iter.cuh"
#include "sm90_tma.cuh"

namespace svdit {

// Tables and sizes as the kernel sees them; all pointers are device memory.
struct WorkTables {
  const int *stage;
  const int *text_len;
  const int *head_pattern;
  const int *tile_offsets;
  const int *row_offsets;
  const int *tile_index;
  const int *work_order;
  int batch;
  int tokens;
  int heads;
  int text_tokens;
  int num_tiles;
  int num_stages;
  int num_items;
  bool text_first;
};

// One work item: query rows of one head, and the row ranges that its keys come from.
struct WorkItem {
  int first_row;
  int rows;  // 0: no more work
  int head;
  int batch;
  int text_len;
  int list_begin;   // of the ranges beyond the first kListChunk, in tile_index
  int num_ranges;   // key tiles of the list, or kFullRanges
  int request_at;   // the range at which the next item is asked for
  bool is_full;
};

constexpr int kListChunk = 32;
constexpr int kRequestRanges = 5;

__device__ __forceinline__ Rows tile_rows(const WorkTables &tables, int tile, int text_len) {
  const Rows rows{__ldg(tables.tile_offsets + tile), __ldg(tables.tile_offsets + tile + 1)};
  return clip_text(rows, tables.tokens, tables.text_tokens, tables.text_first, text_len);
}

// The queue of a launch: work_order once for every batch element. Entries of -1 are passed over.
class Queue {
 public:
  __device__ __forceinline__ Queue(const WorkTables &tables, int *counter)
      : tables_(tables), counter_(counter) {
    const int stage = __ldg(tables.stage);
    stage_ = min(max(stage, 0), tables.num_stages - 1);
  }

  // Called by a whole warp. Every lane gets the same item, and the range of its own number.
  __device__ __forceinline__ WorkItem next(Rows &range) {
    const int total = tables_.batch * tables_.num_items;
    while (true) {
      const int position = draw();
      if (position >= total) return WorkItem{0, 0, 0, 0, 0, 0, 0, 0, false};
      const int batch = position / tables_.num_items;
      const int code = __ldg(tables_.work_order + stage_ * tables_.num_items + position - batch * tables_.num_items);
      if (code >= 0) return decode(code >> 16, code & 0xffff, batch, range);
    }
  }

 private:
  // The first position of a thread block is its own index; the counter hands out the rest.
  __device__ __forceinline__ int draw() {
    if (first_) {
      first_ = false;
      return blockIdx.x;
    }
    int drawn = 0;
    if (threadIdx.x % 32 == 0) drawn = atomicAdd(counter_, 1);
    return gridDim.x + __shfl_sync(0xffffffffu, drawn, 0);
  }

  __device__ __forceinline__ WorkItem decode(int head, int query, int batch, Rows &range) const {
    const int lane = threadIdx.x % 32;
    const int pattern = __ldg(tables_.head_pattern + stage_ * tables_.heads + head);
    WorkItem item;
    item.head = head;
    item.batch = batch;
    item.text_len = min(max(__ldg(tables_.text_len + batch), 0), tables_.text_tokens);
    item.list_begin = 0;
    item.num_ranges = 0;
    item.is_full = pattern == SVDIT_PATTERN_FULL;
    range = Rows{0, 0};
    if (item.is_full) {
      item.first_row = query * kBlockRows;
      item.rows = min(kBlockRows, tables_.tokens - item.first_row);
      item.num_ranges = kFullRanges;
      item.request_at = kFullRanges - 1;
      range = full_range(lane, tables_.tokens, tables_.text_tokens, tables_.text_first, item.text_len);
      return item;
    }
    item.first_row = __ldg(tables_.tile_offsets + query);
    item.rows = __ldg(tables_.tile_offsets + query + 1) - item.first_row;
    if (pattern != SVDIT_PATTERN_SKIP) {
      const int *row = tables_.row_offsets + static_cast<int64_t>(pattern) * (tables_.num_tiles + 1) + query;
      item.list_begin = __ldg(row);
      item.num_ranges = __ldg(row + 1) - item.list_begin;
    }
    item.request_at = item.num_ranges - kRequestRanges;
    if (lane < item.num_ranges) {
      range = tile_rows(tables_, __ldg(tables_.tile_index + item.list_begin + lane), item.text_len);
    }
    return item;
  }

  const WorkTables &tables_;
  int *counter_;
  int stage_;
  bool first_ = true;
};

}  // namespace svdit

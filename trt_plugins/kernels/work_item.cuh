// What a kernel works on: the tables as it sees them, one work item, and how an entry of work_order becomes one.
#pragma once

#include <cstdint>

#include "block_iter.cuh"

namespace svdit {

// Tables and sizes as the kernel sees them; all pointers are device memory.
struct WorkTables : svdit_tables {
  int batch;
  int tokens;
  int heads;
  int text_tokens;
  int num_tiles;
  int num_stages;
  int num_items;
  bool text_first;
};

inline WorkTables work_tables(const svdit_problem &problem, const svdit_tables &tables) {
  return WorkTables{tables,            problem.batch,      problem.tokens,    problem.heads,          problem.text_tokens,
                    problem.num_tiles, problem.num_stages, problem.num_items, problem.text_first != 0};
}

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

// The stage in force; a table with a bad number reads its nearest row.
__device__ __forceinline__ int stage_of(const WorkTables &tables) {
  return min(max(__ldg(tables.stage), 0), tables.num_stages - 1);
}

// The pattern of the head of an entry of work_order.
__device__ __forceinline__ int pattern_of(const WorkTables &tables, int stage, int code) {
  return __ldg(tables.head_pattern + stage * tables.heads + (code >> 16));
}

// Where the rows of an item go.
struct QueryRows {
  int first_row;
  int rows;
  int head;
  int batch;
};

// The rows of an entry of work_order whose head has this pattern.
__device__ __forceinline__ QueryRows rows_of(const WorkTables &tables, int pattern, int code, int batch) {
  const int head = code >> 16;
  const int query = code & 0xffff;
  if (pattern == SVDIT_PATTERN_FULL) {
    return QueryRows{query * kBlockRows, min(kBlockRows, tables.tokens - query * kBlockRows), head, batch};
  }
  const int first = __ldg(tables.tile_offsets + query);
  return QueryRows{first, __ldg(tables.tile_offsets + query + 1) - first, head, batch};
}

// Called by a whole warp. Every lane gets the same item, and the row range of its own number.
__device__ __forceinline__ WorkItem decode_item(const WorkTables &tables, int stage, int code, int batch, Rows &range) {
  const int lane = threadIdx.x % 32;
  const int pattern = pattern_of(tables, stage, code);
  const QueryRows query = rows_of(tables, pattern, code, batch);
  WorkItem item;
  item.first_row = query.first_row;
  item.rows = query.rows;
  item.head = query.head;
  item.batch = batch;
  item.text_len = min(max(__ldg(tables.text_len + batch), 0), tables.text_tokens);
  item.list_begin = 0;
  item.num_ranges = 0;
  item.is_full = pattern == SVDIT_PATTERN_FULL;
  range = Rows{0, 0};
  if (item.is_full) {
    item.num_ranges = kFullRanges;
    item.request_at = kFullRanges - 1;
    range = full_range(lane, tables.tokens, tables.text_tokens, tables.text_first, item.text_len);
    return item;
  }
  if (pattern != SVDIT_PATTERN_SKIP) {
    const int *row = tables.row_offsets + static_cast<int64_t>(pattern) * (tables.num_tiles + 1) + (code & 0xffff);
    item.list_begin = __ldg(row);
    item.num_ranges = __ldg(row + 1) - item.list_begin;
  }
  item.request_at = item.num_ranges - kRequestRanges;
  if (lane < item.num_ranges) {
    range = tile_rows(tables, __ldg(tables.tile_index + item.list_begin + lane), item.text_len);
  }
  return item;
}

// Zero rows for an item that keeps no key; the whole warp stores 16 bytes a lane.
template <typename T, int kHeadDim>
__device__ __forceinline__ void store_zeros(T *output, int64_t tokens, int64_t heads, QueryRows where) {
  constexpr int kLanesPerRow = kHeadDim * sizeof(T) / 16;
  constexpr int kRowsPerStore = 32 / kLanesPerRow;
  const int lane = threadIdx.x % 32;
  const int64_t stride = heads * kHeadDim;
  T *row = output + (where.batch * tokens + where.first_row + lane / kLanesPerRow) * stride +
           static_cast<int64_t>(where.head) * kHeadDim + lane % kLanesPerRow * (16 / sizeof(T));
  for (int i = lane / kLanesPerRow; i < where.rows; i += kRowsPerStore) {
    *reinterpret_cast<uint4 *>(row) = make_uint4(0, 0, 0, 0);
    row += kRowsPerStore * stride;
  }
}

}  // namespace svdit

// Which query rows each math warpgroup takes. Two warpgroups: the halves of one query tile. Three: three neighbours of
// work_order that share their keys become two items of three halves each, so that all warpgroups have rows and a key
// block serves 192 of them; or one item, if none has more than 64 rows.
#pragma once

#include "lanes.cuh"
#include "tile_scheduler.cuh"

namespace svdit {

constexpr int kSliceRows = 64;

// The half of a tile as a slice; rows may be zero or negative.
__device__ __forceinline__ QueryRows half_of(QueryRows tile, int half) {
  return QueryRows{tile.first_row + half * kSliceRows, min(tile.rows - half * kSliceRows, kSliceRows), tile.head,
                   tile.batch};
}

// Called by a whole warp with the code of an entry in each of lanes 0 to 2. Whether these have one head and the same
// list, which is not empty.
__device__ __forceinline__ bool same_keys(const WorkTables &tables, int stage, int code) {
  const int lane = threadIdx.x % 32;
  const int first = __shfl_sync(kAllLanes, code, 0);
  if (__any_sync(kAllLanes, lane < 3 && (code < 0 || code >> 16 != first >> 16))) return false;
  const int pattern = pattern_of(tables, stage, first);
  if (pattern == SVDIT_PATTERN_FULL) return true;
  if (pattern == SVDIT_PATTERN_SKIP) return false;
  int begin = 0, length = 0;
  if (lane < 3) {
    const int *row = tables.row_offsets + static_cast<int64_t>(pattern) * (tables.num_tiles + 1) + (code & 0xffff);
    begin = __ldg(row);
    length = __ldg(row + 1) - begin;
  }
  const int shared_length = __shfl_sync(kAllLanes, length, 0);
  if (shared_length == 0 || __any_sync(kAllLanes, lane < 3 && length != shared_length)) return false;
  const int second = __shfl_sync(kAllLanes, begin, 1), third = __shfl_sync(kAllLanes, begin, 2);
  begin = __shfl_sync(kAllLanes, begin, 0);
  bool differs = false;
#pragma unroll 1
  for (int i = lane; i < shared_length; i += 32) {
    const int tile = __ldg(tables.tile_index + begin + i);
    differs |= tile != __ldg(tables.tile_index + second + i) || tile != __ldg(tables.tile_index + third + i);
  }
  return !__any_sync(kAllLanes, differs);
}

// Called by a whole warp. Every lane gets the same item; the key range and the slice of its own number.
template <int kSlices>
__device__ __forceinline__ WorkItem next_item(Queue &queue, Rows &range, QueryRows &slice) {
  const WorkTables &tables = queue.tables();
  const int lane = threadIdx.x % 32;
  Queue::Entry entry;
  while (queue.next_entry(entry)) {
    const int part = kSlices == 3 ? entry.place % 3 : 0;
    const int base = entry.place - part;
    if (kSlices == 3 && base + 3 <= tables.num_items) {
      const int code = lane < 3 ? __ldg(queue.order() + base + lane) : -1;
      if (same_keys(tables, queue.stage(), code)) {
        if (part == 2) continue;
        QueryRows tile{0, 0, 0, entry.batch};
        if (lane < 3) tile = rows_of(tables, pattern_of(tables, queue.stage(), code), code, entry.batch);
        const int first = __shfl_sync(kAllLanes, code, 0);
        if (__all_sync(kAllLanes, tile.rows <= kSliceRows)) {
          if (part == 1) continue;
          slice = tile;
          return decode_item(tables, queue.stage(), first, entry.batch, range);
        }
        const int half = 3 * part + lane;
        const int source = min(half / 2, 2);
        slice = half_of(QueryRows{__shfl_sync(kAllLanes, tile.first_row, source),
                                  __shfl_sync(kAllLanes, tile.rows, source), __shfl_sync(kAllLanes, tile.head, 0),
                                  entry.batch},
                        half % 2);
        return decode_item(tables, queue.stage(), first, entry.batch, range);
      }
    }
    const int code = __ldg(queue.order() + entry.place);
    if (code < 0) continue;
    const WorkItem item = decode_item(tables, queue.stage(), code, entry.batch, range);
    slice = half_of(QueryRows{item.first_row, item.rows, item.head, item.batch}, lane);
    return item;
  }
  return Queue::no_item();
}

}  // namespace svdit

// Which query rows a thread block works on next: one warp draws items from a queue and decodes them.
#pragma once

#include "lanes.cuh"
#include "work_item.cuh"

namespace svdit {

// The queue of a launch: work_order once for every batch element. Entries of -1 are passed over.
class Queue {
 public:
  __device__ __forceinline__ Queue(const WorkTables &tables, int *counter)
      : tables_(tables), counter_(counter), stage_(stage_of(tables)) {}

  // Called by a whole warp. Every lane gets the same item, and the range of its own number.
  __device__ __forceinline__ WorkItem next(Rows &range) {
    Entry entry;
    while (next_entry(entry)) {
      const int code = __ldg(order() + entry.place);
      if (code >= 0) return decode_item(tables_, stage_, code, entry.batch, range);
    }
    return no_item();
  }

  struct Entry {
    int batch;
    int place;  // in work_order
  };

  // Called by a whole warp. Returns false when all entries are taken.
  __device__ __forceinline__ bool next_entry(Entry &entry) {
    const int position = draw();
    entry.batch = position / tables_.num_items;
    entry.place = position - entry.batch * tables_.num_items;
    return position < tables_.batch * tables_.num_items;
  }

  __device__ __forceinline__ const int *order() const { return tables_.work_order + stage_ * tables_.num_items; }
  __device__ __forceinline__ const WorkTables &tables() const { return tables_; }
  __device__ __forceinline__ int stage() const { return stage_; }

  static __device__ __forceinline__ WorkItem no_item() { return WorkItem{0, 0, 0, 0, 0, 0, 0, 0, false}; }

 private:
  // The first position of a thread block is its own index; the counter hands out the rest.
  __device__ __forceinline__ int draw() {
    if (first_) {
      first_ = false;
      return blockIdx.x;
    }
    int drawn = 0;
    if (threadIdx.x % 32 == 0) drawn = atomicAdd(counter_, 1);
    return gridDim.x + __shfl_sync(kAllLanes, drawn, 0);
  }

  const WorkTables &tables_;
  int *counter_;
  int stage_;
  bool first_ = true;
};

}  // namespace svdit

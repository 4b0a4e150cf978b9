// Which query rows a thread block works on next: one warp draws items from a queue and decodes them.
#pragma once

#include "work_item.cuh"

namespace svdit {

// The queue of a launch: work_order once for every batch element. Entries of -1 are passed over.
class Queue {
 public:
  __device__ __forceinline__ Queue(const WorkTables &tables, int *counter)
      : tables_(tables), counter_(counter), stage_(stage_of(tables)) {}

  // Called by a whole warp. Every lane gets the same item, and the range of its own number.
  __device__ __forceinline__ WorkItem next(Rows &range) {
    const int total = tables_.batch * tables_.num_items;
    while (true) {
      const int position = draw();
      if (position >= total) return WorkItem{0, 0, 0, 0, 0, 0, 0, 0, false};
      const int batch = position / tables_.num_items;
      const int code = __ldg(tables_.work_order + stage_ * tables_.num_items + position - batch * tables_.num_items);
      if (code >= 0) return decode_item(tables_, stage_, code, batch, range);
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

  const WorkTables &tables_;
  int *counter_;
  int stage_;
  bool first_ = true;
};

}  // namespace svdit

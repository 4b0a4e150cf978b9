// The keys of one item, some rows a step, for kernels whose registers are full: the walk lives in shared memory.
#pragma once

#include "work_item.cuh"

namespace svdit {

struct KeyList {
  Rows ranges[2 * kListChunk];  // of the list, the part around position; loaded a chunk ahead
  Rows pending;                 // one run that is not handed out yet
  Rows step;                    // what advance() found; no rows at the end
  int position;
};

// Like BlockStream: neighbouring tiles form one run, a run is cut every kRows rows, only its last step is short.
// All methods are called by one whole warp; the others read list.step behind a barrier.
template <int kRows>
class KeySteps {
 public:
  __device__ __forceinline__ KeySteps(const WorkTables &tables, const WorkItem &item, KeyList &list)
      : tables_(tables), item_(item), list_(list) {}

  // chunk: what decode_item gave this lane.
  __device__ __forceinline__ void start(Rows chunk) {
    list_.ranges[lane()] = chunk;
    list_.ranges[kListChunk + lane()] = load(kListChunk);
    if (lane() == 0) {
      list_.pending = Rows{0, 0};
      list_.position = 0;
    }
    __syncwarp();
    advance();
  }

  __device__ __forceinline__ void advance() {
    Rows pending = list_.pending;
    int position = list_.position;
    while (pending.end - pending.begin < kRows && position < item_.num_ranges) {
      const Rows range = list_.ranges[position % (2 * kListChunk)];
      if (range.end > range.begin) {
        if (pending.begin == pending.end) {
          pending.begin = range.begin;
        } else if (range.begin != pending.end) {
          break;
        }
        pending.end = range.end;
      }
      if (++position % kListChunk == 0) {
        __syncwarp();
        list_.ranges[(position + kListChunk) % (2 * kListChunk) + lane()] = load(position + kListChunk);
        __syncwarp();
      }
    }
    __syncwarp();
    if (lane() == 0) {
      list_.step = Rows{pending.begin, min(pending.end, pending.begin + kRows)};
      list_.pending = Rows{list_.step.end, pending.end};
      list_.position = position;
    }
    __syncwarp();
  }

 private:
  static __device__ __forceinline__ int lane() { return threadIdx.x % 32; }

  __device__ __forceinline__ Rows load(int first) const {
    const int index = first + lane();
    if (index >= item_.num_ranges) return Rows{0, 0};
    return tile_rows(tables_, __ldg(tables_.tile_index + item_.list_begin + index), item_.text_len);
  }

  const WorkTables &tables_;
  const WorkItem &item_;
  KeyList &list_;
};

}  // namespace svdit

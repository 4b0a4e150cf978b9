// The keys of one item as runs of rows, for kernels whose registers are full: the runs lie in shared memory.
#pragma once

#include "lanes.cuh"
#include "work_item.cuh"

namespace svdit {

constexpr int kRunRing = 2 * kListChunk;

// Runs that are found but not yet walked. One search adds at most kListChunk and the mark of the end.
struct KeyRuns {
  Rows ring[kRunRing];  // a run without rows ends the list
  Rows open;            // the last run of what was read, as long as the range after it may continue it
  int found;            // runs put into the ring so far
  int read;             // ranges of the list read so far
  int enough_until;     // the run after this one is not in the ring yet
};

// Like BlockStream: neighbouring tiles form one run, whatever its length. One whole warp searches, 32 ranges at once;
// the others read the ring behind a barrier.
class RunSearch {
 public:
  __device__ __forceinline__ RunSearch(const WorkTables &tables, const WorkItem &item, KeyRuns &runs)
      : tables_(tables), item_(item), runs_(runs) {}

  // chunk: what decode_item gave this lane. Runs 0 and 1, or the end, are in the ring afterwards.
  __device__ __forceinline__ void start(Rows chunk) {
    if (lane() == 0) {
      runs_.open = Rows{0, 0};
      runs_.found = 0;
      runs_.read = kListChunk;
    }
    __syncwarp();
    append(lane() < item_.num_ranges ? chunk : Rows{0, 0});
    ensure_after(0);
  }

  // Called when a run begins: afterwards the next one, or the end, is in the ring.
  __device__ __forceinline__ void ensure_after(int run) {
    while (runs_.enough_until <= run) {
      const int index = runs_.read + lane() - 1;
      Rows range = runs_.open;
      if (lane() > 0) range = index < item_.num_ranges ? load(index) : Rows{0, 0};
      __syncwarp();
      if (lane() == 0) runs_.read += kListChunk - 1;
      __syncwarp();
      append(range);
    }
  }

 private:
  static __device__ __forceinline__ int lane() { return threadIdx.x % 32; }

  static __device__ __forceinline__ int highest(unsigned lanes) { return (31 - __clz(lanes)) & 31; }

  __device__ __forceinline__ Rows load(int index) const {
    return tile_rows(tables_, __ldg(tables_.tile_index + item_.list_begin + index), item_.text_len);
  }

  // Joins the ranges of all lanes to runs. The last one stays open while the list goes on.
  __device__ __forceinline__ void append(Rows range) {
    const unsigned below = (1u << lane()) - 1;
    const bool any = range.end > range.begin;
    const unsigned all = __ballot_sync(kAllLanes, any);
    const int end_before = __shfl_sync(kAllLanes, range.end, highest(all & below));
    const bool head = any && ((all & below) == 0 || range.begin != end_before);
    const unsigned heads = __ballot_sync(kAllLanes, head);
    const unsigned later_heads = heads & ~below & ~(1u << lane());
    const unsigned members = later_heads == 0 ? all : all & ((later_heads & (0u - later_heads)) - 1);
    const Rows run{range.begin, __shfl_sync(kAllLanes, range.end, highest(members))};
    const bool last = runs_.read >= item_.num_ranges;
    const int found = runs_.found;
    const int complete = last ? __popc(heads) : max(__popc(heads) - 1, 0);
    const int rank = __popc(heads & below);
    __syncwarp();
    if (head) (rank < complete ? runs_.ring[(found + rank) % kRunRing] : runs_.open) = run;
    if (lane() == 0) {
      if (last) runs_.ring[(found + complete) % kRunRing] = Rows{0, 0};
      runs_.found = found + complete;
      runs_.enough_until = last ? INT32_MAX : found + complete - 1;
    }
    __syncwarp();
  }

  const WorkTables &tables_;
  const WorkItem &item_;
  KeyRuns &runs_;
};

}  // namespace svdit

// All lanes of a warp, as its collective instructions take them.
#pragma once

#include <cstdint>

namespace svdit {

constexpr uint32_t kAllLanes = 0xffffffffu;
constexpr int kLanes = 32;

// A number of shared memory, read by the one lane that also tells the writer when it may be replaced: for from_first_lane.
__device__ __forceinline__ int read_by_first_lane(const int &shared) {
  return threadIdx.x % kLanes == 0 ? *const_cast<const volatile int *>(&shared) : 0;
}

__device__ __forceinline__ int from_first_lane(int value) { return __shfl_sync(kAllLanes, value, 0); }

}  // namespace svdit

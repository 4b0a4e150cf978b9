// Block-sparse attention forward for Hopper: one persistent thread block per multiprocessor, a producer warp
// that feeds key and value blocks through the copy engine, a scheduler warp that draws work one item ahead,
// and two or three warpgroups of 64 query rows each.
#pragma once

#include "sm90_consumer.cuh"
#include "sm90_producer.cuh"

namespace svdit {

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, 1)
    sm90_sparse_attention(const __grid_constant__ Sm90Params params) {
  extern __shared__ __align__(1024) unsigned char storage[];
  auto &control = *reinterpret_cast<Control<Config> *>(storage + Config::kControl);
  const uint32_t shared = sm90::shared_address(storage);
  const int warp = __shfl_sync(kAllLanes, threadIdx.x / 32, 0);

  if (threadIdx.x == 0) {
    init_barriers<Config>(control);
    sm90::prefetch_map(&params.query_map);
    sm90::prefetch_map(&params.key_map);
    sm90::prefetch_map(&params.value_map);
    sm90::prefetch_map(&params.output_map);
  }
  __syncthreads();

  if (warp >= Config::kMathThreads / 32) {
    sm90::shrink_registers<Config::kProducerRegisters>();
    if (warp == Config::kMathThreads / 32) {
      Sm90Producer<Config>(params, control, shared).run();
    } else if (warp == Config::kMathThreads / 32 + 1) {
      schedule<Config>(params, control);
    }
  } else {
    sm90::grow_registers<Config::kMathRegisters>();
    Sm90Consumer<Config>(params, control, shared, warp / 4).run();
  }
}

}  // namespace svdit

// Normalise, convert and store 64 output rows of one warpgroup.
#pragma once

#include "softmax.cuh"
#include "sm90_mma.cuh"
#include "sm90_tma.cuh"
#include "work_item.cuh"

namespace svdit {

constexpr int kRaggedRows = 1 << 30;  // see make_ragged_map

// staging is this warpgroup's own 64 x D buffer, 64-column halves of 8 KB, 128-byte swizzle.
// barrier_id is a named barrier of this warpgroup alone.
template <typename T, int kHeadDim>
__device__ __forceinline__ void store_output(float (&output)[kHeadDim / 2], const float (&sum)[2], uint32_t staging,
                                             const CUtensorMap *map, QueryRows where, int barrier_id) {
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32 % 4;
  const float total0 = quad_sum(sum[0]);
  const float total1 = quad_sum(sum[1]);
  const float factor0 = total0 == 0.0f ? 0.0f : __fdividef(1.0f, total0);
  const float factor1 = total1 == 0.0f ? 0.0f : __fdividef(1.0f, total1);
  const bool leader = threadIdx.x % 128 == 0;
  if (leader) sm90::store_wait_read<0>();
  sm90::named_sync(barrier_id, 128);
  const int row = warp * 16 + lane % 16;
  const uint32_t row_address = staging + row * 128;
#pragma unroll
  for (int i = 0; i < kHeadDim / 8; i += 2) {
    const float *o = output + 4 * i;
    const int chunk = i % 8 + lane / 16;
    const uint32_t address = row_address + (i / 8) * 64 * 128 + ((chunk ^ (row % 8)) * 16);
    sm90::store_matrices(address, pack<T>(o[0] * factor0, o[1] * factor0),
                         pack<T>(o[2] * factor1, o[3] * factor1), pack<T>(o[4] * factor0, o[5] * factor0),
                         pack<T>(o[6] * factor1, o[7] * factor1));
  }
  sm90::proxy_fence();
  sm90::named_sync(barrier_id, 128);
  if (leader && where.rows > 0) {
    sm90::store_box_5d(map, staging, 0, kRaggedRows - where.rows, where.head * (kHeadDim / 64), where.batch,
                       where.first_row + where.rows);
    sm90::store_commit();
  }
}

}  // namespace svdit

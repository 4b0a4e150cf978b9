// Normalise, convert and store 64 output rows of one warpgroup.
#pragma once

#include "softmax.cuh"
#include "sm90_mma.cuh"
#include "sm90_tma.cuh"

namespace svdit {

// Where the rows of an item go.
struct QueryRows {
  int first_row;
  int rows;
  int head;
  int batch;
};

constexpr int kRaggedRows = 1 << 30;  // see make_ragged_map

// staging is this warpgroup's own 64 x D buffer, 64-column halves of 8 KB, 128-byte swizzle.
// barrier_id is a named barrier of this warpgroup alone.
template <typename T, int kHeadDim>
__device__ __forceinline__ void store_output(float (&output)[kHeadDim / 2], const float (&sum)[2], uint32_t staging,
                                             const CUtensorMap *map, QueryRows where, int warpgroup, int barrier_id) {
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
    sm90::store_matrices(address, sm90::pack<T>(o[0] * factor0, o[1] * factor0),
                         sm90::pack<T>(o[2] * factor1, o[3] * factor1), sm90::pack<T>(o[4] * factor0, o[5] * factor0),
                         sm90::pack<T>(o[6] * factor1, o[7] * factor1));
  }
  sm90::proxy_fence();
  sm90::named_sync(barrier_id, 128);
  const int first = where.first_row + warpgroup * 64;
  const int rows = min(where.rows - warpgroup * 64, 64);
  if (leader && rows > 0) {
    sm90::store_box_5d(map, staging, 0, kRaggedRows - rows, where.head * (kHeadDim / 64), where.batch, first + rows);
    sm90::store_commit();
  }
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

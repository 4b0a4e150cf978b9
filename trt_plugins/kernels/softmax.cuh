// Running maximum and sum of two rows a thread, in the layout of matrix accumulators (16 rows a warp, any width):
// register 4 i + 2 r + c of a thread holds row (lane / 4 + 8 r), column 8 i + 2 (lane % 4) + c.
#pragma once

#include "lanes.cuh"

namespace svdit {

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, 1));
  return fmaxf(x, __shfl_xor_sync(kAllLanes, x, 2));
}

__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(kAllLanes, x, 1);
  return x + __shfl_xor_sync(kAllLanes, x, 2);
}

// Columns from columns on do not exist: their scores become -inf. Used on short blocks alone.
template <int kValues>
__device__ __forceinline__ void mask_columns(float (&scores)[kValues], int columns) {
  const int limit = columns - 2 * (threadIdx.x % 4);
#pragma unroll
  for (int i = 0; i < kValues; ++i) {
    if (8 * (i / 4) + i % 2 >= limit) scores[i] = -INFINITY;
  }
}

// The maximum that a row is scaled by may lag behind the true one, which saves rescaling the output. It is
// renewed for all rows of a warp as soon as one row's new score would weigh more than 2^kMaxLag, or more than
// kMaxShare of that row's sum so far. The second bound keeps the rounding of a standard softmax, in which the
// largest weight is exactly 1: a score that matters is never left with a weight that rounds.
constexpr float kMaxLag = 8.0f;
constexpr float kMaxShare = 1.0f / 16.0f;

struct Softmax {
  float max[2];      // the reference maximum of raw scores
  float limit[2];    // scores up to here do not renew it
  float sum[2];      // of this thread's columns alone
  float rescale[2];  // what the output accumulated so far must be multiplied by
  float to_log2;     // scale * log2(e), positive
  float from_log2;

  __device__ __forceinline__ void start() {
    max[0] = max[1] = limit[0] = limit[1] = -INFINITY;
    sum[0] = sum[1] = 0.0f;
  }

  __device__ __forceinline__ void renew(int row, float top) {
    const float renewed = fmaxf(max[row], top);
    rescale[row] = exp2_fast((max[row] - renewed) * to_log2);
    max[row] = renewed;
    sum[row] *= rescale[row];
    // a row is shared by four threads; this one's sum stands for a quarter
    limit[row] = renewed + fminf(fmaxf(__log2f(sum[row] * (4.0f * kMaxShare)), 0.0f), kMaxLag) * from_log2;
  }

  // Scores to probabilities in place. Returns whether the output must be multiplied by rescale.
  template <int kValues>
  __device__ __forceinline__ bool update(float (&scores)[kValues]) {
    return update(scores, [] {});
  }

  // The same; on_renewed is called as soon as rescale is known.
  template <int kValues, typename OnRenewed>
  __device__ __forceinline__ bool update(float (&scores)[kValues], OnRenewed &&on_renewed) {
    float block_max[2][2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        block_max[r][c] = scores[2 * r + c];
#pragma unroll
        for (int i = 1; i < kValues / 4; ++i) block_max[r][c] = fmaxf(block_max[r][c], scores[4 * i + 2 * r + c]);
      }
    }
    const float top0 = quad_max(fmaxf(block_max[0][0], block_max[0][1]));
    const float top1 = quad_max(fmaxf(block_max[1][0], block_max[1][1]));
#ifdef SVDIT_ALWAYS_RESCALE
    const bool renewed = true;
#else
    const bool renewed = __any_sync(kAllLanes, top0 > limit[0] || top1 > limit[1]);
#endif
    if (renewed) {
      renew(0, top0);
      renew(1, top1);
      on_renewed();
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float offset = max[r] * to_log2;
      float partial[2] = {sum[r], 0.0f};
#pragma unroll
      for (int i = 0; i < kValues / 4; ++i) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          float &x = scores[4 * i + 2 * r + c];
          x = exp2_fast(fmaf(x, to_log2, -offset));
          partial[c] += x;
        }
      }
      sum[r] = partial[0] + partial[1];
    }
    return renewed;
  }
};

}  // namespace svdit

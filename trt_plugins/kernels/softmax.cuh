// Running softmax of two rows a thread, in the layout of matrix accumulators (16 rows a warp, any width):
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

// The reference that weights are taken against may lag behind the maximum of a row, which saves rescaling the output. It is
// renewed as soon as a new score would weigh more than 1 and more than kMaxShare of the row's sum so far. That keeps the
// rounding of a standard softmax, in which the largest weight is exactly 1: a score that matters is never left with a
// weight that rounds.
constexpr float kMaxShare = 1.0f / 16.0f;
constexpr float kMaxLag = 8.0f;  // of kernels that compare scores: at most 2^kMaxLag, so that no weight overflows

constexpr float kRoundsToOne = 1.0f + 1.0f / 4096.0f;  // in both 16-bit types
constexpr float kOverflows = 1e30f;                    // its inverse is still a normal number

// Weights first, questions later: a block is exponentiated against the reference of the blocks before it. A sum over a few of
// its weights bounds the largest, and only where that bound is not small enough is the largest looked up.
struct Softmax {
  float reference[2];  // in units of raw scores
  float limit[2];      // of bound: up to here no weight renews the reference
  float sum[2];        // of this thread's columns alone
  float block_sum[2];  // the same of the block in hand
  float bound[2];      // no weight of the block is larger
  float rescale[2];    // what the output accumulated so far must be multiplied by
  float to_log2;       // scale * log2(e), positive
  float from_log2;

  __device__ __forceinline__ void start() {
    reference[0] = reference[1] = limit[0] = limit[1] = -INFINITY;
    sum[0] = sum[1] = 0.0f;
  }

  // Raises the reference to the largest score. The output must be multiplied by rescale.
  template <int kValues>
  __device__ __forceinline__ void raise(const float (&scores)[kValues]) {
    float top[2] = {reference[0], reference[1]};
    look_up(scores, top);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      rescale[r] = exp2_fast((reference[r] - top[r]) * to_log2);
      reference[r] = top[r];
      sum[r] *= rescale[r];
    }
  }

  // The scores of one row to weights in place.
  template <int kRow, int kValues>
  __device__ __forceinline__ void weigh(float (&scores)[kValues]) {
    const float offset = reference[kRow] * to_log2;
    float partial[2] = {0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < kValues / 4; ++i) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        float &x = scores[4 * i + 2 * kRow + c];
        x = exp2_fast(fmaf(x, to_log2, -offset));
        partial[c] += x;
      }
    }
    bound[kRow] = fmaxf(partial[0], partial[1]);
    block_sum[kRow] = partial[0] + partial[1];
  }

  // Whether the weights of the block may stay as they are, for all rows of the warp.
  __device__ __forceinline__ bool is_settled() const {
    return !__any_sync(kAllLanes, bound[0] > limit[0] || bound[1] > limit[1]);
  }

  // The largest weight of each row. Returns false where the reference cannot be renewed from weights, for they overflowed.
  template <int kValues>
  __device__ __forceinline__ bool largest(const float (&weights)[kValues], float (&top)[2]) const {
    top[0] = top[1] = 0.0f;
    look_up(weights, top);
    return !__any_sync(kAllLanes, top[0] > kOverflows || top[1] > kOverflows);
  }

  // Renews the reference so that no weight is above 1. Returns whether the output must be multiplied by rescale.
  template <int kValues>
  __device__ __forceinline__ bool renew(float (&weights)[kValues], const float (&top)[2]) {
    if (!__any_sync(kAllLanes, top[0] > kRoundsToOne || top[1] > kRoundsToOne)) return false;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float grown = fmaxf(top[r], 1.0f);
      rescale[r] = __fdividef(1.0f, grown);
      reference[r] += __log2f(grown) * from_log2;
      sum[r] *= rescale[r];
      block_sum[r] *= rescale[r];
    }
#pragma unroll
    for (int i = 0; i < kValues; ++i) weights[i] *= rescale[i / 2 % 2];
    return true;
  }

  __device__ __forceinline__ void renew_limit() {
#pragma unroll
    for (int r = 0; r < 2; ++r) limit[r] = fmaxf(quad_sum(sum[r] + block_sum[r]) * kMaxShare, kSmall);
  }

  __device__ __forceinline__ void add_block() {
    sum[0] += block_sum[0];
    sum[1] += block_sum[1];
  }

 private:
  static constexpr float kSmall = 0.75f;  // a sum that says that no weight is above 1, with a margin

  // The largest value of each row, if that is more than top.
  template <int kValues>
  static __device__ __forceinline__ void look_up(const float (&values)[kValues], float (&top)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float largest[2] = {values[2 * r], values[2 * r + 1]};
#pragma unroll
      for (int i = 1; i < kValues / 4; ++i) {
#pragma unroll
        for (int c = 0; c < 2; ++c) largest[c] = fmaxf(largest[c], values[4 * i + 2 * r + c]);
      }
      top[r] = fmaxf(top[r], quad_max(fmaxf(largest[0], largest[1])));
    }
  }
};

}  // namespace svdit

// Running maximum and sum of two rows a thread, in the layout of a 64 x 128 warpgroup accumulator:
// register 4 i + 2 r + c of a thread holds row (lane / 4 + 8 r), column 8 i + 2 (lane % 4) + c.
#pragma once

#include <cstdint>

namespace svdit {

constexpr uint32_t kAllLanes = 0xffffffffu;

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
__device__ __forceinline__ void mask_columns(float (&scores)[64], int columns) {
  const int limit = columns - 2 * (threadIdx.x % 4);
#pragma unroll
  for (int i = 0; i < 64; ++i) {
    if (8 * (i / 4) + i % 2 >= limit) scores[i] = -INFINITY;
  }
}

// The scale of a row may lag behind the true maximum by this many powers of two before it is renewed. The
// result does not depend on it beyond rounding: 2^8 fits every type that holds probabilities.
constexpr float kMaxLag = 8.0f;

struct Softmax {
  float max[2];     // the reference maximum of raw scores
  float sum[2];     // of this thread's columns alone
  float rescale[2]; // what the output accumulated so far must be multiplied by
  float to_log2;    // scale * log2(e), positive

  __device__ __forceinline__ void start() {
    max[0] = max[1] = -INFINITY;
    sum[0] = sum[1] = 0.0f;
  }

  // Scores to probabilities in place. Returns whether rescale differs from 1 for some row of the warp.
  __device__ __forceinline__ bool update(float (&scores)[64]) {
    float block_max[2][2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        block_max[r][c] = scores[2 * r + c];
#pragma unroll
        for (int i = 1; i < 16; ++i) block_max[r][c] = fmaxf(block_max[r][c], scores[4 * i + 2 * r + c]);
      }
    }
    const float top0 = quad_max(fmaxf(block_max[0][0], block_max[0][1]));
    const float top1 = quad_max(fmaxf(block_max[1][0], block_max[1][1]));
    bool renew = true;
#ifndef SVDIT_ALWAYS_RESCALE
    renew = __any_sync(kAllLanes, (top0 - max[0]) * to_log2 > kMaxLag || (top1 - max[1]) * to_log2 > kMaxLag);
#endif
    if (renew) {
      const float new0 = fmaxf(max[0], top0);
      const float new1 = fmaxf(max[1], top1);
      rescale[0] = exp2_fast((max[0] - new0) * to_log2);
      rescale[1] = exp2_fast((max[1] - new1) * to_log2);
      max[0] = new0;
      max[1] = new1;
      sum[0] *= rescale[0];
      sum[1] *= rescale[1];
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float offset = max[r] * to_log2;
      float partial[2] = {sum[r], 0.0f};
#pragma unroll
      for (int i = 0; i < 16; ++i) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          float &x = scores[4 * i + 2 * r + c];
          x = exp2_fast(fmaf(x, to_log2, -offset));
          partial[c] += x;
        }
      }
      sum[r] = partial[0] + partial[1];
    }
    return renew;
  }
};

}  // namespace svdit

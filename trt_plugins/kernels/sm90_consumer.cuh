// What a math warpgroup does with the stream of key blocks: 64 query rows, one block after the other.
#pragma once

#include "sm90_pipeline.cuh"
#include "sm90_producer.cuh"

namespace svdit {

// Two warpgroups take turns on the tensor cores. Per block j of the stream: S(j) = Q K(j)^T and O += P(j-1) V(j-1) are
// issued together; the softmax of S(j) then runs under the other warpgroup's products.
template <typename Config>
class Sm90Consumer {
  using T = typename Config::Element;
  static constexpr int kHeadDim = Config::kHeadDim;
  static constexpr int kStages = Config::kStages;

 public:
  __device__ __forceinline__ Sm90Consumer(const Sm90Params &params, Control<Config> &control, uint32_t shared,
                                          int warpgroup)
      : params_(params), control_(control), shared_(shared), warpgroup_(warpgroup) {
    const uint32_t query = shared_ + Config::kQuery + warpgroup_ * 64 * 128;
    query_low_ = sm90::descriptor_low(query, 16);
    softmax_.to_log2 = params.scale_log2;
    softmax_.from_log2 = params.inverse_scale_log2;
    softmax_.start();
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) output_[i] = 0.0f;
#pragma unroll
    for (int i = 0; i < 64; ++i) scores_[i] = 0.0f;
  }

  __device__ __forceinline__ void run() {
    if (warpgroup_ == 1) give_turn(0);
    if (!first_block()) return;
    while (true) {
      if (!step<1>()) break;
      advance();
      if (!step<0>()) break;
    }
    if (threadIdx.x % 128 == 0) sm90::store_wait<0>();
  }

 private:
  __device__ __forceinline__ void arrive(const uint64_t &barrier) {
    if (threadIdx.x % 32 == 0) sm90::barrier_arrive(sm90::shared_address(&barrier));
  }

  __device__ __forceinline__ void issue_scores(float (&scores)[64], uint32_t stage) {
    const uint32_t keys = sm90::descriptor_low(shared_ + Config::kKeys + stage * Config::kBlockBytes, 16);
#pragma unroll
    for (int k = 0; k < kHeadDim / 16; ++k) {
      const uint32_t step = (k / 4) * (Config::kHalfBytes >> 4) + (k % 4) * 2;
      const uint64_t a = sm90::descriptor(query_low_ + step);
      const uint64_t b = sm90::descriptor(keys + step);
      if (k == 0) {
        sm90::mma_ss_n128<T, false>(scores, a, b);
      } else {
        sm90::mma_ss_n128<T, true>(scores, a, b);
      }
    }
    sm90::mma_commit();
  }

  __device__ __forceinline__ void issue_output(uint32_t stage) {
    const uint32_t values =
        sm90::descriptor_low(shared_ + Config::kValues + stage * Config::kBlockBytes, Config::kHalfBytes);
#pragma unroll
    for (int k = 0; k < kBlockRows / 16; ++k) {
#ifndef SVDIT_WHATIF_NO_PV
      sm90::mma_rs<T>(output_, weights_ + 4 * k, sm90::descriptor(values + k * (16 * 128 >> 4)));
#endif
    }
    sm90::mma_commit();
  }

  __device__ __forceinline__ void convert(const float (&scores)[64]) {
#pragma unroll
    for (int i = 0; i < 32; ++i) weights_[i] = pack<T>(scores[2 * i], scores[2 * i + 1]);
  }

  __device__ __forceinline__ void rescale_output() {
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) output_[i] *= softmax_.rescale[i / 2 % 2];
  }

  __device__ __forceinline__ bool softmax(float (&scores)[64], int block) {
#ifdef SVDIT_WHATIF_NO_SOFTMAX
    softmax_.sum[0] = softmax_.sum[1] = 1.0f;
    return false;
#else
    const int columns = block & kBlockRowsMask;
    if (__any_sync(kAllLanes, columns != kBlockRows)) mask_columns(scores, columns);
    return softmax_.update(scores);
#endif
  }

  __device__ __forceinline__ int read_block(uint32_t stage) {
    return *const_cast<volatile int *>(&control_.block[stage]);
  }

  // Stores the output of the item whose Q is in this slot, and starts the next with zeros.
  __device__ __forceinline__ void finish_item(int slot, const float (&sum)[2]) {
    const volatile QueryRows &query = control_.query[slot];
    const QueryRows where{query.first_row, query.rows, query.head, query.batch};
    arrive(control_.query_empty[slot]);
    const uint32_t staging = shared_ + Config::kOutput + warpgroup_ * (Config::kBlockBytes / 2);
    store_output<T, kHeadDim>(output_, sum, staging, &params_.output_map, where, warpgroup_, kStore + warpgroup_);
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) output_[i] = 0.0f;
  }

  __device__ __forceinline__ void take_turn() {
#ifndef SVDIT_WHATIF_NO_TURNS
    sm90::named_sync(kTurn + warpgroup_, Config::kMathThreads);
#endif
  }

  __device__ __forceinline__ void give_turn(int to) {
#ifndef SVDIT_WHATIF_NO_TURNS
    sm90::named_arrive(kTurn + to, Config::kMathThreads);
#endif
  }

  __device__ __forceinline__ bool first_block() {
    sm90::barrier_wait(sm90::shared_address(&control_.keys_full[0]), 0);
    block_ = read_block(0);
    if (block_ & kBlockIsStop) return false;
    sm90::hold(scores_);
    sm90::mma_fence();
    issue_scores(scores_, 0);
    sm90::mma_wait<0>();
    sm90::hold(scores_);
    arrive(control_.keys_empty[0]);
    softmax(scores_, block_);
    convert(scores_);
    return true;
  }

  // The loop is unrolled by two stages, whatever their number: pair_ is the first stage of the current two.
  __device__ __forceinline__ void advance() {
    previous_ = pair_ + 1;
    previous_parity_ = parity_;
    if constexpr (kStages > 2) {
      pair_ = (pair_ + 2) % kStages;
      parity_ ^= pair_ == 0 ? 1 : 0;
    } else {
      parity_ ^= 1;
    }
  }

  // One block: kHalf says which of the current two stages it is in. Returns false when it was the stop mark;
  // its scores are then of stale data, and unused.
  template <int kHalf>
  __device__ __forceinline__ bool step() {
    const uint32_t stage = pair_ + kHalf;
    const uint32_t previous = kHalf == 1 ? pair_ : previous_;
    const uint32_t previous_parity = kHalf == 1 ? parity_ : previous_parity_;
    const bool opens_item = (block_ & kBlockIsLast) != 0;
    if (opens_item) {
      query_slot_ ^= 1;
      query_low_ ^= query_flip();
    }
    sm90::barrier_wait(sm90::shared_address(&control_.keys_full[stage]), parity_);
    block_ = read_block(stage);
    take_turn();
    sm90::hold(scores_);
    sm90::mma_fence();
    issue_scores(scores_, stage);
    sm90::barrier_wait(sm90::shared_address(&control_.values_full[previous]), previous_parity);
    sm90::hold(output_);
    sm90::mma_fence();
    issue_output(previous);
    give_turn(1 - warpgroup_);
    sm90::mma_wait<1>();
    sm90::hold(scores_);
    arrive(control_.keys_empty[stage]);
    float finished[2];
    if (opens_item) {
      finished[0] = softmax_.sum[0];
      finished[1] = softmax_.sum[1];
      softmax_.start();
    }
    const bool rescale = softmax(scores_, block_);
    sm90::hold(scores_);
    if (opens_item) {
      finish_products(previous);
      finish_item(query_slot_ ^ 1, finished);
    } else {
      finish_products(previous);
      if (rescale) rescale_output();
    }
    convert(scores_);
    return (block_ & kBlockIsStop) == 0;
  }

  // Waits for O. Called on both sides of a branch: a wait in the same basic block as the exponentials would be
  // scheduled in front of them, and they would no longer overlap with the products.
  __device__ __forceinline__ void finish_products(uint32_t stage) {
    sm90::mma_wait<0>();
    sm90::hold(scores_);
    sm90::hold(output_);
    arrive(control_.values_empty[stage]);
  }

  // The two Q slots differ in one bit of the descriptor when the first is aligned to twice its size.
  __device__ __forceinline__ uint32_t query_flip() const {
    const uint32_t first = sm90::descriptor_low(shared_ + Config::kQuery + warpgroup_ * 64 * 128, 16);
    return first ^ (first + (Config::kBlockBytes >> 4));
  }

  const Sm90Params &params_;
  Control<Config> &control_;
  const uint32_t shared_;
  const int warpgroup_;
  uint32_t query_low_;
  int query_slot_ = 0;
  Softmax softmax_;
  float output_[kHeadDim / 2];
  uint32_t weights_[32];
  uint32_t pair_ = 0;
  uint32_t parity_ = 0;  // of the barriers of the current two stages
  uint32_t previous_ = 0;  // the stage before them
  uint32_t previous_parity_ = 0;
  int block_ = 0;
  float scores_[64];
};

}  // namespace svdit

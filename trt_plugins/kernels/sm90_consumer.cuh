// What a math warpgroup does with the stream of key blocks: 64 query rows, one block after the other.
#pragma once

#include "sm80_mma.cuh"
#include "sm90_pipeline.cuh"
#include "sm90_producer.cuh"

namespace svdit {

// The warpgroups take turns on the tensor cores. Per block j of the stream: S(j) = Q K(j)^T and O += P(j-1) V(j-1) are
// issued together. The softmax of S(j) runs under the products of the others and, its first half, under O += P(j-1) V(j-1).
template <typename Config>
class Sm90Consumer {
  using T = typename Config::Element;
  static constexpr int kHeadDim = Config::kHeadDim;
  static_assert(Config::kStages == 2, "run() has one step for each stage");
  static constexpr bool kMayIdle = Config::kSlices > 2;

 public:
  __device__ __forceinline__ Sm90Consumer(const Sm90Params &params, Control<Config> &control, uint32_t shared,
                                          int warpgroup)
      : params_(params), control_(control), shared_(shared), warpgroup_(warpgroup) {
    query_low_ = sm90::descriptor_low(shared_ + Config::kQuery + warpgroup_ * Config::kSliceBytes, 16);
    softmax_.to_log2 = params.scale_log2;
    softmax_.from_log2 = params.inverse_scale_log2;
    softmax_.start();
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) output_[i] = 0.0f;
#pragma unroll
    for (int i = 0; i < 64; ++i) scores_[i] = 0.0f;
  }

  __device__ __forceinline__ void run() {
    if (warpgroup_ == Config::kSlices - 1) give_turn();
    if (!first_block()) return;
    while (step<1>()) {
      parity_ ^= 1;
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
      const uint64_t a = sm90::descriptor(query_low_ + (k / 4) * (Config::kSliceHalfBytes >> 4) + (k % 4) * 2);
      const uint64_t b = sm90::descriptor(keys + (k / 4) * (Config::kHalfBytes >> 4) + (k % 4) * 2);
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

  __device__ __forceinline__ void mask_short_block() {
    const int columns = block_ & kBlockRowsMask;
    if (__any_sync(kAllLanes, columns != kBlockRows)) mask_columns(scores_, columns);
  }

  // What is left when the scores are weights: P, and their sums. Frees the stage of K.
  __device__ __forceinline__ void finish_softmax(uint32_t stage) {
    convert(scores_);
    if (!softmax_.is_settled()) {
      renew_reference(stage);
      convert(scores_);
    }
    arrive(control_.keys_empty[stage]);
    softmax_.add_block();
  }

  // For weights that may be large.
  __device__ __forceinline__ void renew_reference(uint32_t stage) {
    float top[2];
    if (!softmax_.largest(scores_, top)) {
      recompute_scores(stage);
      mask_short_block();
      softmax_.raise(scores_);
      softmax_.template weigh<0>(scores_);
      softmax_.template weigh<1>(scores_);
      rescale_output();
    } else if (softmax_.renew(scores_, top)) {
      rescale_output();
    }
    softmax_.renew_limit();
  }

  // S of the block in this stage once more, by one warp alone: the others of its warpgroup may not need it.
  __device__ __forceinline__ void recompute_scores(uint32_t stage) {
    const int lane = threadIdx.x % 32;
    const uint32_t query = shared_ + Config::kQuery + query_slot_ * Config::kQueryBytes + warpgroup_ * Config::kSliceBytes +
                           (threadIdx.x / 32 % 4 * 16 + lane % 16) * 128;
    const uint32_t keys = shared_ + Config::kKeys + stage * Config::kBlockBytes + (lane / 16 * 8 + lane % 8) * 128;
    const uint32_t query_chunk = (lane / 16) ^ (lane % 8);
    const uint32_t key_chunk = (lane / 8 % 2) ^ (lane % 8);
#pragma unroll
    for (int i = 0; i < 64; ++i) scores_[i] = 0.0f;
#pragma unroll 1
    for (int k = 0; k < kHeadDim / 16; ++k) {
      uint32_t a[4];
      sm80::load_matrices(a, query + k / 4 * Config::kSliceHalfBytes + ((query_chunk ^ (k % 4 * 2)) << 4));
#pragma unroll
      for (int n = 0; n < kBlockRows / 16; ++n) {
        uint32_t b[4];
        sm80::load_matrices(b, keys + k / 4 * Config::kHalfBytes + n * 16 * 128 + ((key_chunk ^ (k % 4 * 2)) << 4));
        sm80::mma<T>(scores_ + 8 * n, a, b[0], b[1]);
        sm80::mma<T>(scores_ + 8 * n + 4, a, b[2], b[3]);
      }
    }
    __syncwarp();
  }

  // Stores the output of the item whose Q is in this slot, and starts the next with zeros.
  __device__ __forceinline__ void finish_item(int slot, const float (&sum)[2]) {
    const volatile QueryRows &query = control_.query[slot][warpgroup_];
    QueryRows where{0, 0, 0, 0};  // for the thread that stores
    if (threadIdx.x % 32 == 0) where = QueryRows{query.first_row, query.rows, query.head, query.batch};
    arrive(control_.query_empty[slot]);
    const uint32_t staging = shared_ + Config::kOutput + warpgroup_ * Config::kSliceBytes;
    store_output<T, kHeadDim>(output_, sum, staging, &params_.output_map, where, kStore + warpgroup_);
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) output_[i] = 0.0f;
  }

  __device__ __forceinline__ void take_turn() {
#ifndef SVDIT_WHATIF_NO_TURNS
    sm90::named_sync(kTurn + warpgroup_, 2 * 128);
#endif
  }

  __device__ __forceinline__ void give_turn() {
#ifndef SVDIT_WHATIF_NO_TURNS
    const int next = Config::kSlices == 2 ? 1 - warpgroup_ : warpgroup_ == 2 ? 0 : warpgroup_ + 1;
    sm90::named_arrive(kTurn + next, 2 * 128);
#endif
  }

  __device__ __forceinline__ bool first_block() {
    sm90::barrier_wait(sm90::shared_address(&control_.keys_full[0]), 0);
    block_ = from_first_lane(read_by_first_lane(control_.block[0]));
    if (block_ & kBlockIsStop) return false;
    if (kMayIdle) block_ |= idle_mark();
    sm90::hold(scores_);
    sm90::mma_fence();
    issue_scores(scores_, 0);
    sm90::mma_wait<0>();
    sm90::hold(scores_);
    mask_short_block();
    softmax_.raise(scores_);
    softmax_.template weigh<0>(scores_);
    softmax_.template weigh<1>(scores_);
    finish_softmax(0);
    return true;
  }

  // One block. Returns false when it was the stop mark; its scores are then of stale data, and unused.
  template <int kStage>
  __device__ __forceinline__ bool step() {
    constexpr int previous = 1 - kStage;
    const uint32_t previous_parity = kStage == 0 ? parity_ ^ 1 : parity_;
    const bool opens_item = (block_ & kBlockIsLast) != 0;
    if (opens_item) {
      query_slot_ ^= 1;
      query_low_ ^= query_flip();
    }
    sm90::barrier_wait(sm90::shared_address(&control_.keys_full[kStage]), parity_);
    const int block = read_by_first_lane(control_.block[kStage]);
    int idle = 0;
    if (kMayIdle) idle = opens_item ? idle_mark() : block_ & kBlockIsIdle;
    take_turn();
    if (kMayIdle && idle != 0 && !opens_item) {
      give_turn();
      block_ = from_first_lane(block) | idle;
      arrive(control_.keys_empty[kStage]);
      sm90::barrier_wait(sm90::shared_address(&control_.values_full[previous]), previous_parity);
      arrive(control_.values_empty[previous]);
      return true;
    }
    sm90::hold(scores_);
    sm90::mma_fence();
    issue_scores(scores_, kStage);
    sm90::barrier_wait(sm90::shared_address(&control_.values_full[previous]), previous_parity);
    sm90::hold(output_);
    sm90::mma_fence();
    issue_output(previous);
    give_turn();
    block_ = from_first_lane(block) | idle;
    softmax(kStage, previous, opens_item);
    return (block_ & kBlockIsStop) == 0;
  }

  // Half of the exponentials run under this warpgroup's own product, too. P takes the registers that it reads: the other half
  // comes behind it, and P's conversion among them.
  __device__ __forceinline__ void softmax(uint32_t stage, uint32_t previous, bool opens_item) {
    sm90::mma_wait<1>();
    sm90::hold(scores_);
    mask_short_block();
    float finished[2];
    if (opens_item) {
      finished[0] = softmax_.sum[0];
      finished[1] = softmax_.sum[1];
      softmax_.start();
      softmax_.raise(scores_);
    }
    softmax_.template weigh<0>(scores_);
    sm90::hold(scores_);
    if (opens_item) {
      finish_products(previous);
      finish_item(query_slot_ ^ 1, finished);
    } else {
      finish_products(previous);
    }
    softmax_.template weigh<1>(scores_);
    finish_softmax(stage);
  }

  // Waits for O. Called on both sides of a branch: a wait in the same basic block as the exponentials would be
  // scheduled in front of them, and they would no longer overlap with the products.
  __device__ __forceinline__ void finish_products(uint32_t stage) {
    sm90::mma_wait<0>();
    sm90::hold(scores_);
    sm90::hold(output_);
    arrive(control_.values_empty[stage]);
  }

  // Two of three warpgroups suffice for an item of one tile. The third then multiplies nothing but its first block,
  // which comes with the last product of the item before.
  __device__ __forceinline__ int idle_mark() {
    return from_first_lane(read_by_first_lane(control_.query[query_slot_][warpgroup_].rows)) <= 0 ? kBlockIsIdle : 0;
  }

  // What the descriptors of the two Q slots differ in.
  __device__ __forceinline__ uint32_t query_flip() const {
    const uint32_t first =
        sm90::descriptor_low(shared_ + Config::kQuery + warpgroup_ * Config::kSliceBytes, 16);
    return first ^ (first + (Config::kQueryBytes >> 4));
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
  uint32_t parity_ = 0;  // of the barriers of the stage
  int block_ = 0;
  float scores_[64];
};

}  // namespace svdit

// Block-sparse attention forward with mma.sync, for every GPU from sm_80 on: one thread block of four warps an item,
// 32 query rows a warp, two thread blocks a multiprocessor. K of the next step is copied while this step's softmax and
// second product run, V of this step during its first product (the order of FlashAttention-2, arXiv 2307.08691). The
// exponentials of 16 keys are computed between the products of the 16 before them.
#pragma once

#include "key_runs.cuh"
#include "sm80_config.h"
#include "sm80_mma.cuh"
#include "softmax.cuh"
#include "svdit/launch.h"

namespace svdit {

struct Sm80Params {
  WorkTables tables;
  svdit_tensors tensors;
  float scale_log2;     // scale * log2(e)
  int64_t token_bytes;  // from a row of a head to its next one
};

template <typename T, int kDim, int kKeys>
struct Sm80Config {
  using Element = T;
  static constexpr int kHeadDim = kDim;
  static constexpr int kKeyRows = kKeys;
  static constexpr int kThreads = 32 * kSm80Warps;
  static constexpr int kWarpRows = kBlockRows / kSm80Warps;
  static constexpr int kRowTiles = kWarpRows / 16;
  static constexpr int kRowBytes = 2 * kDim;
  static constexpr int kChunks = kRowBytes / 16;
  static constexpr int kSharedBytes = sm80_shared_bytes(kDim, kKeys);
};

struct Sm80Control {
  WorkItem item;
  KeyRuns runs;
  int64_t origin;         // bytes from the beginning of a tensor to row 0 of the item's head
  float lag[kSm80Warps];  // log2 of what a new score may weigh before the maxima of a warp's rows are renewed
};

// A thread block's view of its item. Shared memory: Q, K, V, rows of kRowBytes whose 16-byte chunks are permuted by the
// row number (chunk ^ row % 8), so that eight rows of one chunk lie in different banks. Registers are what this kernel is
// short of: 255 hold scores and output and little else, so that the rest lies in Sm80Control.
template <typename Config>
class Sm80Block {
  using T = typename Config::Element;
  static constexpr int kHeadDim = Config::kHeadDim;
  static constexpr int kKeyRows = Config::kKeyRows;
  static constexpr int kRowTiles = Config::kRowTiles;
  static constexpr int kScores = kKeyRows / 2;  // registers of 16 rows x kKeyRows
  static constexpr int kOutputs = kHeadDim / 2;
  static constexpr int kCopyRows = Config::kThreads / Config::kChunks;  // rows that all threads copy at once

  // Scores and running sums of a thread's rows, in the layout of softmax.cuh.
  using Scores = float[kRowTiles][kScores];
  using Output = float[kRowTiles][kOutputs];
  struct RowState {
    float offset[kRowTiles][2];  // the reference maximum, times scale_log2
    float sum[kRowTiles][2];     // of this thread's columns alone
  };

 public:
  __device__ __forceinline__ Sm80Block(const Sm80Params &params, Sm80Control &control, unsigned char *storage)
      : params_(params), control_(control), query_(sm80::shared_address(storage)),
        keys_(query_ + kBlockRows * Config::kRowBytes), values_(keys_ + kKeyRows * Config::kRowBytes),
        lane_(threadIdx.x % 32), warp_(threadIdx.x / 32) {}

  __device__ __forceinline__ void run() {
    const WorkItem &item = control_.item;
    Rows run = control_.runs.ring[0];
    if (run.begin == run.end) {
      const int first = warp_ * Config::kWarpRows;
      store_zeros<T, kHeadDim>(static_cast<T *>(params_.tensors.o), params_.tables.tokens, params_.tables.heads,
                               QueryRows{item.first_row + first, min(item.rows - first, Config::kWarpRows), item.head,
                                         item.batch});
      return;
    }
    Output output;
    RowState rows;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
      rows.offset[m][0] = rows.offset[m][1] = -INFINITY;
      rows.sum[m][0] = rows.sum[m][1] = 0.0f;
#pragma unroll
      for (int i = 0; i < kOutputs; ++i) output[m][i] = 0.0f;
    }
    copy<kBlockRows>(query_, params_.tensors.q, Rows{item.first_row, item.first_row + item.rows});
    copy<kKeyRows>(keys_, params_.tensors.k, run);
    sm80::copy_commit();
    int walked = 0;
    while (true) {
      sm80::copy_wait();
      __syncthreads();  // K is there; everyone has read the V before
      copy<kKeyRows>(values_, params_.tensors.v, run);
      sm80::copy_commit();
      const int columns = run.end - run.begin;
      run.begin += kKeyRows;
      if (run.begin >= run.end) {
        run = control_.runs.ring[++walked % kRunRing];
        if (warp_ == 0) RunSearch(params_.tables, item, control_.runs).ensure_after(walked);
      }
      const bool more = run.end > run.begin;
      Scores scores;
      multiply_keys(scores);
      if (columns < kKeyRows) {
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) mask_columns(scores[m], columns);
      }
      sm80::copy_wait();
      __syncthreads();  // V and the next run are there; everyone has read K
      if (more) {
        copy<kKeyRows>(keys_, params_.tensors.k, run);
        sm80::copy_commit();
      }
      renew(rows, output, scores);
      multiply_values(output, rows, scores);
      if (!more) break;
    }
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) stage(output[m], rows.sum[m], m);
    __syncwarp();
    store();
  }

 private:
  static __device__ __forceinline__ uint32_t place(int row, int chunk) {
    return row * Config::kRowBytes + ((chunk ^ (row % 8)) << 4);
  }

  // Rows of one head to shared memory; rows beyond them become zeros, so that a NaN there cannot leak.
  template <int kRows>
  __device__ __forceinline__ void copy(uint32_t shared, const void *tensor, Rows rows) const {
    const int row = threadIdx.x / Config::kChunks;
    const int chunk = threadIdx.x % Config::kChunks;
    const char *from = static_cast<const char *>(tensor) + control_.origin + (rows.begin + row) * params_.token_bytes +
                       chunk * 16;
    const uint32_t to = shared + place(row, chunk);
    const int count = rows.end - rows.begin - row;
#pragma unroll
    for (int i = 0; i < kRows; i += kCopyRows) {
      sm80::copy_or_zero(to + i * Config::kRowBytes, from + i * params_.token_bytes, i < count);
    }
  }

  // scores = Q K^T.
  __device__ __forceinline__ void multiply_keys(Scores &scores) const {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int i = 0; i < kScores; ++i) scores[m][i] = 0.0f;
    }
    const uint32_t query = query_ + (warp_ * Config::kWarpRows + lane_ % 16) * Config::kRowBytes;
    const uint32_t query_chunk = (lane_ / 16) ^ (lane_ % 8);
    const uint32_t keys = keys_ + (lane_ / 16 * 8 + lane_ % 8) * Config::kRowBytes;
    const uint32_t key_chunk = (lane_ / 8 % 2) ^ (lane_ % 8);
#pragma unroll
    for (int k = 0; k < kHeadDim / 16; ++k) {
      uint32_t a[kRowTiles][4];
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        sm80::load_matrices(a[m], query + m * 16 * Config::kRowBytes + ((query_chunk ^ (2 * k)) << 4));
      }
#pragma unroll
      for (int n = 0; n < kKeyRows / 16; ++n) {
        uint32_t b[4];
        sm80::load_matrices(b, keys + n * 16 * Config::kRowBytes + ((key_chunk ^ (2 * k)) << 4));
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
          sm80::mma<T>(scores[m] + 8 * n, a[m], b[0], b[1]);
          sm80::mma<T>(scores[m] + 8 * n + 4, a[m], b[2], b[3]);
        }
      }
    }
  }

  static __device__ __forceinline__ float row_max(const float (&scores)[kScores], int r) {
    float largest[2] = {scores[2 * r], scores[2 * r + 1]};
#pragma unroll
    for (int i = 4; i < kScores; i += 4) {
      largest[0] = fmaxf(largest[0], scores[i + 2 * r]);
      largest[1] = fmaxf(largest[1], scores[i + 2 * r + 1]);
    }
    return quad_max(fmaxf(largest[0], largest[1]));
  }

  // New maxima for all rows of this warp where one of them needs it: the lag of softmax.cuh, but one for 32 rows.
  __device__ __forceinline__ void renew(RowState &rows, Output &output, const Scores &scores) const {
    float top[kRowTiles][2];
    float excess = -INFINITY;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        top[m][r] = row_max(scores[m], r);
        excess = fmaxf(excess, fmaf(top[m][r], params_.scale_log2, -rows.offset[m][r]));
      }
    }
    if (!__any_sync(kAllLanes, excess > control_.lag[warp_])) return;
    float lag = kMaxLag;
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
      float rescale[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float renewed = fmaxf(rows.offset[m][r], top[m][r] * params_.scale_log2);
        rescale[r] = exp2_fast(rows.offset[m][r] - renewed);
        rows.offset[m][r] = renewed;
        rows.sum[m][r] *= rescale[r];
        // a row is shared by four threads; this one's sum stands for a quarter
        lag = fminf(lag, fmaxf(__log2f(rows.sum[m][r] * (4.0f * kMaxShare)), 0.0f));
      }
#pragma unroll
      for (int i = 0; i < kOutputs; ++i) output[m][i] *= rescale[i / 2 % 2];
    }
    // not negative, so that its bits order as it does
    lag = __int_as_float(__reduce_min_sync(kAllLanes, __float_as_int(lag)));
    __syncwarp();
    if (lane_ == 0) control_.lag[warp_] = lag;
    __syncwarp();
  }

  // output += P V, P = the weights of scores.
  __device__ __forceinline__ void multiply_values(Output &output, RowState &rows, const Scores &scores) const {
    constexpr int kParts = kHeadDim / 16;     // of the products with 16 keys
    constexpr int kPacked = 4 * kRowTiles;    // registers of weights for 16 keys
    uint32_t weights[2][kRowTiles][4];
    const auto weigh = [&](int k, int m, int i) {
      float weight[2];
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        weight[c] = exp2_fast(fmaf(scores[m][8 * k + 2 * i + c], params_.scale_log2, -rows.offset[m][i % 2]));
        rows.sum[m][i % 2] += weight[c];
      }
      weights[k % 2][m][i] = pack<T>(weight[0], weight[1]);
    };
#pragma unroll
    for (int i = 0; i < kPacked; ++i) weigh(0, i / 4, i % 4);
    const int lane = sm80::recomputed(lane_);
    const uint32_t values = values_ + (lane % 16) * Config::kRowBytes;
    const uint32_t value_chunk = (lane / 16) ^ (lane % 8);
#pragma unroll
    for (int k = 0; k < kKeyRows / 16; ++k) {
#pragma unroll
      for (int n = 0; n < kParts; ++n) {
        uint32_t b[4];
        sm80::load_matrices_transposed(b, values + k * 16 * Config::kRowBytes + ((value_chunk ^ (2 * n)) << 4));
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
          sm80::mma<T>(output[m] + 8 * n, weights[k % 2][m], b[0], b[1]);
          sm80::mma<T>(output[m] + 8 * n + 4, weights[k % 2][m], b[2], b[3]);
        }
        if (k + 1 == kKeyRows / 16) continue;
#pragma unroll
        for (int i = n * kPacked / kParts; i < (n + 1) * kPacked / kParts; ++i) weigh(k + 1, i / 4, i % 4);
      }
    }
  }

  // 16 normalised output rows to where this warp's Q was.
  __device__ __forceinline__ void stage(const float (&output)[kOutputs], const float (&sum)[2], int m) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float total = quad_sum(sum[r]);
      const float factor = total == 0.0f ? 0.0f : __fdividef(1.0f, total);
      const int row = warp_ * Config::kWarpRows + m * 16 + r * 8 + lane_ / 4;
#pragma unroll
      for (int i = 0; i < kHeadDim / 8; ++i) {
        const uint32_t packed = pack<T>(output[4 * i + 2 * r] * factor, output[4 * i + 2 * r + 1] * factor);
        asm volatile("st.shared.b32 [%0], %1;" ::"r"(query_ + place(row, i) + lane_ % 4 * 4), "r"(packed) : "memory");
      }
    }
  }

  // The warp's staged rows to global memory, 16 bytes a lane.
  __device__ __forceinline__ void store() const {
    constexpr int kRowsAtOnce = 32 / Config::kChunks;
    const int chunk = lane_ % Config::kChunks;
    char *to = static_cast<char *>(params_.tensors.o) + control_.origin + control_.item.first_row * params_.token_bytes +
               chunk * 16;
    for (int i = lane_ / Config::kChunks; i < Config::kWarpRows; i += kRowsAtOnce) {
      const int row = warp_ * Config::kWarpRows + i;
      if (row >= control_.item.rows) break;
      uint4 packed;
      asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(packed.x), "=r"(packed.y), "=r"(packed.z), "=r"(packed.w)
                   : "r"(query_ + place(row, chunk)));
      *reinterpret_cast<uint4 *>(to + row * params_.token_bytes) = packed;
    }
  }

  const Sm80Params &params_;
  Sm80Control &control_;
  const uint32_t query_;
  const uint32_t keys_;
  const uint32_t values_;
  const int lane_;
  const int warp_;
};

template <typename Config>
__device__ __forceinline__ void sm80_run(const Sm80Params &params, unsigned char *storage) {
  __shared__ Sm80Control control;
  static_assert(sizeof(control) <= kSm80ControlBytes, "sm80_config.h counts with less");
  const WorkTables &tables = params.tables;
  const int stage = stage_of(tables);
  const int code = __ldg(tables.work_order + stage * tables.num_items + blockIdx.x % tables.num_items);
  if (code < 0) return;
  if (threadIdx.x < 32) {
    Rows chunk{0, 0};
    const WorkItem item = decode_item(tables, stage, code, blockIdx.x / tables.num_items, chunk);
    if (threadIdx.x == 0) {
      control.item = item;
      control.origin = item.batch * params.token_bytes * tables.tokens + item.head * Config::kRowBytes;
      for (float &lag : control.lag) lag = 0.0f;
    }
    __syncwarp();
    RunSearch(tables, control.item, control.runs).start(chunk);
  }
  __syncthreads();
  Sm80Block<Config>(params, control, storage).run();
}

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, kSm80BlocksPerMultiprocessor)
    sm80_sparse_attention(const __grid_constant__ Sm80Params params) {
  extern __shared__ __align__(128) unsigned char storage[];
#ifdef __CUDA_ARCH__
  if constexpr (Config::kKeyRows == sm80_key_rows(Config::kHeadDim, __CUDA_ARCH__ / 10)) {
    sm80_run<Config>(params, storage);
  } else {
    __trap();  // the other number of key rows is launched on this architecture
  }
#endif
}

}  // namespace svdit

// Block-sparse attention forward with mma.sync, for every GPU from sm_80 on: one thread block of four warps an item,
// 32 query rows a warp, two thread blocks a multiprocessor. K of the next step is copied while this step's softmax and
// second product run, V of this step during its first product (the order of FlashAttention-2, arXiv 2307.08691).
#pragma once

#include "key_steps.cuh"
#include "sm80_config.h"
#include "sm80_mma.cuh"
#include "softmax.cuh"
#include "svdit/launch.h"

namespace svdit {

struct Sm80Params {
  WorkTables tables;
  svdit_tensors tensors;
  float scale_log2;  // scale * log2(e)
  float inverse_scale_log2;
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
  KeyList list;
};

// A thread block's view of its item. Shared memory: Q, K, V, rows of kRowBytes whose 16-byte chunks are permuted by the
// row number (chunk ^ row % 8), so that eight rows of one chunk lie in different banks.
template <typename Config>
class Sm80Block {
  using T = typename Config::Element;
  static constexpr int kHeadDim = Config::kHeadDim;
  static constexpr int kRowTiles = Config::kRowTiles;
  static constexpr int kScores = Config::kKeyRows / 2;  // registers of 16 rows x kKeyRows
  static constexpr int kOutputs = kHeadDim / 2;
  static constexpr int kCopyRows = Config::kThreads / Config::kChunks;  // rows that all threads copy at once

 public:
  __device__ __forceinline__ Sm80Block(const Sm80Params &params, Sm80Control &control, unsigned char *storage)
      : params_(params), item_(control.item), list_(control.list), query_(sm80::shared_address(storage)),
        keys_(query_ + kBlockRows * Config::kRowBytes), values_(keys_ + Config::kKeyRows * Config::kRowBytes),
        lane_(threadIdx.x % 32), warp_(threadIdx.x / 32) {}

  __device__ __forceinline__ void run() {
    Rows step = list_.step;
    if (step.begin == step.end) {
      const int first = warp_ * Config::kWarpRows;
      store_zeros<T, kHeadDim>(static_cast<T *>(params_.tensors.o), params_.tables.tokens, params_.tables.heads,
                               QueryRows{item_.first_row + first, min(item_.rows - first, Config::kWarpRows), item_.head,
                                         item_.batch});
      return;
    }
    float output[kRowTiles][kOutputs];
    Softmax softmax[kRowTiles];
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
      softmax[m].start();
      softmax[m].to_log2 = params_.scale_log2;
      softmax[m].from_log2 = params_.inverse_scale_log2;
#pragma unroll
      for (int i = 0; i < kOutputs; ++i) output[m][i] = 0.0f;
    }
    copy<kBlockRows>(query_, params_.tensors.q, Rows{item_.first_row, item_.first_row + item_.rows});
    copy<Config::kKeyRows>(keys_, params_.tensors.k, step);
    sm80::copy_commit();
    while (true) {
      sm80::copy_wait();
      __syncthreads();  // K is there; everyone has read the V before
      copy<Config::kKeyRows>(values_, params_.tensors.v, step);
      sm80::copy_commit();
      if (warp_ == 0) KeySteps<Config::kKeyRows>(params_.tables, item_, list_).advance();
      float scores[kRowTiles][kScores];
      multiply_keys(scores);
      sm80::copy_wait();
      __syncthreads();  // V and the next step are there; everyone has read K
      const Rows following = list_.step;
      const bool more = following.end > following.begin;
      if (more) {
        copy<Config::kKeyRows>(keys_, params_.tensors.k, following);
        sm80::copy_commit();
      }
      const int columns = step.end - step.begin;
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        if (columns < Config::kKeyRows) mask_columns(scores[m], columns);
        if (softmax[m].update(scores[m])) {
#pragma unroll
          for (int i = 0; i < kOutputs; ++i) output[m][i] *= softmax[m].rescale[i / 2 % 2];
        }
      }
      multiply_values(output, scores);
      if (!more) break;
      step = following;
    }
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) stage(output[m], softmax[m].sum, m);
    __syncwarp();
    store();
  }

 private:
  static __device__ __forceinline__ uint32_t place(int row, int chunk) {
    return row * Config::kRowBytes + ((chunk ^ (row % 8)) << 4);
  }

  __device__ __forceinline__ int64_t offset(int row) const {
    const int64_t token = static_cast<int64_t>(item_.batch) * params_.tables.tokens + row;
    return (token * params_.tables.heads + item_.head) * Config::kRowBytes;
  }

  // Rows of one head to shared memory; rows beyond them become zeros, so that a NaN there cannot leak.
  template <int kRows>
  __device__ __forceinline__ void copy(uint32_t shared, const void *tensor, Rows rows) const {
    const int row = threadIdx.x / Config::kChunks;
    const int chunk = threadIdx.x % Config::kChunks;
    const int64_t pass = static_cast<int64_t>(kCopyRows) * params_.tables.heads * Config::kRowBytes;
    const char *first = static_cast<const char *>(tensor) + offset(rows.begin) + chunk * 16;
    const char *from = first + static_cast<int64_t>(row) * params_.tables.heads * Config::kRowBytes;
    const uint32_t to = shared + place(row, chunk);
    const int count = rows.end - rows.begin;
#pragma unroll
    for (int i = 0; i < kRows / kCopyRows; ++i) {
      const bool valid = row + i * kCopyRows < count;
      sm80::copy_or_zero(to + i * kCopyRows * Config::kRowBytes, valid ? from + i * pass : first, valid);
    }
  }

  // scores = Q K^T.
  __device__ __forceinline__ void multiply_keys(float (&scores)[kRowTiles][kScores]) const {
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
      for (int n = 0; n < Config::kKeyRows / 16; ++n) {
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

  // output += P V.
  __device__ __forceinline__ void multiply_values(float (&output)[kRowTiles][kOutputs],
                                                  const float (&weights)[kRowTiles][kScores]) const {
    const uint32_t values = values_ + (lane_ % 16) * Config::kRowBytes;
    const uint32_t value_chunk = (lane_ / 16) ^ (lane_ % 8);
#pragma unroll
    for (int k = 0; k < Config::kKeyRows / 16; ++k) {
      uint32_t a[kRowTiles][4];
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) a[m][i] = pack<T>(weights[m][8 * k + 2 * i], weights[m][8 * k + 2 * i + 1]);
      }
#pragma unroll
      for (int n = 0; n < kHeadDim / 16; ++n) {
        uint32_t b[4];
        sm80::load_matrices_transposed(b, values + k * 16 * Config::kRowBytes + ((value_chunk ^ (2 * n)) << 4));
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
          sm80::mma<T>(output[m] + 8 * n, a[m], b[0], b[1]);
          sm80::mma<T>(output[m] + 8 * n + 4, a[m], b[2], b[3]);
        }
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
    char *to = static_cast<char *>(params_.tensors.o) + offset(item_.first_row) + chunk * 16;
    for (int i = lane_ / Config::kChunks; i < Config::kWarpRows; i += kRowsAtOnce) {
      const int row = warp_ * Config::kWarpRows + i;
      if (row >= item_.rows) break;
      uint4 packed;
      asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(packed.x), "=r"(packed.y), "=r"(packed.z), "=r"(packed.w)
                   : "r"(query_ + place(row, chunk)));
      *reinterpret_cast<uint4 *>(to + static_cast<int64_t>(row) * params_.tables.heads * Config::kRowBytes) = packed;
    }
  }

  const Sm80Params &params_;
  const WorkItem &item_;
  KeyList &list_;
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
    if (threadIdx.x == 0) control.item = item;
    __syncwarp();
    KeySteps<Config::kKeyRows>(tables, control.item, control.list).start(chunk);
  }
  __syncthreads();
  Sm80Block<Config>(params, control, storage).run();
}

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, kSm80BlocksPerMultiprocessor)
    sm80_sparse_attention(const __grid_constant__ Sm80Params params) {
  extern __shared__ __align__(128) unsigned char storage[];
#ifdef __CUDA_ARCH__
  constexpr int kKeyRows = sm80_key_rows(Config::kHeadDim, shared_per_multiprocessor(__CUDA_ARCH__ / 10));
  if constexpr (Config::kKeyRows == kKeyRows) {
    sm80_run<Config>(params, storage);
  } else {
    __trap();  // the other number of key rows is launched on this architecture
  }
#endif
}

}  // namespace svdit

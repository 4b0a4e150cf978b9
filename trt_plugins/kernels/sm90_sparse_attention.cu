// Instantiations and launch of the sm_90 kernel.
#include "sm90_sparse_attention.cuh"

#include "launch_request.h"

#if defined(__CUDA_ARCH__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
#error "this kernel uses wgmma: build with CMAKE_CUDA_ARCHITECTURES=90a"
#endif

namespace svdit {
namespace {

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

// The driver's encoder, found at run time so that the library does not link against libcuda.
EncodeTiled find_encoder(Report &report) {
  void *entry = nullptr;
  cudaDriverEntryPointQueryResult found{};
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found);
  if (error != cudaSuccess || found != cudaDriverEntryPointSuccess) {
    report.fail(SVDIT_CUDA_ERROR, "driver: got no cuTensorMapEncodeTiled; expected CUDA 12.0 or newer; update the driver");
    return nullptr;
  }
  return reinterpret_cast<EncodeTiled>(entry);
}

struct MapRequest {
  const void *base;
  int rows_in_box;
  bool ragged;
};

// A map of one [batch, tokens, heads, head_dim] tensor whose box is rows x head_dim as 64-column halves.
//
// The plain form has dimensions {64, tokens, heads * halves, batch}. The ragged form lets the hardware cut a
// box after any number of rows: its row dimension ends at kRaggedRows and its base lies that many rows
// earlier, and a further dimension with the same stride moves it back. Coordinates (kRaggedRows - n in rows,
// first + n in the further dimension) address rows [first, first + n); all later rows of the box are outside.
bool make_map(EncodeTiled encode, const svdit_problem &problem, const MapRequest &request, CUtensorMap *map) {
  const uint64_t halves = problem.head_dim / 64;
  const uint64_t row_bytes = uint64_t(problem.heads) * problem.head_dim * 2;
  const uint64_t batch_bytes = row_bytes * problem.tokens;
  const uint64_t rows = request.ragged ? kRaggedRows : problem.tokens;
  const uint64_t address = reinterpret_cast<uint64_t>(request.base) - (request.ragged ? kRaggedRows * row_bytes : 0);
  const cuuint64_t sizes[5] = {64, rows, problem.heads * halves, uint64_t(problem.batch), uint64_t(problem.tokens) + 1};
  const cuuint64_t strides[4] = {row_bytes, 128, batch_bytes, row_bytes};
  const cuuint32_t box[5] = {64, cuuint32_t(request.rows_in_box), cuuint32_t(halves), 1, 1};
  const cuuint32_t steps[5] = {1, 1, 1, 1, 1};
  const CUtensorMapDataType type =
      problem.dtype == SVDIT_BFLOAT16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  return encode(map, type, request.ragged ? 5 : 4, reinterpret_cast<void *>(address), sizes, strides, box, steps,
                CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

template <typename Config>
svdit_status launch(const LaunchRequest &request, Report &report) {
  const svdit_problem &problem = request.problem;
  const EncodeTiled encode = find_encoder(report);
  if (encode == nullptr) return report.status();
  Sm90Params params{};
  const bool mapped = make_map(encode, problem, {request.tensors.q, kSliceRows, false}, &params.query_map) &&
                      make_map(encode, problem, {request.tensors.k, kBlockRows, false}, &params.key_map) &&
                      make_map(encode, problem, {request.tensors.v, kBlockRows, true}, &params.value_map) &&
                      make_map(encode, problem, {request.tensors.o, kSliceRows, true}, &params.output_map);
  if (!mapped) return report.fail(SVDIT_CUDA_ERROR, "driver: refused a tensor map; check that q, k, v and o are device memory");
  params.tables = work_tables(problem, request.tables);
  params.output = request.tensors.o;
  params.counter = static_cast<int *>(request.workspace);
  params.scale_log2 = problem.scale * 1.4426950408889634f;
  params.inverse_scale_log2 = 1.0f / params.scale_log2;

  const auto kernel = sm90_sparse_attention<Config>;
  constexpr uint32_t kShared = shared_bytes<Config>();
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared);
  if (error != cudaSuccess) return report.cuda("cudaFuncSetAttribute", error);
  error = cudaMemsetAsync(request.workspace, 0, kWorkspaceBytes, request.stream);
  if (error != cudaSuccess) return report.cuda("cudaMemsetAsync", error);
  const int64_t items = int64_t(problem.batch) * problem.num_items;
  const int blocks = int(items < request.multiprocessors ? items : request.multiprocessors);
  kernel<<<blocks, Config::kThreads, kShared, request.stream>>>(params);
  error = cudaGetLastError();
  if (error != cudaSuccess) return report.cuda("kernel launch", error);
  return SVDIT_OK;
}

}  // namespace

svdit_status launch_sm90(const LaunchRequest &request, Report &report) {
  const bool wide = request.problem.head_dim == 128;
  if (request.problem.dtype == SVDIT_BFLOAT16) {
    return wide ? launch<Sm90Config<__nv_bfloat16, 128>>(request, report)
                : launch<Sm90Config<__nv_bfloat16, 64>>(request, report);
  }
  return wide ? launch<Sm90Config<__half, 128>>(request, report) : launch<Sm90Config<__half, 64>>(request, report);
}

#ifdef SVDIT_WATCHDOG
extern "C" __attribute__((visibility("default"))) int svdit_watchdog(int *record) {
  return cudaMemcpyFromSymbol(record, sm90::svdit_watchdog_record, sizeof(int) * 8) == cudaSuccess ? 0 : 1;
}
#endif

}  // namespace svdit

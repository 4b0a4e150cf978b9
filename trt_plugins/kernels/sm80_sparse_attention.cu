// Instantiations and launch of the sm_80 kernel.
#include "sm80_sparse_attention.cuh"

#include "launch_request.h"

namespace svdit {
namespace {

template <typename Config>
svdit_status launch(const LaunchRequest &request, Report &report) {
  const svdit_problem &problem = request.problem;
  Sm80Params params{};
  params.tables = work_tables(problem, request.tables);
  params.tensors = request.tensors;
  params.scale_log2 = problem.scale * 1.4426950408889634f;
  params.token_bytes = int64_t(problem.heads) * Config::kRowBytes;

  const int64_t items = int64_t(problem.batch) * problem.num_items;
  if (items > INT32_MAX) {
    return report.fail(SVDIT_BAD_PROBLEM, "work items: got %lld in all batch elements; expected at most %d; lower the batch",
                       static_cast<long long>(items), INT32_MAX);
  }
  const auto kernel = sm80_sparse_attention<Config>;
  cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Config::kSharedBytes);
  if (error != cudaSuccess) return report.cuda("cudaFuncSetAttribute", error);
  kernel<<<static_cast<int>(items), Config::kThreads, Config::kSharedBytes, request.stream>>>(params);
  error = cudaGetLastError();
  if (error != cudaSuccess) return report.cuda("kernel launch", error);
  return SVDIT_OK;
}

// The sizes that the code in this library was compiled for, which need not be code for exactly this GPU.
template <typename T, int kHeadDim>
svdit_status launch_compiled(const LaunchRequest &request, Report &report) {
  constexpr int kMost = sm80_most_key_rows(kHeadDim, 80);
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, sm80_sparse_attention<Sm80Config<T, kHeadDim, kMost>>);
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction) {
    cudaGetLastError();
    return report.fail(SVDIT_UNSUPPORTED_GPU,
                       "GPU: got one that this library holds no code for; rebuild it with the GPU's compute capability "
                       "in CMAKE_CUDA_ARCHITECTURES");
  }
  if (error != cudaSuccess) return report.cuda("cudaFuncGetAttributes", error);
  if (sm80_key_rows(kHeadDim, attributes.ptxVersion) == kMost) {
    return launch<Sm80Config<T, kHeadDim, kMost>>(request, report);
  }
  return launch<Sm80Config<T, kHeadDim, kMost / 2>>(request, report);
}

template <typename T>
svdit_status launch_typed(const LaunchRequest &request, Report &report) {
  return request.problem.head_dim == 64 ? launch_compiled<T, 64>(request, report)
                                        : launch_compiled<T, 128>(request, report);
}

}  // namespace

svdit_status launch_sm80(const LaunchRequest &request, Report &report) {
  return request.problem.dtype == SVDIT_BFLOAT16 ? launch_typed<__nv_bfloat16>(request, report)
                                                 : launch_typed<__half>(request, report);
}

}  // namespace svdit

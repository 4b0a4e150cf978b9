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
  params.inverse_scale_log2 = 1.0f / params.scale_log2;

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

template <typename T>
svdit_status launch_typed(const LaunchRequest &request, Report &report) {
  if (request.problem.head_dim == 64) return launch<Sm80Config<T, 64, 64>>(request, report);
  return sm80_key_rows(128, request.shared_per_multiprocessor) == 64 ? launch<Sm80Config<T, 128, 64>>(request, report)
                                                                     : launch<Sm80Config<T, 128, 32>>(request, report);
}

}  // namespace

svdit_status launch_sm80(const LaunchRequest &request, Report &report) {
  return request.problem.dtype == SVDIT_BFLOAT16 ? launch_typed<__nv_bfloat16>(request, report)
                                                 : launch_typed<__half>(request, report);
}

}  // namespace svdit

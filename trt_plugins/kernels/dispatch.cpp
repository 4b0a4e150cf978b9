// The C entry points that touch a GPU: check pointers, find the architecture, hand over to its kernel.
#include <cuda_runtime_api.h>

#include "sm90_launch.h"

namespace svdit {
namespace {

bool aligned(const void *pointer) { return pointer != nullptr && reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

svdit_status check_pointers(const svdit_tensors &tensors, const svdit_tables &tables, Report &report) {
  if (!aligned(tensors.q) || !aligned(tensors.k) || !aligned(tensors.v) || !aligned(tensors.o)) {
    return report.fail(SVDIT_BAD_POINTER, "q, k, v, o: got a null or misaligned pointer; expected 16-byte alignment");
  }
  const void *all[] = {tables.stage,       tables.text_len,   tables.head_pattern, tables.tile_offsets,
                       tables.row_offsets, tables.tile_index, tables.work_order};
  for (const void *table : all) {
    if (table == nullptr || reinterpret_cast<uintptr_t>(table) % 4 != 0) {
      return report.fail(SVDIT_BAD_POINTER, "tables: got a null or misaligned pointer; expected seven int32 arrays");
    }
  }
  return SVDIT_OK;
}

}  // namespace
}  // namespace svdit

extern "C" {

__attribute__((visibility("default"))) int32_t svdit_abi_version(void) { return SVDIT_ABI_VERSION; }

__attribute__((visibility("default"))) size_t svdit_workspace_size(const svdit_problem *) {
  return svdit::kWorkspaceBytes;
}

__attribute__((visibility("default"))) svdit_status svdit_launch(const svdit_problem *problem,
                                                                 const svdit_tensors *tensors,
                                                                 const svdit_tables *tables, void *workspace,
                                                                 size_t workspace_size, void *stream, char *message,
                                                                 size_t message_size) {
  svdit::Report report(message, message_size);
  if (problem == nullptr || tensors == nullptr || tables == nullptr) {
    return report.fail(SVDIT_BAD_POINTER, "arguments: got a null pointer; expected problem, tensors and tables");
  }
  svdit_status status = svdit_check_problem(problem, message, message_size);
  if (status != SVDIT_OK) return status;
  status = svdit::check_pointers(*tensors, *tables, report);
  if (status != SVDIT_OK) return status;
  if (!svdit::aligned(workspace) || workspace_size < svdit::kWorkspaceBytes) {
    return report.fail(SVDIT_BAD_WORKSPACE, "workspace: got %zu bytes at %p; expected %zu bytes, 16-byte aligned",
                       workspace_size, workspace, svdit::kWorkspaceBytes);
  }
  int device = 0, major = 0, minor = 0, multiprocessors = 0, l2_bytes = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&l2_bytes, cudaDevAttrL2CacheSize, device);
  if (error != cudaSuccess) return report.cuda("device query", error);
  if (major != 9 || minor != 0) {
    return report.fail(SVDIT_UNSUPPORTED_GPU, "GPU: got compute capability %d.%d; expected 9.0 (H100, H200)", major,
                       minor);
  }
  const svdit::LaunchRequest request{*problem,  *tensors, *tables, workspace, static_cast<cudaStream_t>(stream),
                                     multiprocessors, l2_bytes};
  return svdit::launch_sm90(request, report);
}

}  // extern "C"

// The C entry points that touch a GPU: check pointers, choose the kernel for the GPU, hand over to it.
#include <cuda_runtime_api.h>

#include <cstdlib>
#include <cstring>

#include "launch_request.h"

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

struct Gpu {
  int major;
  int minor;
  int multiprocessors;
  int l2_bytes;
};

svdit_status query(Gpu &gpu, Report &report) {
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  const auto get = [&](int &value, cudaDeviceAttr attribute) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&value, attribute, device);
  };
  get(gpu.major, cudaDevAttrComputeCapabilityMajor);
  get(gpu.minor, cudaDevAttrComputeCapabilityMinor);
  get(gpu.multiprocessors, cudaDevAttrMultiProcessorCount);
  get(gpu.l2_bytes, cudaDevAttrL2CacheSize);
  return error == cudaSuccess ? SVDIT_OK : report.cuda("device query", error);
}

enum class Kernel { kSm80, kSm90 };

// The fastest kernel that the GPU runs and this library holds; SVDIT_KERNEL names another one.
svdit_status choose(const Gpu &gpu, Kernel &kernel, Report &report) {
  if (gpu.major < 8) {
    return report.fail(SVDIT_UNSUPPORTED_GPU, "GPU: got compute capability %d.%d; expected 8.0 (A100, RTX 30) or newer",
                       gpu.major, gpu.minor);
  }
  bool hopper = gpu.major == 9 && gpu.minor == 0;
#ifndef SVDIT_SM90
  hopper = false;
#endif
  const char *wanted = std::getenv("SVDIT_KERNEL");
  if (wanted == nullptr || *wanted == '\0') {
    kernel = hopper ? Kernel::kSm90 : Kernel::kSm80;
    return SVDIT_OK;
  }
  if (std::strcmp(wanted, "sm80") == 0) {
    kernel = Kernel::kSm80;
  } else if (std::strcmp(wanted, "sm90") == 0 && hopper) {
    kernel = Kernel::kSm90;
  } else {
    return report.fail(SVDIT_UNSUPPORTED_GPU,
                       "SVDIT_KERNEL: got \"%.32s\" on compute capability %d.%d; expected sm80%s; unset it for the best",
                       wanted, gpu.major, gpu.minor, hopper ? " or sm90" : "");
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
  svdit::Gpu gpu;
  status = svdit::query(gpu, report);
  if (status != SVDIT_OK) return status;
  svdit::Kernel kernel = svdit::Kernel::kSm80;
  status = svdit::choose(gpu, kernel, report);
  if (status != SVDIT_OK) return status;
  const svdit::LaunchRequest request{*problem,
                                     *tensors,
                                     *tables,
                                     workspace,
                                     static_cast<cudaStream_t>(stream),
                                     gpu.multiprocessors,
                                     gpu.l2_bytes};
#ifdef SVDIT_SM90
  if (kernel == svdit::Kernel::kSm90) return svdit::launch_sm90(request, report);
#endif
  return svdit::launch_sm80(request, report);
}

}  // extern "C"

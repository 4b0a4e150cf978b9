// Between dispatch and the kernels.
#pragma once

#include <cuda_runtime_api.h>

#include "report.h"
#include "svdit/launch.h"

namespace svdit {

constexpr size_t kWorkspaceBytes = 16;  // the queue's counter

struct LaunchRequest {
  const svdit_problem &problem;
  const svdit_tensors &tensors;
  const svdit_tables &tables;
  void *workspace;
  cudaStream_t stream;
  int multiprocessors;
  int l2_bytes;
};

svdit_status launch_sm80(const LaunchRequest &request, Report &report);  // compute capability 8.0 and newer
svdit_status launch_sm90(const LaunchRequest &request, Report &report);  // 9.0 alone

}  // namespace svdit

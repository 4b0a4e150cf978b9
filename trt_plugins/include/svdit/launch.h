// The one function that adapters (torch, TensorRT, ONNX Runtime) call.
#ifndef SVDIT_LAUNCH_H_
#define SVDIT_LAUNCH_H_

#include "svdit/problem.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { SVDIT_ABI_VERSION = 1 };

typedef struct svdit_tensors {
  const void *q;
  const void *k;
  const void *v;
  void *o;
} svdit_tensors;

// The version this library was built as; compare with SVDIT_ABI_VERSION before any other call.
int32_t svdit_abi_version(void);

// Bytes of device memory that one launch needs, 16-byte aligned. Launches that may overlap in time need
// workspaces of their own; its contents need not survive between launches.
size_t svdit_workspace_size(const svdit_problem *problem);

// Enqueues attention of all heads of one layer on stream (a cudaStream_t). All pointers are device memory
// and must stay valid until the work is done. Allocates nothing, waits for nothing, may be captured in a
// CUDA graph: stage, text_len and all tables are read when the kernel runs. message may be null.
svdit_status svdit_launch(const svdit_problem *problem, const svdit_tensors *tensors, const svdit_tables *tables,
                          void *workspace, size_t workspace_size, void *stream, char *message,
                          size_t message_size);

#ifdef __cplusplus
}
#endif

#endif  // SVDIT_LAUNCH_H_

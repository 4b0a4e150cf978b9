// The operator on the CUDA provider. Compute only enqueues: no allocation of CUDA's own, no wait, so that a session
// may capture it in a CUDA graph; stage, text_len and the tables stay on the device.
#include <cuda_runtime_api.h>

#include <vector>

#include "sparse_attention_op.h"

namespace svdit::ort {
namespace {

void check_cuda(const char *call, cudaError_t error) {
  if (error == cudaSuccess) return;
  throw Ort::Exception(std::string("svdit::SparseAttention, ") + call + ": got " + cudaGetErrorName(error) + " (" +
                           cudaGetErrorString(error) + "); expected success",
                       ORT_FAIL);
}

// A table that is a constant of the graph, on the host. The runtime may keep constants on the device.
struct HostTable {
  std::vector<int32_t> values;
  std::vector<int64_t> shape;
};

HostTable host_table(const Ort::ConstKernelInfo &info, Input input) {
  int constant = 0;
  const Ort::ConstValue value = info.GetTensorConstantInput(input, &constant);
  if (!constant || value == nullptr) {
    refuse(std::string(kInputNames[input]) + ": got a computed tensor; expected a constant of the graph on the CUDA "
           "provider, which cannot look at values when it runs");
  }
  const auto described = value.GetTensorTypeAndShapeInfo();
  HostTable table{std::vector<int32_t>(described.GetElementCount()), described.GetShape()};
  check_cuda("cudaMemcpy", cudaMemcpy(table.values.data(), value.GetTensorRawData(), table.values.size() * 4,
                                      cudaMemcpyDefault));
  return table;
}

void check_tables(const Ort::ConstKernelInfo &info, const Attributes &attributes, svdit_dtype type) {
  std::array<HostTable, kNumInputs> all;
  for (size_t input = kHeadPattern; input <= kWorkOrder; ++input) all[input] = host_table(info, Input(input));
  const HostTable &heads = all[kHeadPattern], &offsets = all[kTileOffsets], &rows = all[kRowOffsets],
                  &index = all[kTileIndex], &order = all[kWorkOrder];
  const bool fits = heads.shape.size() == 2 && offsets.shape.size() == 1 && offsets.shape[0] >= 2 &&
                    rows.shape.size() == 2 && rows.shape[1] == offsets.shape[0] && index.shape.size() == 1 &&
                    order.shape.size() == 2 && order.shape[0] == heads.shape[0];
  if (!fits) refuse("tables: got shapes that contradict each other; expected those of docs/op.md");
  svdit_problem problem = {};
  problem.dtype = type;
  problem.batch = 1;
  problem.tokens = offsets.values.back();
  problem.heads = int32_t(heads.shape[1]);
  problem.head_dim = 64;  // NOTE the real one is known when the operator runs, and checked by svdit_launch
  problem.text_tokens = attributes.text_tokens;
  problem.text_first = attributes.text_first;
  problem.scale = attributes.scale;
  problem.num_tiles = int32_t(offsets.shape[0] - 1);
  problem.num_patterns = int32_t(rows.shape[0]);
  problem.num_stages = int32_t(heads.shape[0]);
  problem.num_items = int32_t(order.shape[1]);
  problem.num_entries = int32_t(index.shape[0]);
  svdit_tables tables = {};
  tables.head_pattern = heads.values.data();
  tables.tile_offsets = offsets.values.data();
  tables.row_offsets = rows.values.data();
  tables.tile_index = index.values.data();
  tables.work_order = order.values.data();
  char message[512] = "";
  if (svdit_check_tables(&problem, &tables, message, sizeof(message)) != SVDIT_OK) refuse(message);
}

// Memory of the provider's arena. Freed when the work is enqueued: the arena hands it out again only to later work
// of the same stream, as it does for the provider's own kernels.
class Workspace {
 public:
  Workspace(const Ort::KernelContext &context, int device, size_t size)
      : info_("Cuda", OrtDeviceAllocator, device, OrtMemTypeDefault) {
    OrtAllocator *allocator = context.GetAllocator(*static_cast<const OrtMemoryInfo *>(info_));
    allocator_ = allocator;
    memory_ = allocator_->Alloc(allocator_, size);
    if (memory_ == nullptr) throw Ort::Exception("svdit::SparseAttention: out of device memory", ORT_FAIL);
  }
  ~Workspace() {
    allocator_->Free(allocator_, memory_);
    Ort::GetApi().ReleaseAllocator(allocator_);
  }
  Workspace(const Workspace &) = delete;
  Workspace &operator=(const Workspace &) = delete;

  void *memory() const { return memory_; }

 private:
  Ort::MemoryInfo info_;
  OrtAllocator *allocator_;
  void *memory_;
};

}  // namespace

CudaKernel::CudaKernel(const OrtKernelInfo *info, ONNXTensorElementDataType type)
    : attributes_(read_attributes(Ort::ConstKernelInfo(info))),
      type_(type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16 ? SVDIT_FLOAT16 : SVDIT_BFLOAT16) {
  check_tables(Ort::ConstKernelInfo(info), attributes_, type_);
}

OrtStatus *CudaKernel::ComputeV2(OrtKernelContext *context) {
  return guarded([&] { compute(Ort::KernelContext(context)); });
}

void CudaKernel::compute(const Ort::KernelContext &context) {
  Call call = read_call(context, attributes_);
  call.problem.dtype = type_;
  const int64_t shape[] = {call.problem.batch, call.problem.tokens, call.problem.heads, call.problem.head_dim};
  call.tensors.o = context.GetOutput(0, shape, 4).GetTensorMutableRawData();
  const size_t size = svdit_workspace_size(&call.problem);
  const Workspace workspace(context, context.GetInput(kQ).GetTensorMemoryInfo().GetDeviceId(), size);
  char message[512] = "";
  const svdit_status status = svdit_launch(&call.problem, &call.tensors, &call.tables, workspace.memory(), size,
                                           context.GetGPUComputeStream(), message, sizeof(message));
  if (status != SVDIT_OK) refuse(message);
}

}  // namespace svdit::ort

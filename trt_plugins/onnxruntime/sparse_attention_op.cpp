// The operator on the CPU provider: checks, then tasks on the session's own threads.
#include "sparse_attention_op.h"

#include <atomic>
#include <cstring>

#include "cpu_sparse_attention.h"

namespace svdit::ort {
namespace {

CpuType cpu_type(ONNXTensorElementDataType type) {
  switch (type) {
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT: return CpuType::kFloat32;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16: return CpuType::kFloat16;
    default: return CpuType::kBfloat16;
  }
}

void check_dynamic(const Call &call) {
  const int32_t stage = call.tables.stage[0];
  if (stage < 0 || stage >= call.problem.num_stages) {
    refuse("stage: got " + std::to_string(stage) + "; expected 0.." + std::to_string(call.problem.num_stages - 1));
  }
  for (int32_t b = 0; b < call.problem.batch; ++b) {
    const int32_t length = call.tables.text_len[b];
    if (length < 0 || length > call.problem.text_tokens) {
      refuse("text_len[" + std::to_string(b) + "]: got " + std::to_string(length) + "; expected 0.." +
             std::to_string(call.problem.text_tokens));
    }
  }
}

struct Work {
  const CpuSparseAttention *attention;
  std::atomic<bool> out_of_memory{false};
};

void run_task(void *data, size_t index) {
  Work *work = static_cast<Work *>(data);
  try {
    work->attention->run(work->attention->tasks()[index]);
  } catch (...) {  // nothing may be thrown through the runtime's thread pool
    work->out_of_memory = true;
  }
}

}  // namespace

CpuKernel::CpuKernel(const OrtKernelInfo *info, ONNXTensorElementDataType type)
    : attributes_(read_attributes(Ort::ConstKernelInfo(info))), type_(type) {
  for (size_t input = kHeadPattern; input <= kWorkOrder; ++input) {
    int constant = 0;
    Ort::ConstKernelInfo(info).GetTensorConstantInput(input, &constant);
    constant_tables_ = constant_tables_ && constant != 0;
  }
}

OrtStatus *CpuKernel::ComputeV2(OrtKernelContext *context) {
  return guarded([&] { compute(Ort::KernelContext(context)); });
}

// Linear in the tables, so constant ones are checked once for each shape of Q.
void CpuKernel::check(const Call &call) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (constant_tables_ && std::memcmp(&checked_, &call.problem, sizeof(checked_)) == 0) return;
  svdit_problem problem = call.problem;
  problem.dtype = SVDIT_FLOAT16;  // NOTE the C check knows the GPU's types and head sizes; the CPU takes any
  problem.head_dim = 64;
  svdit_tables tables = call.tables;
  tables.stage = tables.text_len = nullptr;
  char message[512] = "";
  if (svdit_check_tables(&problem, &tables, message, sizeof(message)) != SVDIT_OK) refuse(message);
  checked_ = call.problem;
}

void CpuKernel::compute(const Ort::KernelContext &context) {
  Call call = read_call(context, attributes_);
  check(call);
  check_dynamic(call);
  const int64_t shape[] = {call.problem.batch, call.problem.tokens, call.problem.heads, call.problem.head_dim};
  call.tensors.o = context.GetOutput(0, shape, 4).GetTensorMutableRawData();
  const CpuSparseAttention attention(call.problem, cpu_type(type_), call.tensors, call.tables);
  Work work{&attention};
  context.ParallelFor(run_task, attention.tasks().size(), 0, &work);
  if (work.out_of_memory) throw Ort::Exception("svdit::SparseAttention: out of memory", ORT_FAIL);
}

}  // namespace svdit::ort

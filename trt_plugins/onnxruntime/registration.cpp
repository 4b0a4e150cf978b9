// The one function that ONNX Runtime looks up in a custom-op library.
#include <cstdio>

#include "sparse_attention_op.h"

namespace svdit::ort {
namespace {

constexpr auto kFloat = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
constexpr auto kHalf = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
constexpr auto kBfloat = ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16;

// Never destroyed: sessions keep pointers, and at exit the runtime may be gone before this library.
OrtCustomOpDomain *domain() {
  static Ort::CustomOpDomain *const made = [] {
    auto *domain = new Ort::CustomOpDomain("svdit");
    domain->Add(new SparseAttentionOp<CpuKernel, kFloat>("CPUExecutionProvider"));
    domain->Add(new SparseAttentionOp<CpuKernel, kHalf>("CPUExecutionProvider"));
    domain->Add(new SparseAttentionOp<CpuKernel, kBfloat>("CPUExecutionProvider"));
#ifdef SVDIT_ORT_CUDA
    domain->Add(new SparseAttentionOp<CudaKernel, kHalf>("CUDAExecutionProvider"));
    domain->Add(new SparseAttentionOp<CudaKernel, kBfloat>("CUDAExecutionProvider"));
#endif
    return domain;
  }();
  return *made;
}

}  // namespace
}  // namespace svdit::ort

extern "C" __attribute__((visibility("default"))) OrtStatus *RegisterCustomOps(OrtSessionOptions *options,
                                                                               const OrtApiBase *base) {
  const OrtApi *api = base->GetApi(ORT_API_VERSION);
  if (api == nullptr) {
    char text[256];
    std::snprintf(text, sizeof(text), "svdit: got ONNX Runtime %s; expected 1.%d or newer; rebuild with its headers",
                  base->GetVersionString(), ORT_API_VERSION);
    return base->GetApi(1)->CreateStatus(ORT_FAIL, text);
  }
  Ort::InitApi(api);
  return svdit::ort::guarded([&] {
    Ort::ThrowOnError(api->AddCustomOpDomain(options, svdit::ort::domain()));
  });
}

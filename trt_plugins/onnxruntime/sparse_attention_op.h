// The custom operator: one object for each provider and element type, all of one name.
#pragma once

#include <mutex>

#include "call.h"
#include "ort_api.h"

namespace svdit::ort {

// Float32, float16 or bfloat16 on the CPU provider, in float32 arithmetic.
class CpuKernel {
 public:
  CpuKernel(const OrtKernelInfo *info, ONNXTensorElementDataType type);
  OrtStatus *ComputeV2(OrtKernelContext *context);

 private:
  void compute(const Ort::KernelContext &context);
  void check(const Call &call);

  const Attributes attributes_;
  const ONNXTensorElementDataType type_;
  bool constant_tables_ = true;
  std::mutex mutex_;           // of checked_: a session may run in several threads
  svdit_problem checked_ = {};  // the last problem whose constant tables were found right
};

#ifdef SVDIT_ORT_CUDA
// Float16 or bfloat16 on the CUDA provider: svdit_launch on the provider's stream.
class CudaKernel {
 public:
  CudaKernel(const OrtKernelInfo *info, ONNXTensorElementDataType type);
  OrtStatus *ComputeV2(OrtKernelContext *context);

 private:
  void compute(const Ort::KernelContext &context);

  const Attributes attributes_;
  const svdit_dtype type_;
};
#endif

// An exception becomes a status.
template <typename Body>
OrtStatus *guarded(Body &&body) noexcept {
  try {
    body();
    return nullptr;
  } catch (const Ort::Exception &error) {
    return Ort::GetApi().CreateStatus(error.GetOrtErrorCode(), error.what());
  } catch (const std::exception &error) {
    return Ort::GetApi().CreateStatus(ORT_FAIL, error.what());
  } catch (...) {
    return Ort::GetApi().CreateStatus(ORT_FAIL, "svdit::SparseAttention: got an unknown exception");
  }
}

template <typename Kernel, ONNXTensorElementDataType kType>
struct SparseAttentionOp : Ort::CustomOpBase<SparseAttentionOp<Kernel, kType>, Kernel, true> {
  explicit SparseAttentionOp(const char *provider) : provider_(provider) {
    // NOTE not the wrapper's InferOutputShape: the runtime asks the first object of a name for all of them, so the
    // output's type must come from the input and not from kType.
    OrtCustomOp::InferOutputShapeFn = [](const OrtCustomOp *, OrtShapeInferContext *context) -> OrtStatus * {
      OrtTensorTypeAndShapeInfo *like_q = nullptr;  // belongs to the context
      OrtStatus *status = Ort::GetApi().ShapeInferContext_GetInputTypeShape(context, kQ, &like_q);
      return status ? status : Ort::GetApi().ShapeInferContext_SetOutputTypeShape(context, 0, like_q);
    };
  }

  OrtStatus *CreateKernelV2(const OrtApi &, const OrtKernelInfo *info, void **kernel) const {
    return guarded([&] { *kernel = new Kernel(info, kType); });
  }

  const char *GetName() const { return "SparseAttention"; }
  const char *GetExecutionProviderType() const { return provider_; }
  size_t GetInputTypeCount() const { return kNumInputs; }
  ONNXTensorElementDataType GetInputType(size_t index) const {
    return index <= kV ? kType : ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32;
  }
  size_t GetOutputTypeCount() const { return 1; }
  ONNXTensorElementDataType GetOutputType(size_t) const { return kType; }

 private:
  const char *provider_;
};

}  // namespace svdit::ort

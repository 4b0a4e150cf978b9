// The operator as a TensorRT plugin: glue between IPluginV3 and svdit/launch.h, without any arithmetic of its own.
#pragma once

#include <NvInferRuntime.h>

#include <optional>
#include <string>
#include <vector>

#include "attributes.h"
#include "svdit/problem.h"

namespace svdit::tensorrt {

inline constexpr const char *kPluginName = "SparseAttention";
inline constexpr const char *kPluginVersion = "1";
inline constexpr const char *kPluginNamespace = "";

class SparseAttentionPlugin final : public nvinfer1::IPluginV3,
                                    public nvinfer1::IPluginV3OneCore,
                                    public nvinfer1::IPluginV3OneBuild,
                                    public nvinfer1::IPluginV3OneRuntime {
 public:
  explicit SparseAttentionPlugin(Attributes attributes);

  // IPluginV3
  nvinfer1::IPluginCapability *getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override;
  nvinfer1::IPluginV3 *clone() noexcept override;

  // IPluginV3OneCore
  const char *getPluginName() const noexcept override { return kPluginName; }
  const char *getPluginVersion() const noexcept override { return kPluginVersion; }
  const char *getPluginNamespace() const noexcept override { return kPluginNamespace; }

  // IPluginV3OneBuild
  int32_t getNbOutputs() const noexcept override { return 1; }
  int32_t getOutputDataTypes(nvinfer1::DataType *output_types, int32_t num_outputs,
                             const nvinfer1::DataType *input_types, int32_t num_inputs) const noexcept override;
  int32_t getOutputShapes(const nvinfer1::DimsExprs *inputs, int32_t num_inputs,
                          const nvinfer1::DimsExprs *shape_inputs, int32_t num_shape_inputs,
                          nvinfer1::DimsExprs *outputs, int32_t num_outputs,
                          nvinfer1::IExprBuilder &builder) noexcept override;
  bool supportsFormatCombination(int32_t position, const nvinfer1::DynamicPluginTensorDesc *tensors,
                                 int32_t num_inputs, int32_t num_outputs) noexcept override;
  int32_t configurePlugin(const nvinfer1::DynamicPluginTensorDesc *inputs, int32_t num_inputs,
                          const nvinfer1::DynamicPluginTensorDesc *outputs, int32_t num_outputs) noexcept override;
  size_t getWorkspaceSize(const nvinfer1::DynamicPluginTensorDesc *inputs, int32_t num_inputs,
                          const nvinfer1::DynamicPluginTensorDesc *outputs,
                          int32_t num_outputs) const noexcept override;
  const char *getTimingCacheID() noexcept override { return timing_id_.c_str(); }

  // IPluginV3OneRuntime
  int32_t onShapeChange(const nvinfer1::PluginTensorDesc *inputs, int32_t num_inputs,
                        const nvinfer1::PluginTensorDesc *outputs, int32_t num_outputs) noexcept override;
  int32_t enqueue(const nvinfer1::PluginTensorDesc *input_descs, const nvinfer1::PluginTensorDesc *output_descs,
                  const void *const *inputs, void *const *outputs, void *workspace,
                  cudaStream_t stream) noexcept override;
  nvinfer1::IPluginV3 *attachToContext(nvinfer1::IPluginResourceContext *context) noexcept override;
  const nvinfer1::PluginFieldCollection *getFieldsToSerialize() noexcept override;

 private:
  const Attributes attributes_;
  const std::string timing_id_;
  std::optional<svdit_problem> problem_;  // of the shapes in force; none before the first onShapeChange
  std::vector<nvinfer1::PluginField> fields_;
  nvinfer1::PluginFieldCollection collection_{};
};

class SparseAttentionCreator final : public nvinfer1::IPluginCreatorV3One {
 public:
  nvinfer1::IPluginV3 *createPlugin(const char *name, const nvinfer1::PluginFieldCollection *fields,
                                    nvinfer1::TensorRTPhase phase) noexcept override;
  const nvinfer1::PluginFieldCollection *getFieldNames() noexcept override { return field_names(); }
  const char *getPluginName() const noexcept override { return kPluginName; }
  const char *getPluginVersion() const noexcept override { return kPluginVersion; }
  const char *getPluginNamespace() const noexcept override { return kPluginNamespace; }
};

}  // namespace svdit::tensorrt

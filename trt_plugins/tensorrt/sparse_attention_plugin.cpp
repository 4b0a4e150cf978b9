#include "sparse_attention_plugin.h"

#include <array>
#include <cstdlib>
#include <utility>

#include "call.h"
#include "guard.h"
#include "svdit/launch.h"

namespace svdit::tensorrt {
namespace {

using nvinfer1::DataType;
using nvinfer1::Dims;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::PluginTensorDesc;
using nvinfer1::TensorFormat;

constexpr int32_t kOk = 0;
constexpr int32_t kFailed = -1;
constexpr const char *kVerbose = "SVDIT_TENSORRT_VERBOSE";  // set: one line for every plugin that is created

using AllShapes = std::array<Dims, kNumTensors>;
using AllTypes = std::array<DataType, kNumTensors>;

const PluginTensorDesc &desc_of(const PluginTensorDesc &tensor) { return tensor; }
const PluginTensorDesc &desc_of(const DynamicPluginTensorDesc &tensor) { return tensor.desc; }

void check_pointers(const void *inputs, const void *outputs) {
  if (inputs == nullptr || outputs == nullptr) throw Refusal("tensors: got a null array; expected their descriptions");
}

// One value of every tensor, inputs first.
template <typename Desc, typename Get>
auto gather(const Desc *inputs, const Desc *outputs, Get get) {
  std::array<decltype(get(inputs[0])), kNumTensors> all;
  for (int i = 0; i < kNumInputs; ++i) all[i] = get(inputs[i]);
  all[kO] = get(outputs[0]);
  return all;
}

template <typename Desc>
void check_calls(const Desc *inputs, int32_t num_inputs, const Desc *outputs, int32_t num_outputs) {
  check_counts(num_inputs, num_outputs);
  check_pointers(inputs, outputs);
  const AllTypes types = gather(inputs, outputs, [](const Desc &tensor) { return desc_of(tensor).type; });
  check_types(types.data(), kNumTensors);
}

bool is_data(int position) { return position == kQ || position == kK || position == kV || position == kO; }

}  // namespace

SparseAttentionPlugin::SparseAttentionPlugin(Attributes attributes)
    : attributes_(std::move(attributes)),
      timing_id_(sentence("svdit-%d-%g-%d-%d", int(SVDIT_ABI_VERSION), static_cast<double>(attributes_.scale),
                          attributes_.text_tokens, attributes_.text_first)) {}

nvinfer1::IPluginCapability *SparseAttentionPlugin::getCapabilityInterface(
    nvinfer1::PluginCapabilityType type) noexcept {
  using Capability = nvinfer1::IPluginCapability;
  return guarded("getCapabilityInterface", static_cast<Capability *>(nullptr), [&]() -> Capability * {
    switch (type) {
      case nvinfer1::PluginCapabilityType::kCORE: return static_cast<nvinfer1::IPluginV3OneCore *>(this);
      case nvinfer1::PluginCapabilityType::kBUILD: return static_cast<nvinfer1::IPluginV3OneBuild *>(this);
      case nvinfer1::PluginCapabilityType::kRUNTIME: return static_cast<nvinfer1::IPluginV3OneRuntime *>(this);
    }
    throw Refusal(sentence("type: got %d; expected 0..2", static_cast<int>(type)));
  });
}

nvinfer1::IPluginV3 *SparseAttentionPlugin::clone() noexcept {
  return guarded("clone", static_cast<nvinfer1::IPluginV3 *>(nullptr),
                 [&] { return new SparseAttentionPlugin(attributes_); });
}

int32_t SparseAttentionPlugin::getOutputDataTypes(DataType *output_types, int32_t num_outputs,
                                                  const DataType *input_types, int32_t num_inputs) const noexcept {
  return guarded("getOutputDataTypes", kFailed, [&] {
    check_counts(num_inputs, num_outputs);
    check_pointers(input_types, output_types);
    check_types(input_types, kNumInputs);
    output_types[0] = input_types[kQ];
    return kOk;
  });
}

int32_t SparseAttentionPlugin::getOutputShapes(const nvinfer1::DimsExprs *inputs, int32_t num_inputs,
                                               const nvinfer1::DimsExprs *, int32_t num_shape_inputs,
                                               nvinfer1::DimsExprs *outputs, int32_t num_outputs,
                                               nvinfer1::IExprBuilder &) noexcept {
  return guarded("getOutputShapes", kFailed, [&] {
    check_counts(num_inputs, num_outputs);
    check_pointers(inputs, outputs);
    if (num_shape_inputs != 0) {
      throw Refusal(sentence("shape inputs: got %d; expected none; drop tensorrt_plugin_shape_input_indices",
                             num_shape_inputs));
    }
    std::array<Dims, kNumInputs> shapes;
    for (int i = 0; i < kNumInputs; ++i) {
      shapes[i].nbDims = inputs[i].nbDims;
      for (int axis = 0; axis < inputs[i].nbDims && axis < Dims::MAX_DIMS; ++axis) {
        const nvinfer1::IDimensionExpr *expr = inputs[i].d[axis];
        shapes[i].d[axis] = expr != nullptr && expr->isConstant() ? expr->getConstantValue() : -1;
      }
    }
    check_shapes(attributes_, shapes.data(), kNumInputs);
    outputs[0] = inputs[kQ];
    return kOk;
  });
}

// A question, not a mistake: "no" is not logged. Entries behind position are not filled yet.
bool SparseAttentionPlugin::supportsFormatCombination(int32_t position, const DynamicPluginTensorDesc *tensors,
                                                      int32_t num_inputs, int32_t num_outputs) noexcept {
  return guarded("supportsFormatCombination", false, [&] {
    check_counts(num_inputs, num_outputs);
    check_pointers(tensors, tensors);
    if (position < 0 || position >= kNumTensors) {
      throw Refusal(sentence("position: got %d; expected 0..%d", position, kNumTensors - 1));
    }
    const PluginTensorDesc &tensor = tensors[position].desc;
    if (tensor.format != TensorFormat::kLINEAR) return false;
    if (position == kQ) return tensor.type == DataType::kHALF || tensor.type == DataType::kBF16;
    return tensor.type == (is_data(position) ? tensors[kQ].desc.type : DataType::kINT32);
  });
}

int32_t SparseAttentionPlugin::configurePlugin(const DynamicPluginTensorDesc *inputs, int32_t num_inputs,
                                               const DynamicPluginTensorDesc *outputs, int32_t num_outputs) noexcept {
  return guarded("configurePlugin", kFailed, [&] {
    check_calls(inputs, num_inputs, outputs, num_outputs);
    const AllShapes shapes = gather(inputs, outputs, [](const auto &tensor) { return tensor.desc.dims; });
    check_shapes(attributes_, shapes.data(), kNumTensors);
    const AllShapes largest = gather(inputs, outputs, [](const auto &tensor) { return tensor.max; });
    problem_of(attributes_, inputs[kQ].desc.type, largest.data(), kNumTensors);
    return kOk;
  });
}

size_t SparseAttentionPlugin::getWorkspaceSize(const DynamicPluginTensorDesc *inputs, int32_t num_inputs,
                                               const DynamicPluginTensorDesc *outputs,
                                               int32_t num_outputs) const noexcept {
  return guarded("getWorkspaceSize", size_t{0}, [&] {
    check_calls(inputs, num_inputs, outputs, num_outputs);
    const AllShapes largest = gather(inputs, outputs, [](const auto &tensor) { return tensor.max; });
    const svdit_problem problem = problem_of(attributes_, inputs[kQ].desc.type, largest.data(), kNumTensors);
    return svdit_workspace_size(&problem);
  });
}

int32_t SparseAttentionPlugin::onShapeChange(const PluginTensorDesc *inputs, int32_t num_inputs,
                                             const PluginTensorDesc *outputs, int32_t num_outputs) noexcept {
  return guarded("onShapeChange", kFailed, [&] {
    problem_.reset();
    check_calls(inputs, num_inputs, outputs, num_outputs);
    const AllShapes shapes = gather(inputs, outputs, [](const auto &tensor) { return tensor.dims; });
    problem_ = problem_of(attributes_, inputs[kQ].type, shapes.data(), kNumTensors);
    return kOk;
  });
}

int32_t SparseAttentionPlugin::enqueue(const PluginTensorDesc *, const PluginTensorDesc *, const void *const *inputs,
                                       void *const *outputs, void *workspace, cudaStream_t stream) noexcept {
  return guarded("enqueue", kFailed, [&] {
    if (!problem_) throw Refusal("shapes: got none that fit; expected a successful onShapeChange before enqueue");
    check_pointers(inputs, outputs);
    const auto table = [&](Tensor which) { return static_cast<const int32_t *>(inputs[which]); };
    const svdit_tensors tensors{inputs[kQ], inputs[kK], inputs[kV], outputs[0]};
    const svdit_tables tables{table(kStage),      table(kTextLen),   table(kHeadPattern), table(kTileOffsets),
                              table(kRowOffsets), table(kTileIndex), table(kWorkOrder)};
    char message[512];
    const svdit_status status = svdit_launch(&*problem_, &tensors, &tables, workspace,
                                             svdit_workspace_size(&*problem_), stream, message, sizeof(message));
    if (status != SVDIT_OK) throw Refusal(message);
    return kOk;
  });
}

// An attached plugin is a clone of its own, so contexts share nothing.
nvinfer1::IPluginV3 *SparseAttentionPlugin::attachToContext(nvinfer1::IPluginResourceContext *) noexcept {
  return clone();
}

const nvinfer1::PluginFieldCollection *SparseAttentionPlugin::getFieldsToSerialize() noexcept {
  return guarded("getFieldsToSerialize", static_cast<const nvinfer1::PluginFieldCollection *>(nullptr), [&] {
    fields_ = attributes_.fields();
    collection_ = {static_cast<int32_t>(fields_.size()), fields_.data()};
    return &std::as_const(collection_);
  });
}

nvinfer1::IPluginV3 *SparseAttentionCreator::createPlugin(const char *name,
                                                          const nvinfer1::PluginFieldCollection *fields,
                                                          nvinfer1::TensorRTPhase) noexcept {
  char where[256];
  std::snprintf(where, sizeof(where), "createPlugin(%.200s)", name == nullptr ? "" : name);
  return guarded(where, static_cast<nvinfer1::IPluginV3 *>(nullptr),
                 [&] {
                   const Attributes attributes = attributes_of(fields);
                   if (std::getenv(kVerbose) != nullptr) log_line(where, attributes.text().c_str());
                   return new SparseAttentionPlugin(attributes);
                 });
}

}  // namespace svdit::tensorrt

// One call of the operator as TensorRT would describe it to the plugin: ten inputs, then O.
#pragma once

#include <NvInferRuntime.h>

#include <initializer_list>
#include <vector>

#include "plugin_library.h"

namespace abi_host {

enum Tensor { kQ, kK, kV, kStage, kTextLen, kHeadPattern, kTileOffsets, kRowOffsets, kTileIndex, kWorkOrder, kO };
inline constexpr int kNumInputs = 10;
inline constexpr int kNumTensors = 11;

inline bool is_data(int tensor) { return tensor <= kV || tensor == kO; }

inline nvinfer1::Dims dims(std::initializer_list<int64_t> extent) {
  nvinfer1::Dims out{};
  for (int64_t value : extent) out.d[out.nbDims++] = value;
  return out;
}

struct Call {
  std::vector<nvinfer1::Dims> shapes;
  std::vector<nvinfer1::DataType> types;

  // Two batch elements of the example in docs/op.md, with two stages.
  explicit Call(nvinfer1::DataType type = nvinfer1::DataType::kBF16, int64_t batch = 2)
      : shapes{dims({batch, 144, 4, 64}), dims({batch, 144, 4, 64}), dims({batch, 144, 4, 64}), dims({1}),
               dims({batch}),             dims({2, 4}),              dims({5}),                 dims({4, 5}),
               dims({12}),                dims({2, 16}),             dims({batch, 144, 4, 64})},
        types(kNumTensors, nvinfer1::DataType::kINT32) {
    for (int i = 0; i < kNumTensors; ++i) {
      if (is_data(i)) types[i] = type;
    }
  }

  std::vector<nvinfer1::PluginTensorDesc> descs() const {
    std::vector<nvinfer1::PluginTensorDesc> all;
    for (int i = 0; i < kNumTensors; ++i) {
      all.push_back({shapes[i], types[i], nvinfer1::TensorFormat::kLINEAR, -1.0f});
    }
    return all;
  }
  // With every dimension known, or with an unknown batch between min and max.
  std::vector<nvinfer1::DynamicPluginTensorDesc> dynamic_descs() const { return ranged(*this, *this, shapes); }
  static std::vector<nvinfer1::DynamicPluginTensorDesc> ranged(const Call &min, const Call &max,
                                                               const std::vector<nvinfer1::Dims> &network) {
    std::vector<nvinfer1::DynamicPluginTensorDesc> all(kNumTensors);
    for (int i = 0; i < kNumTensors; ++i) {
      all[i].desc = {network[i], max.types[i], nvinfer1::TensorFormat::kLINEAR, -1.0f};
      all[i].min = min.shapes[i];
      all[i].max = all[i].opt = max.shapes[i];
    }
    return all;
  }
  std::vector<nvinfer1::DimsExprs> exprs(ExprBuilder &builder) const {
    std::vector<nvinfer1::DimsExprs> all(kNumInputs);
    for (int i = 0; i < kNumInputs; ++i) {
      all[i].nbDims = shapes[i].nbDims;
      for (int axis = 0; axis < shapes[i].nbDims; ++axis) all[i].d[axis] = builder.constant(shapes[i].d[axis]);
    }
    return all;
  }
};

// The attributes of the same example.
inline Fields &fill_example(Fields &fields) {
  using Type = nvinfer1::PluginFieldType;
  const char names[] = "full\0skip\0own\0two";
  return fields.set_floats("scale", {0.125f})
      .set_ints("text_tokens", {0})
      .set_ints("text_first", {0})
      .set("patterns", Type::kCHAR, std::vector<char>(names, names + sizeof(names)))
      .set_ints("grid", {4, 6, 6})
      .set_ints("tile", {1, 8, 16});
}

inline PluginPointer example_plugin(const PluginLibrary &library) {
  Fields fields;
  PluginPointer plugin(library.creator().createPlugin("example", fill_example(fields).collection(),
                                                      nvinfer1::TensorRTPhase::kBUILD));
  expect(plugin != nullptr, "createPlugin");
  return plugin;
}

}  // namespace abi_host

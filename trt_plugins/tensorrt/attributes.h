// Attributes of a node: from TensorRT's plugin fields and back. The table of them is in README.md.
#pragma once

#include <NvInferRuntime.h>

#include <array>
#include <cstdint>
#include <string>
#include <vector>

namespace svdit::tensorrt {

struct Attributes {
  float scale = 0.0f;  // no default: every node has it
  int32_t text_tokens = 0;
  int32_t text_first = 0;
  // For people. Empty patterns and zeros mean that the node does not have them.
  std::string patterns;  // names, each with its terminating NUL
  std::array<int32_t, 3> grid{};
  std::array<int32_t, 3> tile{};

  int num_pattern_names() const;
  std::string text() const;  // one line
  // The same attributes as fields; their data is this object's, so it must outlive them.
  std::vector<nvinfer1::PluginField> fields() const;
};

// Copies everything it needs. Throws Refusal for a field with an unknown name, a wrong type, length or value.
Attributes attributes_of(const nvinfer1::PluginFieldCollection *fields);

// Name, type and length of every field, for a creator's getFieldNames.
const nvinfer1::PluginFieldCollection *field_names();

}  // namespace svdit::tensorrt

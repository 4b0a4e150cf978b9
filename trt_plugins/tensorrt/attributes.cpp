#include "attributes.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <iterator>

#include "guard.h"

namespace svdit::tensorrt {
namespace {

using nvinfer1::PluginField;
using nvinfer1::PluginFieldCollection;
using nvinfer1::PluginFieldType;

// Every attribute; length 0 is any length. `plugin_namespace` is not here: TensorRT's parser reads it itself.
const PluginField kFields[] = {
    {"scale", nullptr, PluginFieldType::kFLOAT32, 1},    {"text_tokens", nullptr, PluginFieldType::kINT32, 1},
    {"text_first", nullptr, PluginFieldType::kINT32, 1}, {"patterns", nullptr, PluginFieldType::kCHAR, 0},
    {"grid", nullptr, PluginFieldType::kINT32, 3},       {"tile", nullptr, PluginFieldType::kINT32, 3},
};
constexpr int kNumFields = std::size(kFields);

const char *name_of(PluginFieldType type) {
  switch (type) {
    case PluginFieldType::kFLOAT32: return "float32";
    case PluginFieldType::kINT32: return "int32";
    case PluginFieldType::kCHAR: return "char";
    default: return "another type";
  }
}

void check_field(const PluginField &field, const PluginField &expected) {
  if (field.type != expected.type) {
    throw Refusal(sentence("%s: got field type %d; expected %d (%s); write the attribute as docs/op.md has it",
                           field.name, static_cast<int>(field.type), static_cast<int>(expected.type),
                           name_of(expected.type)));
  }
  if (field.length < 1 || (expected.length > 0 && field.length != expected.length)) {
    throw Refusal(sentence("%s: got %d values; expected %s%d; write the attribute as docs/op.md has it", field.name,
                           field.length, expected.length > 0 ? "" : "at least ", std::max(expected.length, 1)));
  }
  if (field.data == nullptr) {
    throw Refusal(sentence("%s: got no data; expected a pointer to %d values", field.name, field.length));
  }
}

void check_extent(const char *name, const std::array<int32_t, 3> &extent) {
  for (const int32_t value : extent) {
    if (value < 1) {
      throw Refusal(sentence("%s: got %d, %d, %d; expected three positive numbers", name, extent[0], extent[1],
                             extent[2]));
    }
  }
}

void check_values(const Attributes &attributes) {
  if (!std::isfinite(attributes.scale) || attributes.scale <= 0.0f) {
    throw Refusal(sentence("scale: got %g; expected a positive finite number; usually 1/sqrt(head size)",
                           static_cast<double>(attributes.scale)));
  }
  if (attributes.text_tokens < 0) {
    throw Refusal(sentence("text_tokens: got %d; expected 0 or more", attributes.text_tokens));
  }
  if (attributes.text_first != 0 && attributes.text_first != 1) {
    throw Refusal(sentence("text_first: got %d; expected 0 or 1", attributes.text_first));
  }
  if (!attributes.patterns.empty() && attributes.patterns.back() != '\0') {
    throw Refusal("patterns: got characters without a NUL at the end; expected names that each end with one");
  }
}

}  // namespace

int Attributes::num_pattern_names() const {
  return static_cast<int>(std::count(patterns.begin(), patterns.end(), '\0'));
}

std::string Attributes::text() const {
  std::string names = patterns.empty() ? "" : patterns.substr(0, patterns.size() - 1);
  std::replace(names.begin(), names.end(), '\0', ' ');
  return sentence("scale %.9g; text_tokens %d; text_first %d; grid %d %d %d; tile %d %d %d; patterns ",
                  static_cast<double>(scale), text_tokens, text_first, grid[0], grid[1], grid[2], tile[0], tile[1],
                  tile[2]) +
         names;
}

std::vector<PluginField> Attributes::fields() const {
  std::vector<PluginField> all = {
      {"scale", &scale, PluginFieldType::kFLOAT32, 1},
      {"text_tokens", &text_tokens, PluginFieldType::kINT32, 1},
      {"text_first", &text_first, PluginFieldType::kINT32, 1},
  };
  if (!patterns.empty()) {
    all.emplace_back("patterns", patterns.data(), PluginFieldType::kCHAR, static_cast<int32_t>(patterns.size()));
  }
  if (grid[0] > 0) all.emplace_back("grid", grid.data(), PluginFieldType::kINT32, 3);
  if (tile[0] > 0) all.emplace_back("tile", tile.data(), PluginFieldType::kINT32, 3);
  return all;
}

Attributes attributes_of(const PluginFieldCollection *fields) {
  if (fields == nullptr || fields->nbFields < 0 || (fields->nbFields > 0 && fields->fields == nullptr)) {
    throw Refusal("attributes: got no field collection; expected the node's attributes");
  }
  Attributes attributes;
  bool seen[kNumFields] = {};
  for (int i = 0; i < fields->nbFields; ++i) {
    const PluginField &field = fields->fields[i];
    if (field.name == nullptr) throw Refusal("attributes: got a field without a name; expected names of docs/op.md");
    const auto *expected = std::find_if(std::begin(kFields), std::end(kFields), [&](const PluginField &known) {
      return std::strcmp(known.name, field.name) == 0;
    });
    if (expected == std::end(kFields)) {
      throw Refusal(sentence("%.100s: got an attribute of this name; expected scale, text_tokens, text_first, "
                             "patterns, grid or tile",
                             field.name));
    }
    const auto index = expected - std::begin(kFields);
    if (seen[index]) throw Refusal(sentence("%s: got it twice; expected it once", field.name));
    seen[index] = true;
    check_field(field, *expected);
    const auto copy_to = [&](void *target) { std::memcpy(target, field.data, 4 * static_cast<size_t>(field.length)); };
    switch (index) {
      case 0: copy_to(&attributes.scale); break;
      case 1: copy_to(&attributes.text_tokens); break;
      case 2: copy_to(&attributes.text_first); break;
      case 3: attributes.patterns.assign(static_cast<const char *>(field.data), field.length); break;
      case 4: copy_to(attributes.grid.data()), check_extent("grid", attributes.grid); break;
      case 5: copy_to(attributes.tile.data()), check_extent("tile", attributes.tile); break;
    }
  }
  if (!seen[0]) throw Refusal("scale: got no such attribute; expected a positive number; usually 1/sqrt(head size)");
  check_values(attributes);
  return attributes;
}

const PluginFieldCollection *field_names() {
  static const PluginFieldCollection names{kNumFields, kFields};
  return &names;
}

}  // namespace svdit::tensorrt

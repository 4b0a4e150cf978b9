#include "call.h"

#include <climits>
#include <cmath>
#include <cstring>
#include <vector>

namespace svdit::ort {
namespace {

constexpr int64_t kAny = -1;

std::string shape_text(const std::vector<int64_t> &shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) {
    if (i > 0) text += ", ";
    text += shape[i] == kAny ? "any" : std::to_string(shape[i]);
  }
  return text + "]";
}

// The shape of an input after comparing it with `expected`, where kAny fits every size from 1.
std::vector<int64_t> checked_shape(const Ort::ConstValue &value, Input input, const std::vector<int64_t> &expected) {
  const std::vector<int64_t> shape = value.GetTensorTypeAndShapeInfo().GetShape();
  bool fits = shape.size() == expected.size();
  for (size_t i = 0; fits && i < shape.size(); ++i) {
    fits = expected[i] == kAny ? shape[i] >= 1 && shape[i] <= INT32_MAX : shape[i] == expected[i];
  }
  if (!fits) {
    refuse(std::string(kInputNames[input]) + ": got shape " + shape_text(shape) + "; expected " + shape_text(expected) +
           "; see docs/op.md");
  }
  return shape;
}

int64_t integer_attribute(const Ort::ConstKernelInfo &info, const char *name, int64_t absent) {
  int64_t value = 0;
  const Ort::Status status(Ort::GetApi().KernelInfoGetAttribute_int64(info, name, &value));
  if (status.IsOK()) return value;
  const std::string text = status.GetErrorMessage();
  if (text.find("No attribute with name") != std::string::npos) return absent;
  refuse(std::string(name) + ": got an attribute that cannot be read (" + text + "); expected an integer");
}

}  // namespace

void refuse(const std::string &message) {
  throw Ort::Exception("svdit::SparseAttention, " + message, ORT_INVALID_ARGUMENT);
}

Attributes read_attributes(const Ort::ConstKernelInfo &info) {
  Attributes attributes{};
  const Ort::Status status(Ort::GetApi().KernelInfoGetAttribute_float(info, "scale", &attributes.scale));
  if (!status.IsOK()) refuse("scale: got no such attribute of type float; expected one; usually 1/sqrt(head_dim)");
  if (!(attributes.scale > 0.0f) || !std::isfinite(attributes.scale)) {
    refuse("scale: got " + std::to_string(attributes.scale) +
           "; expected a positive finite number; usually 1/sqrt(head_dim)");
  }
  const int64_t text_tokens = integer_attribute(info, "text_tokens", 0);
  if (text_tokens < 0 || text_tokens > INT32_MAX) {
    refuse("text_tokens: got " + std::to_string(text_tokens) + "; expected 0 to the tokens of Q");
  }
  const int64_t text_first = integer_attribute(info, "text_first", 0);
  if (text_first != 0 && text_first != 1) {
    refuse("text_first: got " + std::to_string(text_first) + "; expected 0 or 1");
  }
  attributes.text_tokens = int32_t(text_tokens);
  attributes.text_first = int32_t(text_first);
  return attributes;
}

Call read_call(const Ort::KernelContext &context, const Attributes &attributes) {
  std::array<const void *, kNumInputs> data{};
  std::array<std::vector<int64_t>, kNumInputs> shape;
  const auto read = [&](Input input, const std::vector<int64_t> &expected) {
    const Ort::ConstValue value = context.GetInput(input);
    shape[input] = checked_shape(value, input, expected);
    data[input] = value.GetTensorRawData();
  };
  read(kQ, {kAny, kAny, kAny, kAny});
  read(kK, shape[kQ]);
  read(kV, shape[kQ]);
  read(kStage, {1});
  read(kTextLen, {shape[kQ][0]});
  read(kHeadPattern, {kAny, shape[kQ][2]});
  read(kTileOffsets, {kAny});
  read(kRowOffsets, {kAny, shape[kTileOffsets][0]});
  read(kTileIndex, {kAny});
  read(kWorkOrder, {shape[kHeadPattern][0], kAny});

  Call call;
  std::memset(&call, 0, sizeof(call));  // calls are compared by their bytes
  call.problem.batch = int32_t(shape[kQ][0]);
  call.problem.tokens = int32_t(shape[kQ][1]);
  call.problem.heads = int32_t(shape[kQ][2]);
  call.problem.head_dim = int32_t(shape[kQ][3]);
  call.problem.text_tokens = attributes.text_tokens;
  call.problem.text_first = attributes.text_first;
  call.problem.scale = attributes.scale;
  call.problem.num_tiles = int32_t(shape[kTileOffsets][0] - 1);
  call.problem.num_patterns = int32_t(shape[kRowOffsets][0]);
  call.problem.num_stages = int32_t(shape[kHeadPattern][0]);
  call.problem.num_items = int32_t(shape[kWorkOrder][1]);
  call.problem.num_entries = int32_t(shape[kTileIndex][0]);
  call.tensors = {data[kQ], data[kK], data[kV], nullptr};
  const auto table = [&data](Input input) { return static_cast<const int32_t *>(data[input]); };
  call.tables = {table(kStage),      table(kTextLen),   table(kHeadPattern), table(kTileOffsets),
                 table(kRowOffsets), table(kTileIndex), table(kWorkOrder)};
  return call;
}

}  // namespace svdit::ort

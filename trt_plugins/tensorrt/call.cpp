#include "call.h"

#include <cstring>
#include <limits>

#include "guard.h"

namespace svdit::tensorrt {
namespace {

using nvinfer1::DataType;
using nvinfer1::Dims;

// Letters as in docs/op.md, but T for nT + 1 and L for nnz.
struct TensorInfo {
  const char *name;
  const char *letters;
};
constexpr TensorInfo kTensors[kNumTensors] = {
    {"Q", "BNHD"},          {"K", "BNHD"},          {"V", "BNHD"},      {"stage", "1"},      {"text_len", "B"},
    {"head_pattern", "SH"}, {"tile_offsets", "T"},  {"row_offsets", "PT"}, {"tile_index", "L"}, {"work_order", "SM"},
    {"O", "BNHD"},
};
constexpr int64_t kUnknown = -1;

// What each letter stands for in this call, and the tensor that said so.
class Letters {
 public:
  void bind(const TensorInfo &tensor, int axis, int64_t value) {
    const char letter = tensor.letters[axis];
    if (value == kUnknown) return;
    if (value < 0 || value > std::numeric_limits<int32_t>::max()) {
      throw Refusal(sentence("%s, dimension %d: got %lld; expected 0..2147483647", tensor.name, axis,
                             static_cast<long long>(value)));
    }
    Entry &entry = entries_[static_cast<unsigned char>(letter)];
    if (letter == '1') entry = {1, nullptr};
    if (entry.value == kUnknown) entry = {value, tensor.name};
    if (entry.value == value) return;
    throw Refusal(sentence("%s, dimension %d: got %lld; expected %lld%s%s; shapes are in docs/op.md", tensor.name, axis,
                           static_cast<long long>(value), static_cast<long long>(entry.value),
                           entry.source == nullptr ? "" : " as in ", entry.source == nullptr ? "" : entry.source));
  }
  int64_t operator[](char letter) const { return entries_[static_cast<unsigned char>(letter)].value; }
  bool known(const char *letters) const {
    for (; *letters != '\0'; ++letters) {
      if ((*this)[*letters] == kUnknown) return false;
    }
    return true;
  }

 private:
  struct Entry {
    int64_t value = kUnknown;
    const char *source = nullptr;
  };
  Entry entries_[128];
};

Letters letters_of(const Attributes &attributes, const Dims *shapes, int num) {
  Letters letters;
  for (int i = 0; i < num; ++i) {
    const TensorInfo &tensor = kTensors[i];
    const int rank = static_cast<int>(std::strlen(tensor.letters));
    if (shapes[i].nbDims != rank) {
      throw Refusal(sentence("%s: got %d dimensions; expected %d; shapes are in docs/op.md", tensor.name,
                             static_cast<int>(shapes[i].nbDims), rank));
    }
    for (int axis = 0; axis < rank; ++axis) letters.bind(tensor, axis, shapes[i].d[axis]);
  }
  if (letters.known("HTM") && letters['M'] != letters['H'] * (letters['T'] - 1)) {
    throw Refusal(sentence("work_order, dimension 1: got %lld; expected %lld, heads x tiles",
                           static_cast<long long>(letters['M']),
                           static_cast<long long>(letters['H'] * (letters['T'] - 1))));
  }
  if (letters.known("P") && !attributes.patterns.empty() && attributes.num_pattern_names() != letters['P']) {
    throw Refusal(sentence("patterns: got %d names; expected %lld, the rows of row_offsets",
                           attributes.num_pattern_names(), static_cast<long long>(letters['P'])));
  }
  if (letters.known("N") && attributes.text_tokens > letters['N']) {
    throw Refusal(sentence("text_tokens: got %d; expected 0..%lld, the tokens of Q", attributes.text_tokens,
                           static_cast<long long>(letters['N'])));
  }
  return letters;
}

const char *name_of(DataType type) {
  switch (type) {
    case DataType::kFLOAT: return "float32";
    case DataType::kHALF: return "float16";
    case DataType::kBF16: return "bfloat16";
    case DataType::kINT8: return "int8";
    case DataType::kINT32: return "int32";
    case DataType::kINT64: return "int64";
    case DataType::kBOOL: return "bool";
    default: return "another type";
  }
}

}  // namespace

void check_counts(int num_inputs, int num_outputs) {
  if (num_inputs != kNumInputs || num_outputs != 1) {
    throw Refusal(sentence("tensors: got %d inputs and %d outputs; expected %d and 1; they are listed in docs/op.md",
                           num_inputs, num_outputs, kNumInputs));
  }
}

void check_types(const DataType *types, int num) {
  if (types[kQ] != DataType::kHALF && types[kQ] != DataType::kBF16) {
    throw Refusal(sentence("Q: got %s; expected float16 or bfloat16 in a strongly typed network; export in one of them",
                           name_of(types[kQ])));
  }
  for (int i = kK; i < num; ++i) {
    const DataType expected = i == kK || i == kV || i == kO ? types[kQ] : DataType::kINT32;
    if (types[i] != expected) {
      throw Refusal(sentence("%s: got %s; expected %s; types are in docs/op.md", kTensors[i].name, name_of(types[i]),
                             name_of(expected)));
    }
  }
}

void check_shapes(const Attributes &attributes, const Dims *shapes, int num) { letters_of(attributes, shapes, num); }

svdit_problem problem_of(const Attributes &attributes, DataType type, const Dims *shapes, int num) {
  const Letters letters = letters_of(attributes, shapes, num);
  if (!letters.known("BNHD1STPLM")) throw Refusal("shapes: got one that is not known yet; expected numbers only");
  const auto value = [&](char letter) { return static_cast<int32_t>(letters[letter]); };
  svdit_problem problem{};
  problem.dtype = type == DataType::kHALF ? SVDIT_FLOAT16 : SVDIT_BFLOAT16;
  problem.batch = value('B');
  problem.tokens = value('N');
  problem.heads = value('H');
  problem.head_dim = value('D');
  problem.text_tokens = attributes.text_tokens;
  problem.text_first = attributes.text_first;
  problem.scale = attributes.scale;
  problem.num_tiles = value('T') - 1;
  problem.num_patterns = value('P');
  problem.num_stages = value('S');
  problem.num_items = value('M');
  problem.num_entries = value('L');
  char message[512];
  if (svdit_check_problem(&problem, message, sizeof(message)) != SVDIT_OK) throw Refusal(message);
  return problem;
}

}  // namespace svdit::tensorrt

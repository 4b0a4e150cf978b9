// What the plugin must refuse: each with a failure value and exactly one line on stderr that says what is wrong.
#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <functional>
#include <limits>

#include "call.h"
#include "lifecycle.h"

namespace abi_host {
namespace {

using nvinfer1::DataType;
using nvinfer1::PluginFieldType;
using nvinfer1::TensorRTPhase;

std::string stderr_of(const std::function<void()> &body) {
  std::fflush(stderr);
  FILE *file = std::tmpfile();
  const int kept = dup(2);
  dup2(fileno(file), 2);
  try {
    body();
  } catch (...) {
    dup2(kept, 2);
    throw;
  }
  std::fflush(stderr);
  dup2(kept, 2);
  close(kept);
  std::rewind(file);
  std::string text(4096, '\0');
  text.resize(std::fread(text.data(), 1, text.size(), file));
  std::fclose(file);
  return text;
}

// `refuses` returns whether the plugin said no; the line must come from `where` and contain `words`.
void check(const std::string &where, const std::string &words, const std::function<bool()> &refuses) {
  bool refused = false;
  const std::string text = stderr_of([&] { refused = refuses(); });
  const std::string what = where + ", " + words + "; printed: " + text;
  expect(refused, "not refused: " + what);
  expect(text.rfind("[svdit] SparseAttention, " + where, 0) == 0, "not logged: " + what);
  expect(text.find(words) != std::string::npos, "words missing: " + what);
  expect(text.find('\n') == text.size() - 1, "not one line: " + what);
  std::printf("refused %s", text.c_str());
}

void attributes(const PluginLibrary &library) {
  const auto refuse = [&](const std::string &words, const std::function<void(Fields &)> &spoil) {
    for (const TensorRTPhase phase : {TensorRTPhase::kBUILD, TensorRTPhase::kRUNTIME}) {
      Fields fields;
      spoil(fill_example(fields));
      check("createPlugin(bad)", words, [&] {
        return library.creator().createPlugin("bad", fields.collection(), phase) == nullptr;
      });
    }
  };
  const auto type = [](int code) { return static_cast<PluginFieldType>(code); };
  refuse("scale: got no such attribute", [](Fields &f) { f.remove("scale"); });
  refuse("scale: got field type 5", [](Fields &f) { f.set_ints("scale", {1}); });
  // what TensorRT's parser makes of an int64, bool or uint8 tensor
  refuse("scale: got field type 0", [&](Fields &f) { f.set("scale", type(0), std::vector<int64_t>{1}); });
  refuse("scale: got 2 values; expected 1", [](Fields &f) { f.set_floats("scale", {0.5f, 0.5f}); });
  refuse("scale: got 0 values", [](Fields &f) { f.set_floats("scale", {}); });
  refuse("scale: got -3 values", [](Fields &f) { f.set_floats("scale", {1.0f}).last().length = -3; });
  refuse("scale: got 0;", [](Fields &f) { f.set_floats("scale", {0.0f}); });
  refuse("scale: got -0.125;", [](Fields &f) { f.set_floats("scale", {-0.125f}); });
  refuse("scale: got nan", [](Fields &f) { f.set_floats("scale", {std::nanf("")}); });
  refuse("scale: got inf", [](Fields &f) { f.set_floats("scale", {std::numeric_limits<float>::infinity()}); });
  refuse("scale: got no data", [](Fields &f) { f.set_floats("scale", {1.0f}).last().data = nullptr; });
  refuse("scale: got it twice", [](Fields &f) {
    const float value = 1.0f;
    f.add("scale", PluginFieldType::kFLOAT32, &value, 4, 1);
  });
  refuse("text_tokens: got field type 1", [](Fields &f) { f.set_floats("text_tokens", {3.0f}); });
  refuse("text_tokens: got -1;", [](Fields &f) { f.set_ints("text_tokens", {-1}); });
  refuse("text_tokens: got 3 values", [](Fields &f) { f.set_ints("text_tokens", {1, 2, 3}); });
  refuse("text_first: got 2;", [](Fields &f) { f.set_ints("text_first", {2}); });
  refuse("text_first: got -1;", [](Fields &f) { f.set_ints("text_first", {-1}); });
  refuse("text_first: got field type 1", [](Fields &f) { f.set_floats("text_first", {1.0f}); });
  refuse("patterns: got field type 5", [](Fields &f) { f.set_ints("patterns", {1, 2}); });
  refuse("patterns: got characters without a NUL",
         [](Fields &f) { f.set("patterns", PluginFieldType::kCHAR, std::vector<char>{'f', 'u'}); });
  refuse("patterns: got 0 values; expected at least 1",
         [](Fields &f) { f.set("patterns", PluginFieldType::kCHAR, std::vector<char>{}); });
  refuse("grid: got 2 values; expected 3", [](Fields &f) { f.set_ints("grid", {4, 6}); });
  refuse("grid: got 4, 0, 6", [](Fields &f) { f.set_ints("grid", {4, 0, 6}); });
  refuse("tile: got 1, 8, -16", [](Fields &f) { f.set_ints("tile", {1, 8, -16}); });
  refuse("tile: got field type 1", [](Fields &f) { f.set_floats("tile", {1.0f, 8.0f, 16.0f}); });
  refuse("scales: got an attribute of this name", [](Fields &f) { f.set_floats("scales", {1.0f}); });
  refuse("attributes: got a field without a name",
         [](Fields &f) { f.set_ints("grid", {1, 1, 1}).last().name = nullptr; });
  const nvinfer1::PluginField none;
  const nvinfer1::PluginFieldCollection negative{-1, &none}, missing{2, nullptr};
  for (const auto *collection : {static_cast<const nvinfer1::PluginFieldCollection *>(nullptr), &negative, &missing}) {
    check("createPlugin()", "attributes: got no field collection", [&] {
      return library.creator().createPlugin(nullptr, collection, TensorRTPhase::kBUILD) == nullptr;
    });
  }
  check("getCapabilityInterface", "type: got 9", [&] {
    return example_plugin(library)->getCapabilityInterface(static_cast<nvinfer1::PluginCapabilityType>(9)) == nullptr;
  });
}

void types(const PluginLibrary &library) {
  PluginPointer plugin = example_plugin(library);
  const Faces faces(*plugin);
  const auto output_types = [&](const DataType *types, int inputs, int outputs) {
    DataType output[2]{};
    return faces.build->getOutputDataTypes(output, outputs, types, inputs) != 0;
  };
  const auto refuse = [&](int tensor, DataType type, const std::string &words) {
    Call call;
    call.types[tensor] = type;
    if (tensor < kNumInputs) {
      check("getOutputDataTypes", words, [&] { return output_types(call.types.data(), kNumInputs, 1); });
    }
    const auto descs = call.descs();
    check("onShapeChange", words,
          [&] { return faces.runtime->onShapeChange(descs.data(), kNumInputs, descs.data() + kO, 1) != 0; });
    const auto dynamic = call.dynamic_descs();
    check("configurePlugin", words,
          [&] { return faces.build->configurePlugin(dynamic.data(), kNumInputs, dynamic.data() + kO, 1) != 0; });
  };
  refuse(kQ, DataType::kFLOAT, "Q: got float32; expected float16 or bfloat16");
  refuse(kQ, DataType::kINT8, "Q: got int8");
  refuse(kK, DataType::kHALF, "K: got float16; expected bfloat16");
  refuse(kV, DataType::kFLOAT, "V: got float32; expected bfloat16");
  refuse(kStage, DataType::kINT64, "stage: got int64; expected int32");
  refuse(kTextLen, DataType::kBOOL, "text_len: got bool; expected int32");
  refuse(kWorkOrder, DataType::kFLOAT, "work_order: got float32; expected int32");
  refuse(kO, DataType::kHALF, "O: got float16; expected bfloat16");
  const Call call;
  check("getOutputDataTypes", "got 9 inputs and 1 outputs", [&] { return output_types(call.types.data(), 9, 1); });
  check("getOutputDataTypes", "got 10 inputs and 2 outputs", [&] { return output_types(call.types.data(), 10, 2); });
  check("getOutputDataTypes", "got a null array", [&] { return output_types(nullptr, kNumInputs, 1); });
  const auto dynamic = call.dynamic_descs();
  for (const int position : {-1, 11}) {
    check("supportsFormatCombination", "position: got " + std::to_string(position), [&] {
      return !faces.build->supportsFormatCombination(position, dynamic.data(), kNumInputs, 1);
    });
  }
}

struct BadShape {
  int tensor;
  std::initializer_list<int64_t> shape;
  const char *words;
  bool early = true;  // seen already when shapes are inferred, before sizes are judged
};

void shapes(const PluginLibrary &library) {
  PluginPointer plugin = example_plugin(library);
  const Faces faces(*plugin);
  const BadShape all[] = {
      {kQ, {2, 144, 256}, "Q: got 3 dimensions; expected 4"},
      {kK, {2, 145, 4, 64}, "K, dimension 1: got 145; expected 144 as in Q"},
      {kV, {2, 144, 4, 128}, "V, dimension 3: got 128; expected 64 as in Q"},
      {kStage, {2}, "stage, dimension 0: got 2; expected 1"},
      {kStage, {}, "stage: got 0 dimensions; expected 1"},
      {kTextLen, {3}, "text_len, dimension 0: got 3; expected 2 as in Q"},
      {kHeadPattern, {8}, "head_pattern: got 1 dimensions; expected 2"},
      {kHeadPattern, {2, 5}, "head_pattern, dimension 1: got 5; expected 4 as in Q"},
      {kTileOffsets, {6}, "row_offsets, dimension 1: got 5; expected 6 as in tile_offsets"},
      {kRowOffsets, {4, 4}, "row_offsets, dimension 1: got 4; expected 5 as in tile_offsets"},
      {kRowOffsets, {3, 5}, "patterns: got 4 names; expected 3"},
      {kTileIndex, {12, 1}, "tile_index: got 2 dimensions; expected 1"},
      {kWorkOrder, {3, 16}, "work_order, dimension 0: got 3; expected 2 as in head_pattern"},
      {kWorkOrder, {2, 15}, "work_order, dimension 1: got 15; expected 16, heads x tiles"},
      {kTileIndex, {int64_t{1} << 33}, "tile_index, dimension 0: got 8589934592"},
      {kTileIndex, {0}, "num_entries: got 0", false},
      {kO, {2, 144, 4, 32}, "O, dimension 3: got 32; expected 64 as in Q", false},
  };
  for (const BadShape &bad : all) {
    Call call;
    call.shapes[bad.tensor] = dims(bad.shape);
    if (bad.early) {
      check("getOutputShapes", bad.words, [&] {
        ExprBuilder builder;
        const auto inputs = call.exprs(builder);
        nvinfer1::DimsExprs output{};
        return faces.build->getOutputShapes(inputs.data(), kNumInputs, nullptr, 0, &output, 1, builder) != 0;
      });
    }
    const auto descs = call.descs();
    check("onShapeChange", bad.words,
          [&] { return faces.runtime->onShapeChange(descs.data(), kNumInputs, descs.data() + kO, 1) != 0; });
    const auto dynamic = call.dynamic_descs();
    check("configurePlugin", bad.words,
          [&] { return faces.build->configurePlugin(dynamic.data(), kNumInputs, dynamic.data() + kO, 1) != 0; });
    check("getWorkspaceSize", bad.words,
          [&] { return faces.build->getWorkspaceSize(dynamic.data(), kNumInputs, dynamic.data() + kO, 1) == 0; });
  }
}

void sizes(const PluginLibrary &library) {
  PluginPointer plugin = example_plugin(library);
  const Faces faces(*plugin);
  const auto shape_change = [&](nvinfer1::IPluginV3OneRuntime *runtime, const Call &call) {
    const auto descs = call.descs();
    return runtime->onShapeChange(descs.data(), kNumInputs, descs.data() + kO, 1) != 0;
  };
  Call wide;
  for (const int tensor : {kQ, kK, kV, kO}) wide.shapes[tensor].d[3] = 96;
  check("onShapeChange", "head_dim: got 96; expected 64 or 128", [&] { return shape_change(faces.runtime, wide); });
  check("onShapeChange", "batch: got 0", [&] { return shape_change(faces.runtime, Call(DataType::kBF16, 0)); });
  check("onShapeChange", "shapes: got one that is not known yet",
        [&] { return shape_change(faces.runtime, Call(DataType::kBF16, -1)); });
  Fields fields;
  fill_example(fields).set_ints("text_tokens", {145});
  PluginPointer text(library.creator().createPlugin("text", fields.collection(), TensorRTPhase::kBUILD));
  check("onShapeChange", "text_tokens: got 145; expected 0..144",
        [&] { return shape_change(Faces(*text).runtime, Call()); });
  check("getOutputShapes", "shape inputs: got 1; expected none", [&] {
    ExprBuilder builder;
    const auto inputs = Call().exprs(builder);
    nvinfer1::DimsExprs output{};
    return faces.build->getOutputShapes(inputs.data(), kNumInputs, inputs.data(), 1, &output, 1, builder) != 0;
  });
}

void launches(const PluginLibrary &library) {
  PluginPointer plugin = example_plugin(library);
  nvinfer1::IPluginV3OneRuntime *runtime = Faces(*plugin).runtime;
  const auto descs = Call().descs();
  alignas(16) static char memory[64];  // never read: every launch here is refused before it
  std::vector<const void *> inputs(kNumInputs, memory);
  std::vector<void *> outputs(1, memory);
  void *workspace = memory;
  const auto refused = [&] {
    return runtime->enqueue(descs.data(), descs.data() + kO, inputs.data(), outputs.data(), workspace, nullptr) != 0;
  };
  check("enqueue", "shapes: got none that fit", refused);
  expect(runtime->onShapeChange(descs.data(), kNumInputs, descs.data() + kO, 1) == 0, "onShapeChange");
  inputs[kQ] = nullptr;
  check("enqueue", "q, k, v, o: got a null or misaligned pointer", refused);
  inputs[kQ] = memory + 8;
  check("enqueue", "q, k, v, o: got a null or misaligned pointer", refused);
  inputs[kQ] = memory;
  outputs[0] = nullptr;
  check("enqueue", "q, k, v, o: got a null or misaligned pointer", refused);
  outputs[0] = memory;
  for (int table = kStage; table <= kWorkOrder; ++table) {
    inputs[table] = nullptr;
    check("enqueue", "tables: got a null or misaligned pointer", refused);
    inputs[table] = memory;
  }
  workspace = nullptr;
  check("enqueue", "workspace: got", refused);
  workspace = memory;
  check("enqueue", "got a null array", [&] {
    return runtime->enqueue(descs.data(), descs.data() + kO, nullptr, outputs.data(), workspace, nullptr) != 0;
  });
  if (!has_gpu()) check("enqueue", "device query: got cudaError", refused);
  auto bad = descs;
  bad[kK].dims.d[1] = 7;
  check("onShapeChange", "K, dimension 1",
        [&] { return runtime->onShapeChange(bad.data(), kNumInputs, bad.data() + kO, 1) != 0; });
  check("enqueue", "shapes: got none that fit", refused);  // the shapes before are not in force any more
}

}  // namespace

void run_refusals(const std::string &path) {
  PluginLibrary library(path);
  attributes(library);
  types(library);
  shapes(library);
  sizes(library);
  launches(library);
  std::puts("refusals: passed");
}

}  // namespace abi_host

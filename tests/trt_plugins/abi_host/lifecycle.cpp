// The life of a plugin in TensorRT's order, up to the first launch. Runs without a GPU.
#include "lifecycle.h"

#include <atomic>
#include <cstdio>
#include <thread>

#include "call.h"

namespace abi_host {
namespace {

using nvinfer1::DataType;
using nvinfer1::TensorFormat;

void names(const PluginLibrary &library) {
  nvinfer1::IPluginCreatorV3One &creator = library.creator();
  expect(std::string(creator.getPluginName()) == "SparseAttention", "name");
  expect(std::string(creator.getPluginVersion()) == "1", "version");
  expect(std::string(creator.getPluginNamespace()).empty(), "namespace");
  const nvinfer1::PluginFieldCollection *fields = creator.getFieldNames();
  for (int i = 0; i < fields->nbFields; ++i) {
    std::printf("field %s %d %d\n", fields->fields[i].name, static_cast<int>(fields->fields[i].type),
                fields->fields[i].length);
  }
}

// Tries every type and format at every position; entries behind it hold rubbish. Returns the full combinations.
int count_formats(nvinfer1::IPluginV3OneBuild &build, std::vector<nvinfer1::DynamicPluginTensorDesc> tensors,
                  int position, std::vector<DataType> &accepted) {
  if (position == kNumTensors) {
    accepted.push_back(tensors[kQ].desc.type);
    return 1;
  }
  int found = 0;
  for (int type = 0; type <= 9; ++type) {
    for (const TensorFormat format : {TensorFormat::kLINEAR, TensorFormat::kCHW2, TensorFormat::kHWC8}) {
      for (int later = position; later < kNumTensors; ++later) {
        std::memset(static_cast<void *>(&tensors[later]), 0x7F, sizeof(tensors[later]));
      }
      tensors[position].desc.type = static_cast<DataType>(type);
      tensors[position].desc.format = format;
      if (build.supportsFormatCombination(position, tensors.data(), kNumInputs, 1)) {
        found += count_formats(build, tensors, position + 1, accepted);
      }
    }
  }
  return found;
}

void network(nvinfer1::IPluginV3 &plugin) {
  const Faces faces(plugin);
  expect(std::string(faces.core->getPluginName()) == "SparseAttention", "name of the core capability");
  expect(std::string(faces.core->getPluginVersion()) == "1", "version of the core capability");
  expect(std::string(faces.core->getPluginNamespace()).empty(), "namespace of the core capability");
  expect(faces.build->getNbOutputs() == 1, "one output");
  expect(faces.build->getNbTactics() == 0, "no tactics");
  expect(faces.build->getFormatCombinationLimit() >= 2, "format limit");
  expect(std::string(faces.build->getTimingCacheID()).rfind("svdit-", 0) == 0, "timing cache id");
  for (const DataType type : {DataType::kHALF, DataType::kBF16}) {
    const Call call(type);
    DataType output{};
    expect(faces.build->getOutputDataTypes(&output, 1, call.types.data(), kNumInputs) == 0, "getOutputDataTypes");
    expect(output == type, "type of O");
  }
  for (const int64_t batch : {2, -1}) {
    ExprBuilder builder;
    const auto inputs = Call(DataType::kBF16, batch).exprs(builder);
    nvinfer1::DimsExprs output{};
    expect(faces.build->getOutputShapes(inputs.data(), kNumInputs, nullptr, 0, &output, 1, builder) == 0,
           "getOutputShapes");
    expect(output.nbDims == 4, "rank of O");
    for (int axis = 0; axis < 4; ++axis) expect(output.d[axis] == inputs[kQ].d[axis], "shape of O");
  }
}

void build(nvinfer1::IPluginV3 &plugin) {
  const Faces faces(plugin);
  std::vector<DataType> accepted;
  const std::vector<nvinfer1::DynamicPluginTensorDesc> empty(kNumTensors);
  const int count = count_formats(*faces.build, empty, 0, accepted);
  expect(count == 2 && accepted[0] != accepted[1], "two format combinations");
  for (const DataType type : accepted) {
    expect(type == DataType::kHALF || type == DataType::kBF16, "float16 and bfloat16");
    const Call small(type, 1), large(type, 3), network(type, -1);
    for (const auto &descs : {large.dynamic_descs(), Call::ranged(small, large, network.shapes)}) {
      const auto *outputs = descs.data() + kO;
      expect(faces.build->configurePlugin(descs.data(), kNumInputs, outputs, 1) == 0, "configurePlugin");
      const size_t bytes = faces.build->getWorkspaceSize(descs.data(), kNumInputs, outputs, 1);
      expect(bytes > 0 && bytes % 16 == 0, "workspace size");
    }
  }
}

void shapes(nvinfer1::IPluginV3 &plugin) {
  const Faces faces(plugin);
  for (const int64_t batch : {1, 3, 1}) {
    const auto descs = Call(DataType::kHALF, batch).descs();
    expect(faces.runtime->onShapeChange(descs.data(), kNumInputs, descs.data() + kO, 1) == 0, "onShapeChange");
  }
}

void same_fields(const nvinfer1::PluginFieldCollection &got, const nvinfer1::PluginFieldCollection &expected) {
  expect(got.nbFields == expected.nbFields, "number of fields after deserialisation");
  for (int i = 0; i < got.nbFields; ++i) {
    const nvinfer1::PluginField &a = got.fields[i], &b = expected.fields[i];
    const size_t width = a.type == nvinfer1::PluginFieldType::kCHAR ? 1 : 4;
    expect(std::string(a.name) == b.name && a.type == b.type && a.length == b.length &&
               std::memcmp(a.data, b.data, width * a.length) == 0,
           std::string("field after deserialisation: ") + b.name);
  }
}

// From the parser's plugin to one that a deserialised engine holds; whatever came before is gone.
PluginPointer through_a_plan(const PluginLibrary &library) {
  PluginPointer plugin = example_plugin(library);
  plugin.reset(plugin->clone());
  network(*plugin);
  build(*plugin);
  shapes(*plugin);
  auto stored = std::make_unique<Fields>(*Faces(*plugin).runtime->getFieldsToSerialize());
  plugin.reset(library.creator().createPlugin("restored", stored->collection(), nvinfer1::TensorRTPhase::kRUNTIME));
  expect(plugin != nullptr, "createPlugin(kRUNTIME)");
  stored.reset();
  Fields expected;
  same_fields(*Faces(*plugin).runtime->getFieldsToSerialize(), *fill_example(expected).collection());
  return plugin;
}

void contexts(const PluginLibrary &library) {
  PluginPointer plugin = through_a_plan(library);
  ResourceContext context;
  PluginPointer first(Faces(*plugin).runtime->attachToContext(&context));
  PluginPointer second(Faces(*plugin).runtime->attachToContext(&context));
  expect(first != nullptr && second != nullptr && first != second && first != plugin, "contexts have their own plugin");
  plugin.reset();
  shapes(*first);
  first.reset();
  shapes(*second);
}

void threads(const PluginLibrary &library) {
  std::atomic<int> failures{0};
  std::vector<std::thread> workers;
  for (int i = 0; i < 8; ++i) {
    workers.emplace_back([&] {
      try {
        for (int run = 0; run < 25; ++run) contexts(library);
      } catch (...) {
        ++failures;
      }
    });
  }
  for (std::thread &worker : workers) worker.join();
  expect(failures == 0, "eight threads with plugins of their own");
}

}  // namespace

void run_lifecycle(const std::string &path) {
  for (int load = 0; load < 2; ++load) {  // again after dlclose
    PluginLibrary library(path);
    if (load == 0) names(library);
    contexts(library);
    threads(library);
  }
  std::puts("lifecycle: passed");
}

}  // namespace abi_host

// Golden cases on a GPU: launches with guarded buffers, CUDA graphs that follow `stage`, threads with contexts and graphs
// of their own. Writes O.bin beside each case; judging accuracy is left to tests/trt_plugins/test_tensorrt_plugin.py.
#include <cuda_runtime_api.h>

#include <atomic>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <thread>

#include "call.h"
#include "lifecycle.h"

namespace abi_host {
namespace {

using nvinfer1::DataType;
using Bytes = std::vector<char>;

constexpr int kGuard = 256;  // bytes on either side of what the plugin may write
constexpr const char *kNames[kNumInputs] = {"Q",           "K",           "V",         "stage",
                                            "text_len",    "head_pattern", "tile_offsets", "row_offsets",
                                            "tile_index",  "work_order"};

void cuda(cudaError_t error, const char *what) {
  expect(error == cudaSuccess, std::string(what) + ": " + cudaGetErrorString(error));
}

size_t bytes_of(const nvinfer1::Dims &shape, DataType type) {
  size_t bytes = type == DataType::kINT32 ? 4 : 2;
  for (int i = 0; i < shape.nbDims; ++i) bytes *= static_cast<size_t>(shape.d[i]);
  return bytes;
}

// Device memory between two guards; 0xFF everywhere, so that what is not written reads as NaN. Filled and read on the
// thread's own stream: the default one, or waiting for the device, would break a capture in another thread.
class Buffer {
 public:
  explicit Buffer(size_t size) : size_(size) {
    cuda(cudaMalloc(&memory_, size + 2 * kGuard), "cudaMalloc");
    cuda(cudaMemsetAsync(memory_, 0xFF, size + 2 * kGuard, cudaStreamPerThread), "cudaMemsetAsync");
    wait("cudaMemsetAsync");
  }
  explicit Buffer(const Bytes &content) : Buffer(content.size()) { write(content); }
  ~Buffer() { cudaFree(memory_); }
  Buffer(const Buffer &) = delete;

  void *data() const { return static_cast<char *>(memory_) + kGuard; }
  void write(const Bytes &content) const {
    cuda(cudaMemcpyAsync(data(), content.data(), size_, cudaMemcpyHostToDevice, cudaStreamPerThread), "upload");
    wait("upload");
  }
  Bytes read() const {
    Bytes all(size_ + 2 * kGuard);
    cuda(cudaMemcpyAsync(all.data(), memory_, all.size(), cudaMemcpyDeviceToHost, cudaStreamPerThread), "download");
    wait("download");
    for (int i = 0; i < kGuard; ++i) {
      expect(all[i] == '\xFF' && all[kGuard + size_ + i] == '\xFF', "wrote outside a buffer");
    }
    return Bytes(all.begin() + kGuard, all.end() - kGuard);
  }

 private:
  static void wait(const char *what) { cuda(cudaStreamSynchronize(cudaStreamPerThread), what); }

  size_t size_;
  void *memory_ = nullptr;
};

struct GoldenCase {
  std::filesystem::path folder;
  std::string name;
  Call call;
  Fields fields;
  std::vector<Bytes> inputs;

  explicit GoldenCase(const std::filesystem::path &path) : folder(path) {
    std::ifstream file(folder / "case.txt");
    for (std::string line, key; std::getline(file, line);) {
      std::istringstream words(line);
      words >> key;
      if (key == "name") words >> name;
      if (key == "scale") fields.set_floats("scale", list<float>(words));
      if (key == "text_tokens" || key == "text_first" || key == "grid" || key == "tile") {
        fields.set_ints(key.c_str(), list<int32_t>(words));
      }
      if (key == "patterns") {
        std::vector<char> names;
        for (std::string pattern; words >> pattern;) {
          names.insert(names.end(), pattern.c_str(), pattern.c_str() + pattern.size() + 1);
        }
        fields.set("patterns", nvinfer1::PluginFieldType::kCHAR, names);
      }
      if (key == "dtype") {
        words >> key;
        call = Call(key == "float16" ? DataType::kHALF : DataType::kBF16);
      }
      if (key == "tensor") read_tensor(words);
    }
    expect(!name.empty() && inputs.size() == kNumInputs, "case.txt in " + folder.string());
  }

 private:
  template <typename T>
  static std::vector<T> list(std::istringstream &words) {
    std::vector<T> values;
    for (T value; words >> value;) values.push_back(value);
    return values;
  }
  void read_tensor(std::istringstream &words) {
    const size_t index = inputs.size();
    std::string tensor;
    words >> tensor;
    expect(index < kNumInputs && tensor == kNames[index], "order of tensors in " + folder.string());
    nvinfer1::Dims &shape = call.shapes[index];
    shape.nbDims = 0;
    for (int64_t value; words >> value;) shape.d[shape.nbDims++] = value;
    if (index == kQ) call.shapes[kO] = shape;
    std::ifstream file(folder / (tensor + ".bin"), std::ios::binary);
    inputs.emplace_back(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
    expect(inputs.back().size() == bytes_of(shape, call.types[index]), tensor + ".bin in " + folder.string());
  }
};

PluginPointer runtime_plugin(const PluginLibrary &library, GoldenCase &golden) {
  nvinfer1::IPluginCreatorV3One &creator = library.creator();
  PluginPointer built(creator.createPlugin("golden", golden.fields.collection(), nvinfer1::TensorRTPhase::kBUILD));
  expect(built != nullptr, "createPlugin");
  Fields stored(*Faces(*built).runtime->getFieldsToSerialize());
  PluginPointer restored(creator.createPlugin("golden", stored.collection(), nvinfer1::TensorRTPhase::kRUNTIME));
  expect(restored != nullptr, "createPlugin(kRUNTIME)");
  return restored;
}

// What an execution context holds: an attached plugin, a workspace of exactly the promised size, O and a stream.
class Context {
 public:
  Context(nvinfer1::IPluginV3 &plugin, const GoldenCase &golden, const std::vector<std::unique_ptr<Buffer>> &inputs)
      : descs_(golden.call.descs()), attached_(Faces(plugin).runtime->attachToContext(&context_)) {
    expect(attached_ != nullptr, "attachToContext");
    runtime_ = Faces(*attached_).runtime;
    const auto dynamic = golden.call.dynamic_descs();
    workspace_ = std::make_unique<Buffer>(
        Faces(*attached_).build->getWorkspaceSize(dynamic.data(), kNumInputs, dynamic.data() + kO, 1));
    output_ = std::make_unique<Buffer>(golden.inputs[kQ].size());
    for (const auto &input : inputs) addresses_.push_back(input->data());
    cuda(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "cudaStreamCreate");
    expect(runtime_->onShapeChange(descs_.data(), kNumInputs, descs_.data() + kO, 1) == 0, "onShapeChange");
  }
  ~Context() {
    if (graph_ != nullptr) cudaGraphExecDestroy(graph_);
    cudaStreamDestroy(stream_);
  }
  Context(const Context &) = delete;

  Bytes run() {
    clear();
    enqueue();
    return finish();
  }
  void capture() {
    cudaGraph_t graph = nullptr;
    cuda(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal), "cudaStreamBeginCapture");
    enqueue();
    cuda(cudaStreamEndCapture(stream_, &graph), "cudaStreamEndCapture");
    cuda(cudaGraphInstantiate(&graph_, graph, 0), "cudaGraphInstantiate");
    cuda(cudaGraphDestroy(graph), "cudaGraphDestroy");
  }
  Bytes replay() {
    clear();
    cuda(cudaGraphLaunch(graph_, stream_), "cudaGraphLaunch");
    return finish();
  }

 private:
  void clear() { output_->write(Bytes(bytes_of(descs_[kO].dims, descs_[kO].type), '\xFF')); }
  void enqueue() {
    void *outputs[] = {output_->data()};
    const int32_t status = runtime_->enqueue(descs_.data(), descs_.data() + kO, addresses_.data(), outputs,
                                             workspace_->data(), stream_);
    expect(status == 0, "enqueue");
  }
  Bytes finish() {
    cuda(cudaStreamSynchronize(stream_), "the kernel");
    workspace_->read();
    return output_->read();
  }

  ResourceContext context_;
  std::vector<nvinfer1::PluginTensorDesc> descs_;
  PluginPointer attached_;
  nvinfer1::IPluginV3OneRuntime *runtime_;
  std::unique_ptr<Buffer> workspace_, output_;
  std::vector<const void *> addresses_;
  cudaStream_t stream_ = nullptr;
  cudaGraphExec_t graph_ = nullptr;
};

Bytes stage_bytes(int32_t stage) {
  Bytes bytes(sizeof(stage));
  std::memcpy(bytes.data(), &stage, sizeof(stage));
  return bytes;
}

std::vector<std::unique_ptr<Buffer>> upload(const GoldenCase &golden) {
  std::vector<std::unique_ptr<Buffer>> inputs;
  for (const Bytes &content : golden.inputs) inputs.push_back(std::make_unique<Buffer>(content));
  return inputs;
}

void one_case(const PluginLibrary &library, GoldenCase &golden) {
  PluginPointer plugin = runtime_plugin(library, golden);
  const auto inputs = upload(golden);
  Context context(*plugin, golden, inputs);
  const Bytes output = context.run();
  std::ofstream(golden.folder / "O.bin", std::ios::binary).write(output.data(), static_cast<long>(output.size()));
  context.capture();
  expect(context.replay() == output, golden.name + ": graph replay");
  for (int32_t stage = 0; stage < golden.call.shapes[kHeadPattern].d[0]; ++stage) {
    inputs[kStage]->write(stage_bytes(stage));
    const Bytes replayed = context.replay();
    expect(replayed == context.run(), golden.name + ": graph replay in stage " + std::to_string(stage));
    expect(golden.inputs[kStage] != stage_bytes(stage) || replayed == output, golden.name + ": back to its stage");
  }
  for (const auto &input : inputs) input->read();  // guards
  std::printf("case %s: passed\n", golden.name.c_str());
}

void many_threads(const PluginLibrary &library, GoldenCase &golden) {
  PluginPointer plugin = runtime_plugin(library, golden);
  const auto inputs = upload(golden);
  const Bytes expected = Context(*plugin, golden, inputs).run();
  std::vector<std::unique_ptr<Context>> contexts;
  for (int i = 0; i < 8; ++i) contexts.push_back(std::make_unique<Context>(*plugin, golden, inputs));
  std::atomic<int> failures{0};
  std::vector<std::thread> workers;
  for (const auto &entry : contexts) {
    workers.emplace_back([&, &context = *entry] {
      try {
        context.capture();
        for (int run = 0; run < 100; ++run) {
          expect((run % 2 == 0 ? context.run() : context.replay()) == expected, golden.name + ": one of many threads");
        }
      } catch (const std::exception &error) {
        std::fprintf(stderr, "%s\n", error.what());
        ++failures;
      }
    });
  }
  for (std::thread &worker : workers) worker.join();
  expect(failures == 0, golden.name + ": eight contexts, 100 runs each");
}

}  // namespace

bool has_gpu() {
  int count = 0;
  const bool found = cudaGetDeviceCount(&count) == cudaSuccess && count > 0;
  cudaGetLastError();
  return found;
}

void run_on_gpu(const std::string &path, const std::string &cases) {
  expect(has_gpu(), "no CUDA GPU here");
  PluginLibrary library(path);
  int number = 0;
  for (const auto &entry : std::filesystem::directory_iterator(cases)) {
    GoldenCase golden(entry.path());
    one_case(library, golden);
    ++number;
  }
  expect(number > 0, "no cases in " + cases);
  std::printf("gpu: %d cases passed\n", number);
}

void run_threads(const std::string &path, const std::string &folder) {
  expect(has_gpu(), "no CUDA GPU here");
  PluginLibrary library(path);
  GoldenCase golden(folder);
  many_threads(library, golden);
  std::printf("threads: passed\n");
}

}  // namespace abi_host

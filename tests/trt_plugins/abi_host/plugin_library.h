// The plugin library as TensorRT's registry opens it, and the small things of TensorRT that a plugin is handed.
#pragma once

#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <cstdint>
#include <cstring>
#include <deque>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace abi_host {

inline void expect(bool condition, const std::string &what) {
  if (!condition) throw std::runtime_error("failed: " + what);
}

class PluginLibrary {
 public:
  explicit PluginLibrary(const std::string &path) : handle_(dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL)) {
    if (handle_ == nullptr) throw std::runtime_error(dlerror());
    reinterpret_cast<void (*)(nvinfer1::ILoggerFinder *)>(symbol("setLoggerFinder"))(nullptr);
    int32_t count = -1;
    creators_ = get_creators()(count);
    expect(count == 1 && creators_ != nullptr, "one creator");
    expect(get_creators()(count) == creators_ && count == 1, "the same creators on every call");
    const nvinfer1::InterfaceInfo info = creators_[0]->getInterfaceInfo();
    expect(std::strcmp(info.kind, "PLUGIN CREATOR_V3ONE") == 0 && info.major == 1, "kind of creator");
  }
  ~PluginLibrary() { dlclose(handle_); }
  PluginLibrary(const PluginLibrary &) = delete;

  nvinfer1::IPluginCreatorV3One &creator() const {
    return *static_cast<nvinfer1::IPluginCreatorV3One *>(creators_[0]);
  }

 private:
  using GetCreators = nvinfer1::IPluginCreatorInterface *const *(*)(int32_t &);
  void *symbol(const char *name) const {
    void *found = dlsym(handle_, name);
    expect(found != nullptr, std::string("symbol ") + name);
    return found;
  }
  GetCreators get_creators() const { return reinterpret_cast<GetCreators>(symbol("getCreators")); }

  void *handle_;
  nvinfer1::IPluginCreatorInterface *const *creators_ = nullptr;
};

using PluginPointer = std::unique_ptr<nvinfer1::IPluginV3>;

// The three faces of a plugin; each must be there and be what it says.
struct Faces {
  nvinfer1::IPluginV3OneCore *core;
  nvinfer1::IPluginV3OneBuild *build;
  nvinfer1::IPluginV3OneRuntime *runtime;

  explicit Faces(nvinfer1::IPluginV3 &plugin)
      : core(face<nvinfer1::IPluginV3OneCore>(plugin, nvinfer1::PluginCapabilityType::kCORE, "PLUGIN_V3ONE_CORE")),
        build(face<nvinfer1::IPluginV3OneBuild>(plugin, nvinfer1::PluginCapabilityType::kBUILD, "PLUGIN_V3ONE_BUILD")),
        runtime(face<nvinfer1::IPluginV3OneRuntime>(plugin, nvinfer1::PluginCapabilityType::kRUNTIME,
                                                    "PLUGIN_V3ONE_RUNTIME")) {}

 private:
  template <typename Face>
  static Face *face(nvinfer1::IPluginV3 &plugin, nvinfer1::PluginCapabilityType type, const char *kind) {
    nvinfer1::IPluginCapability *found = plugin.getCapabilityInterface(type);
    expect(found != nullptr && std::strcmp(found->getInterfaceInfo().kind, kind) == 0, kind);
    return static_cast<Face *>(found);
  }
};

// Attributes with data of their own, as TensorRT's ONNX parser and its plan files hand them over.
class Fields {
 public:
  Fields() = default;
  explicit Fields(const nvinfer1::PluginFieldCollection &other) {
    for (int i = 0; i < other.nbFields; ++i) {
      const nvinfer1::PluginField &field = other.fields[i];
      const size_t width = field.type == nvinfer1::PluginFieldType::kCHAR ? 1 : 4;
      add(field.name, field.type, field.data, width * field.length, field.length);
    }
  }
  ~Fields() {  // whoever still reads them later finds rubbish
    for (auto &data : data_) std::memset(data.data(), 0xA5, data.size());
    for (auto &name : names_) name.assign(name.size(), '?');
  }
  Fields(const Fields &) = delete;

  template <typename T>
  Fields &set(const char *name, nvinfer1::PluginFieldType type, const std::vector<T> &values) {
    remove(name);
    return add(name, type, values.data(), sizeof(T) * values.size(), static_cast<int32_t>(values.size()));
  }
  Fields &set_floats(const char *name, const std::vector<float> &values) {
    return set(name, nvinfer1::PluginFieldType::kFLOAT32, values);
  }
  Fields &set_ints(const char *name, const std::vector<int32_t> &values) {
    return set(name, nvinfer1::PluginFieldType::kINT32, values);
  }
  Fields &add(const char *name, nvinfer1::PluginFieldType type, const void *data, size_t bytes, int32_t length) {
    names_.emplace_back(name);
    data_.emplace_back(bytes + 1);
    if (bytes > 0) std::memcpy(data_.back().data(), data, bytes);
    fields_.emplace_back(names_.back().c_str(), data_.back().data(), type, length);
    return *this;
  }
  Fields &remove(const std::string &name) {
    for (size_t i = 0; i < fields_.size(); ++i) {
      if (name == fields_[i].name) fields_.erase(fields_.begin() + static_cast<long>(i--));
    }
    return *this;
  }
  nvinfer1::PluginField &last() { return fields_.back(); }
  const nvinfer1::PluginFieldCollection *collection() {
    collection_ = {static_cast<int32_t>(fields_.size()), fields_.data()};
    return &collection_;
  }

 private:
  std::deque<std::string> names_;
  std::deque<std::vector<char>> data_;
  std::vector<nvinfer1::PluginField> fields_;
  nvinfer1::PluginFieldCollection collection_{};
};

// Dimension expressions of our own. -1 stands for one that is not constant.
class Expr final : public nvinfer1::IDimensionExpr, public nvinfer1::apiv::VDimensionExpr {
 public:
  explicit Expr(int64_t value) : value_(value) { mImpl = this; }
  bool isConstant() const override { return value_ >= 0; }
  int64_t getConstantValue() const override { return value_; }
  bool isSizeTensor() const override { return false; }

 private:
  int64_t value_;
};

class ExprBuilder final : public nvinfer1::IExprBuilder, public nvinfer1::apiv::VExprBuilder {
 public:
  ExprBuilder() { mImpl = this; }
  const nvinfer1::IDimensionExpr *constant(int64_t value) override { return &made_.emplace_back(value); }
  const nvinfer1::IDimensionExpr *operation(nvinfer1::DimensionOperation, const nvinfer1::IDimensionExpr &,
                                            const nvinfer1::IDimensionExpr &) override {
    throw std::runtime_error("failed: the plugin should not need arithmetic on dimensions");
  }
  const nvinfer1::IDimensionExpr *declareSizeTensor(int32_t, const nvinfer1::IDimensionExpr &,
                                                    const nvinfer1::IDimensionExpr &) override {
    throw std::runtime_error("failed: the plugin has no size tensors");
  }

 private:
  std::deque<Expr> made_;
};

class ResourceContext final : public nvinfer1::IPluginResourceContext {
 public:
  nvinfer1::IGpuAllocator *getGpuAllocator() const noexcept override { return nullptr; }
  nvinfer1::IErrorRecorder *getErrorRecorder() const noexcept override { return nullptr; }
};

}  // namespace abi_host

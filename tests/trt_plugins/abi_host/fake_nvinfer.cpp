// What the register library needs of libnvinfer: a version and a registry that remembers who was registered.
// FAKE_NVINFER_VERSION overrides the version.
#include <NvInferRuntime.h>

#include <cstdlib>
#include <string>

namespace {

using namespace nvinfer1;

class Registry final : public IPluginRegistry {
 public:
#if NV_TENSORRT_MAJOR == 10  // the functions that moved all others when they went
  bool registerCreator(IPluginCreator &, AsciiChar const *) noexcept override { return false; }
  IPluginCreator *const *getPluginCreatorList(int32_t *) const noexcept override { return nullptr; }
  IPluginCreator *getPluginCreator(AsciiChar const *, AsciiChar const *, AsciiChar const *) noexcept override {
    return nullptr;
  }
  bool deregisterCreator(IPluginCreator const &) noexcept override { return false; }
#endif
  void setErrorRecorder(IErrorRecorder *) noexcept override {}
  IErrorRecorder *getErrorRecorder() const noexcept override { return nullptr; }
  bool isParentSearchEnabled() const override { return true; }
  void setParentSearchEnabled(bool) override {}
  PluginLibraryHandle loadLibrary(AsciiChar const *) noexcept override { return nullptr; }
  void deregisterLibrary(PluginLibraryHandle) noexcept override {}
  bool registerCreator(IPluginCreatorInterface &creator, AsciiChar const *name_space) noexcept override {
    auto &known = static_cast<IPluginCreatorV3One &>(creator);
    const std::string entry = std::string(known.getInterfaceInfo().kind) + "|" + known.getPluginName() + "|" +
                              known.getPluginVersion() + "|" + name_space + "\n";
    if (registered.find(entry) != std::string::npos) return false;
    registered += entry;
    return true;
  }
  IPluginCreatorInterface *const *getAllCreators(int32_t *) const noexcept override { return nullptr; }
  IPluginCreatorInterface *getCreator(AsciiChar const *, AsciiChar const *, AsciiChar const *) noexcept override {
    return nullptr;
  }
  bool deregisterCreator(IPluginCreatorInterface const &) noexcept override { return false; }
  IPluginResource *acquirePluginResource(AsciiChar const *, IPluginResource *) noexcept override { return nullptr; }
  int32_t releasePluginResource(AsciiChar const *) noexcept override { return 0; }
#if NV_TENSORRT_MAJOR > 10 || NV_TENSORRT_MINOR >= 10
  IPluginCreatorInterface *const *getAllCreatorsRecursive(int32_t *) noexcept override { return nullptr; }
#endif
  std::string registered;
};

Registry registry;

}  // namespace

#define FAKE_EXPORT extern "C" __attribute__((visibility("default")))

FAKE_EXPORT IPluginRegistry *getPluginRegistry() noexcept { return &registry; }

FAKE_EXPORT int32_t getInferLibVersion() noexcept {
  const char *given = std::getenv("FAKE_NVINFER_VERSION");
  return given != nullptr ? std::atoi(given) : NV_TENSORRT_MAJOR * 10000 + NV_TENSORRT_MINOR * 100;
}

FAKE_EXPORT const char *fake_registered() { return registry.registered.c_str(); }

FAKE_EXPORT int32_t fake_major() { return NV_TENSORRT_MAJOR; }

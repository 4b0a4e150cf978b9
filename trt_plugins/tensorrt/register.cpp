// libsvdit_tensorrt_register.so, for tools that only dlopen a plugin library: opening it registers the plugin that lies
// beside it. It holds for one major version of TensorRT, that of the headers, because the registry's functions moved
// between 10 and 11. TensorRT is looked up when the library is opened, not linked: Python wheels keep it out of reach of
// the dynamic linker.
#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <string>

#include "guard.h"

#define SVDIT_TEXT_(x) #x
#define SVDIT_TEXT(x) SVDIT_TEXT_(x)

namespace svdit::tensorrt {
namespace {

constexpr char kTensorRt[] = "libnvinfer.so." SVDIT_TEXT(NV_TENSORRT_MAJOR);
constexpr char kPlugin[] = "libsvdit_tensorrt.so";

template <typename Function>
Function symbol(void *library, const char *file, const char *name) {
  void *found = dlsym(library, name);
  if (found == nullptr) throw Refusal(std::string(file) + ": got no symbol " + name + "; expected one");
  return reinterpret_cast<Function>(found);
}

nvinfer1::IPluginRegistry &registry() {
  void *library = dlopen(kTensorRt, RTLD_NOW | RTLD_NOLOAD);
  if (library == nullptr) library = dlopen(kTensorRt, RTLD_NOW);
  if (library == nullptr) {
    throw Refusal(std::string(kTensorRt) + ": got " + dlerror() +
                  "; expected it loaded or on the library path; import tensorrt first, or use loadLibrary");
  }
  const int version = symbol<int32_t (*)()>(library, kTensorRt, "getInferLibVersion")();
  if (version / 10000 != NV_TENSORRT_MAJOR) {
    throw Refusal(sentence("%s: got version %d; expected %d.x; rebuild with its headers", kTensorRt, version,
                           NV_TENSORRT_MAJOR));
  }
  auto *found = symbol<nvinfer1::IPluginRegistry *(*)()>(library, kTensorRt, "getPluginRegistry")();
  if (found == nullptr) throw Refusal(std::string(kTensorRt) + ": got no plugin registry; expected one");
  return *found;
}

// The plugin in the folder of this file. It stays in memory: the registry keeps pointers into it.
void *open_plugin() {
  Dl_info self;
  if (dladdr(reinterpret_cast<void *>(&open_plugin), &self) == 0) throw Refusal("dladdr: got nothing; expected a path");
  const std::string path = self.dli_fname;
  const std::string file = path.substr(0, path.rfind('/') + 1) + kPlugin;
  void *library = dlopen(file.c_str(), RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE);
  if (library == nullptr) throw Refusal(file + ": got " + dlerror() + "; expected the plugin beside this library");
  return library;
}

bool register_creators() {
  nvinfer1::IPluginRegistry &target = registry();
  using GetCreators = nvinfer1::IPluginCreatorInterface *const *(*)(int32_t &);
  int32_t count = 0;
  auto *creators = symbol<GetCreators>(open_plugin(), kPlugin, "getCreators")(count);
  for (int32_t i = 0; i < count; ++i) {
    if (!target.registerCreator(*creators[i], "")) {
      throw Refusal("registerCreator: got false; expected true; is the plugin registered already?");
    }
  }
  return true;
}

__attribute__((constructor)) void on_open() { guarded("register", false, register_creators); }

}  // namespace
}  // namespace svdit::tensorrt

// What TensorRT looks up in the library: IPluginRegistry::loadLibrary, trtexec --dynamicPlugins, plugins in an engine.
#include "sparse_attention_plugin.h"

#define SVDIT_EXPORT extern "C" __attribute__((visibility("default")))

// Ignored; log_line says why. TensorRT refuses a library without it.
SVDIT_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder *) {}

// The same array on every call: each registry that loads the library asks for it.
SVDIT_EXPORT nvinfer1::IPluginCreatorInterface *const *getCreators(int32_t &num_creators) {
  static svdit::tensorrt::SparseAttentionCreator creator;
  static nvinfer1::IPluginCreatorInterface *const creators[] = {&creator};
  num_creators = 1;
  return creators;
}

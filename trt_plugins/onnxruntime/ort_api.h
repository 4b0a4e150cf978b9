// ONNX Runtime's C++ header, set up for a library that is loaded by whatever runtime asks for it: the table of
// functions comes with RegisterCustomOps, and no symbol of the runtime is linked.
#pragma once

#define ORT_API_MANUAL_INIT
#include "onnxruntime_cxx_api.h"
#undef ORT_API_MANUAL_INIT

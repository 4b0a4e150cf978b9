// One call as TensorRT describes it - types and shapes of all tensors - checked and turned into svdit_problem.
#pragma once

#include <NvInferRuntime.h>

#include <cstdint>

#include "attributes.h"
#include "svdit/problem.h"

namespace svdit::tensorrt {

enum Tensor { kQ, kK, kV, kStage, kTextLen, kHeadPattern, kTileOffsets, kRowOffsets, kTileIndex, kWorkOrder, kO };
inline constexpr int kNumInputs = kO;
inline constexpr int kNumTensors = kO + 1;

// Throws Refusal unless there are ten inputs and one output.
void check_counts(int num_inputs, int num_outputs);

// Throws Refusal unless Q, K and V have one type, float16 or bfloat16, and the rest is int32. Of num tensors.
void check_types(const nvinfer1::DataType *types, int num);

// Throws Refusal where shapes contradict the operator's definition, each other or the attributes. A dimension of -1 is
// not known yet and fits everything. Of num tensors: with O or without it.
void check_shapes(const Attributes &attributes, const nvinfer1::Dims *shapes, int num);

// All dimensions known. Throws Refusal where check_shapes does and for what svdit_check_problem refuses.
svdit_problem problem_of(const Attributes &attributes, nvinfer1::DataType type, const nvinfer1::Dims *shapes, int num);

}  // namespace svdit::tensorrt

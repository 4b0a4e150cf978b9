// From what ONNX Runtime hands to a kernel to the structures of svdit/launch.h, with every check of shapes.
#pragma once

#include <array>
#include <cstdint>
#include <string>

#include "ort_api.h"
#include "svdit/launch.h"

namespace svdit::ort {

// Inputs in the operator's order, docs/op.md.
enum Input : size_t { kQ, kK, kV, kStage, kTextLen, kHeadPattern, kTileOffsets, kRowOffsets, kTileIndex, kWorkOrder };
inline constexpr size_t kNumInputs = 10;
inline constexpr std::array<const char *, kNumInputs> kInputNames = {
    "Q", "K", "V", "stage", "text_len", "head_pattern", "tile_offsets", "row_offsets", "tile_index", "work_order"};

// The attributes that the arithmetic needs; those for people are not read.
struct Attributes {
  float scale;
  int32_t text_tokens;
  int32_t text_first;
};

// Throws Ort::Exception with "subject: got X; expected Y" for an attribute that is missing or out of range.
Attributes read_attributes(const Ort::ConstKernelInfo &info);

// Everything about a call but values. Throws Ort::Exception for shapes that contradict each other.
struct Call {
  svdit_problem problem;  // dtype is left 0
  svdit_tensors tensors;  // o is left null
  svdit_tables tables;
};
Call read_call(const Ort::KernelContext &context, const Attributes &attributes);

[[noreturn]] void refuse(const std::string &message);

}  // namespace svdit::ort

// What one thread of the CPU implementation does, compiled once for each instruction set.
//
// Plain C types only, so that no inline function of a library is compiled for an instruction set
// that the machine may lack and then shared with the rest of the program.
#pragma once

#include <cstddef>
#include <cstdint>

namespace svdit {

enum class CpuType : int32_t { kFloat32 = 0, kFloat16 = 1, kBfloat16 = 2 };

struct CpuRange {
  int32_t begin, end;
};

// Attention of query rows that keep the same keys, in one head of one batch element. The four tensors point at
// token 0 of that head; token i lies i * row_stride elements further.
struct CpuAttend {
  CpuType type;
  const void *q, *k, *v;
  void *o;
  int64_t row_stride;
  int32_t head_dim;
  float scale;
  const int32_t *queries;  // [num_queries] tokens, at most cpu_query_rows(head_dim)
  int32_t num_queries;
  const CpuRange *keys;  // [num_ranges] kept tokens
  int32_t num_ranges;
};

// Query rows of one call: as many as fit the second-level cache beside a block of keys and values.
int32_t cpu_query_rows(int32_t head_dim);

// Bytes of scratch memory of one call, to be aligned to 64.
size_t cpu_scratch_size(int32_t head_dim);

#ifdef SVDIT_CPU_AVX2
void cpu_attend_avx2(const CpuAttend &call, float *scratch);
#endif
void cpu_attend_baseline(const CpuAttend &call, float *scratch);

}  // namespace svdit

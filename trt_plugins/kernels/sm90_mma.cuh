// Raw warpgroup matrix instructions of sm_90a and the operand descriptors they take.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "pack.cuh"

namespace svdit::sm90 {

// Shared-memory operand descriptors, 128-byte swizzle. The high word is constant: 8 rows of 128 bytes
// between core-matrix groups (1024 bytes), swizzle mode 1. The low word holds the address and, for an
// operand whose contiguous axis is M or N, the byte distance between its 64-element columns.
constexpr uint32_t kDescriptorHigh = (1u << 30) | (1024u >> 4);

__device__ __forceinline__ constexpr uint32_t descriptor_low(uint32_t address, uint32_t column_stride) {
  return (address >> 4) | ((column_stride >> 4) << 16);
}

__device__ __forceinline__ uint64_t descriptor(uint32_t low) {
  return (static_cast<uint64_t>(kDescriptorHigh) << 32) | low;
}

__device__ __forceinline__ void mma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void mma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int kPending>
__device__ __forceinline__ void mma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving reads or writes of accumulators across an issue or a wait.
template <int kCount>
__device__ __forceinline__ void hold(float (&registers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}

#define SVDIT_ACC4(a, i) "+f"(a[i]), "+f"(a[i + 1]), "+f"(a[i + 2]), "+f"(a[i + 3])
#define SVDIT_ACC16(a, i) SVDIT_ACC4(a, i), SVDIT_ACC4(a, i + 4), SVDIT_ACC4(a, i + 8), SVDIT_ACC4(a, i + 12)
#define SVDIT_ACC32(a, i) SVDIT_ACC16(a, i), SVDIT_ACC16(a, i + 16)

#define SVDIT_D32                                                                                     \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, "  \
  "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}"
#define SVDIT_D64                                                                                     \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, "  \
  "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, "   \
  "%40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, "   \
  "%59, %60, %61, %62, %63}"

// acc[64 x 128] (+)= A[64 x 16] B[128 x 16]^T, both in shared memory, K contiguous.
template <typename T, bool kAccumulate>
__device__ __forceinline__ void mma_ss_n128(float (&acc)[64], uint64_t a, uint64_t b) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    asm volatile("{.reg .pred p; setp.ne.b32 p, %66, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 " SVDIT_D64
                 ", %64, %65, p, 1, 1, 0, 0;}\n"
                 : SVDIT_ACC32(acc, 0), SVDIT_ACC32(acc, 32)
                 : "l"(a), "l"(b), "n"(int(kAccumulate)));
  } else {
    asm volatile("{.reg .pred p; setp.ne.b32 p, %66, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 " SVDIT_D64
                 ", %64, %65, p, 1, 1, 0, 0;}\n"
                 : SVDIT_ACC32(acc, 0), SVDIT_ACC32(acc, 32)
                 : "l"(a), "l"(b), "n"(int(kAccumulate)));
  }
}

// acc[64 x N] += A[64 x 16] B[16 x N], A in registers, B in shared memory, N contiguous.
template <typename T>
__device__ __forceinline__ void mma_rs(float (&acc)[64], const uint32_t *a, uint64_t b) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 " SVDIT_D64
                 ", {%64, %65, %66, %67}, %68, 1, 1, 1, 1;\n"
                 : SVDIT_ACC32(acc, 0), SVDIT_ACC32(acc, 32)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
  } else {
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 " SVDIT_D64
                 ", {%64, %65, %66, %67}, %68, 1, 1, 1, 1;\n"
                 : SVDIT_ACC32(acc, 0), SVDIT_ACC32(acc, 32)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
  }
}

template <typename T>
__device__ __forceinline__ void mma_rs(float (&acc)[32], const uint32_t *a, uint64_t b) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " SVDIT_D32
                 ", {%32, %33, %34, %35}, %36, 1, 1, 1, 1;\n"
                 : SVDIT_ACC32(acc, 0)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
  } else {
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 " SVDIT_D32
                 ", {%32, %33, %34, %35}, %36, 1, 1, 1, 1;\n"
                 : SVDIT_ACC32(acc, 0)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
  }
}

// Four 8 x 8 matrices of 16-bit numbers to shared memory; lane i gives the row address i % 8 of matrix i / 8.
__device__ __forceinline__ void store_matrices(uint32_t address, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a), "r"(b),
               "r"(c), "r"(d)
               : "memory");
}

template <int kRegisters>
__device__ __forceinline__ void grow_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void shrink_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

}  // namespace svdit::sm90

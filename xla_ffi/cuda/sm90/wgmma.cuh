// Copyright 2026 The mla-jax Authors
// SPDX-License-Identifier: Apache-2.0
//
// Warpgroup matrix products (wgmma) and the shared-memory descriptors they read through.
//
// All operands in shared memory are "pieces": 64 rows of 64 16-bit elements (128 bytes), in TMA's
// 128-byte swizzle, aligned to 1024 bytes. The same bytes serve twice: as K, with the elements of a
// row along the contracted dimension, and as V, with the rows along it.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "ptx.cuh"

namespace mla::wgmma {

inline constexpr int kPieceBytes = 64 * 128;

// Descriptor fields are in units of 16 bytes: address, leading and stride offset; 1 << 62 says
// "128-byte swizzle".
__device__ __forceinline__ uint64_t descriptor(const void* piece, uint32_t leading,
                                               uint32_t stride) {
  return static_cast<uint64_t>((ptx::smem_address(piece) & 0x3FFFF) >> 4) |
         static_cast<uint64_t>(leading >> 4) << 16 | static_cast<uint64_t>(stride >> 4) << 32 |
         1ull << 62;
}

// A piece whose rows are the M or N side. Rows come in groups of 8, 1024 bytes apart; one swizzled
// row holds the whole contracted extent, so the leading offset is unused.
__device__ __forceinline__ uint64_t row_major_descriptor(const void* piece) {
  return descriptor(piece, 16, 1024);
}
// Steps of 16 along the contracted dimension: 32 bytes further inside the swizzled row.
inline constexpr int kRowMajorStep = 32 >> 4;

// Pieces side by side whose columns are the N side: the next 64 columns lie one piece further, the
// next 8 contracted rows 1024 bytes further.
__device__ __forceinline__ uint64_t column_major_descriptor(const void* piece) {
  return descriptor(piece, kPieceBytes, 1024);
}
// Steps of 16 along the contracted dimension: two groups of 8 rows.
inline constexpr int kColumnMajorStep = 2048 >> 4;

__device__ __forceinline__ void fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Waits until at most `kPending` of this warpgroup's committed groups are unfinished.
template <int kPending>
__device__ __forceinline__ void wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving uses of registers across this point: it does not know that the
// tensor cores write accumulators until the wait.
template <int kCount>
__device__ __forceinline__ void pin(float (&registers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}

// wgmma names its accumulators one by one: 8 of a 64 x 16 product, 32 of a 64 x 64 one, 128 of a
// 64 x 256 one.
#define MLA_REGISTERS_8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define MLA_REGISTERS_32                                            \
  MLA_REGISTERS_8                                                   \
  ", "                                                              \
  "%8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, " \
  "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define MLA_REGISTERS_128                                                  \
  MLA_REGISTERS_32                                                         \
  ", "                                                                     \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, " \
  "%46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, " \
  "%60, %61, %62, %63, %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, " \
  "%74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, %87, " \
  "%88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, "     \
  "%101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "     \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, "     \
  "%123, %124, %125, %126, %127"
#define MLA_ACCUMULATORS_8(i)                                                                 \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define MLA_ACCUMULATORS_32(i)                                                  \
  MLA_ACCUMULATORS_8(i), MLA_ACCUMULATORS_8(i + 8), MLA_ACCUMULATORS_8(i + 16), \
      MLA_ACCUMULATORS_8(i + 24)
#define MLA_ACCUMULATORS_128 \
  MLA_ACCUMULATORS_32(0), MLA_ACCUMULATORS_32(32), MLA_ACCUMULATORS_32(64), MLA_ACCUMULATORS_32(96)

// The products of one element type:
//   rows_64x64      d[64 x 64] (+)= A[64 x 16] B[64 x 16]^T, A row-major in shared memory or in
//                   registers, B row-major in shared memory
//   rows_64x16      d[64 x 16] (+)= A[64 x 16] B[16 x 16]^T, both row-major in shared memory
//   columns_64x256  d[64 x 256] += A[64 x 16] B[16 x 256], A row-major in shared memory or in
//                   registers, B column-major in shared memory
//   warp_16x8       d[16 x 8] += A[16 x 16] B[16 x 8], of one warp and at once, all in registers
template <typename T>
struct Mma;

#define MLA_DEFINE_MMA(T, T2, to_pair, type)                                                       \
  template <>                                                                                      \
  struct Mma<T> {                                                                                  \
    __device__ __forceinline__ static uint32_t pack(float low, float high) {                       \
      T2 v = to_pair(low, high);                                                                   \
      return reinterpret_cast<uint32_t&>(v);                                                       \
    }                                                                                              \
    __device__ __forceinline__ static void rows_64x64(float (&d)[32], uint64_t a, uint64_t b,      \
                                                      bool accumulate) {                           \
      asm volatile(                                                                                \
          "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"                                             \
          "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " {" MLA_REGISTERS_32        \
          "}, %32, %33, p, 1, 1, 0, 0;\n}\n"                                                       \
          : MLA_ACCUMULATORS_32(0)                                                                 \
          : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));                                    \
    }                                                                                              \
    __device__ __forceinline__ static void rows_64x64(float (&d)[32], const uint32_t (&a)[4],      \
                                                      uint64_t b, bool accumulate) {               \
      asm volatile(                                                                                \
          "{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"                                             \
          "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " {" MLA_REGISTERS_32        \
          "}, {%32, %33, %34, %35}, %36, p, 1, 1, 0;\n}\n"                                         \
          : MLA_ACCUMULATORS_32(0)                                                                 \
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b),                                    \
            "r"(static_cast<int>(accumulate)));                                                    \
    }                                                                                              \
    __device__ __forceinline__ static void rows_64x16(float (&d)[8], uint64_t a, uint64_t b,       \
                                                      bool accumulate) {                           \
      asm volatile(                                                                                \
          "{\n.reg .pred p;\nsetp.ne.b32 p, %10, 0;\n"                                             \
          "wgmma.mma_async.sync.aligned.m64n16k16.f32." type "." type " {" MLA_REGISTERS_8         \
          "}, %8, %9, p, 1, 1, 0, 0;\n}\n"                                                         \
          : MLA_ACCUMULATORS_8(0)                                                                  \
          : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));                                    \
    }                                                                                              \
    __device__ __forceinline__ static void columns_64x256(float (&d)[128], uint64_t a,             \
                                                          uint64_t b) {                            \
      asm volatile("wgmma.mma_async.sync.aligned.m64n256k16.f32." type "." type                    \
                   " {" MLA_REGISTERS_128 "}, %128, %129, 1, 1, 1, 0, 1;\n"                        \
                   : MLA_ACCUMULATORS_128                                                          \
                   : "l"(a), "l"(b));                                                              \
    }                                                                                              \
    __device__ __forceinline__ static void columns_64x256(float (&d)[128], const uint32_t (&a)[4], \
                                                          uint64_t b) {                            \
      asm volatile("wgmma.mma_async.sync.aligned.m64n256k16.f32." type "." type                    \
                   " {" MLA_REGISTERS_128 "}, {%128, %129, %130, %131}, %132, 1, 1, 1, 1;\n"       \
                   : MLA_ACCUMULATORS_128                                                          \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                          \
    }                                                                                              \
    __device__ __forceinline__ static void warp_16x8(float* d, const uint32_t (&a)[4],             \
                                                     uint32_t b0, uint32_t b1) {                   \
      asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                          \
                   ".f32"                                                                          \
                   " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"            \
                   : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                \
    }                                                                                              \
  }

MLA_DEFINE_MMA(__nv_bfloat16, __nv_bfloat162, __floats2bfloat162_rn, "bf16");
MLA_DEFINE_MMA(__half, __half2, __floats2half2_rn, "f16");

#undef MLA_REGISTERS_8
#undef MLA_REGISTERS_32
#undef MLA_REGISTERS_128
#undef MLA_ACCUMULATORS_8
#undef MLA_ACCUMULATORS_32
#undef MLA_ACCUMULATORS_128
#undef MLA_DEFINE_MMA

}  // namespace mla::wgmma

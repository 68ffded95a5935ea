// Copyright 2026 The mla-jax Authors
// SPDX-License-Identifier: Apache-2.0
//
// What products of one row with a matrix are made of: loads, 16-bit pairs, sums among lanes.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace mla::layer {

// ---- Loads ----

// Eight weights. They are read once: they leave L2 first, and L1 keeps none. L2 fetches whole lines
// of 128 bytes, whose other parts other threads are about to ask for.
__device__ __forceinline__ uint4 load_weights(const void* p) {
  // The encoding of a policy that createpolicy would make: evict_first for all.
  constexpr uint64_t kEvictFirst = 0x12F0000000000000;
  uint4 v;
  asm volatile(
      "ld.global.nc.L1::no_allocate.L2::cache_hint.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
      : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
      : "l"(p), "l"(kEvictFirst));
  return v;
}

// What a kernel before this one wrote: by way of L2.
__device__ __forceinline__ uint2 load_2(const void* p) {
  return __ldcg(static_cast<const uint2*>(p));
}
__device__ __forceinline__ float4 load_4(const float* p) {
  return __ldcg(reinterpret_cast<const float4*>(p));
}

// ---- Pairs of 16-bit elements; wgmma::Mma packs them ----

template <typename T>
__device__ __forceinline__ float2 unpack_2(uint32_t v);
template <>
__device__ __forceinline__ float2 unpack_2<__nv_bfloat16>(uint32_t v) {
  return {__uint_as_float(v << 16), __uint_as_float(v & 0xFFFF0000u)};
}
template <>
__device__ __forceinline__ float2 unpack_2<__half>(uint32_t v) {
  return __half22float2(reinterpret_cast<const __half2&>(v));
}

// Four elements in two words.
template <typename T>
__device__ __forceinline__ float4 unpack_4(uint2 v) {
  const float2 a = unpack_2<T>(v.x), b = unpack_2<T>(v.y);
  return {a.x, a.y, b.x, b.y};
}

// ---- Products and sums ----

// sums += weights * x, of eight columns.
template <typename T>
__device__ __forceinline__ void multiply_add(float (&sums)[8], uint4 weights, float x) {
  const uint32_t words[4] = {weights.x, weights.y, weights.z, weights.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 w = unpack_2<T>(words[i]);
    sums[2 * i] = fmaf(w.x, x, sums[2 * i]);
    sums[2 * i + 1] = fmaf(w.y, x, sums[2 * i + 1]);
  }
}

// The sum of weights * x over eight rows.
template <typename T>
__device__ __forceinline__ float dot(uint4 weights, float4 first, float4 last) {
  const float2 a = unpack_2<T>(weights.x), b = unpack_2<T>(weights.y);
  const float2 c = unpack_2<T>(weights.z), d = unpack_2<T>(weights.w);
  const float even = fmaf(d.x, last.z, fmaf(c.x, last.x, fmaf(b.x, first.z, a.x * first.x)));
  const float odd = fmaf(d.y, last.w, fmaf(c.y, last.y, fmaf(b.y, first.w, a.y * first.y)));
  return even + odd;
}

// Adds up kCount values of the two lanes that differ in the bit `mask`: the lane without it gets
// the first half, in v[0] to v[kCount / 2 - 1], the other one the second.
template <int kCount, int kSize>
__device__ __forceinline__ void fold(float (&v)[kSize], int mask) {
  const bool up = threadIdx.x & mask;
#pragma unroll
  for (int i = 0; i < kCount / 2; ++i) {
    const float keep = up ? v[i + kCount / 2] : v[i], send = up ? v[i] : v[i + kCount / 2];
    v[i] = keep + __shfl_xor_sync(~0u, send, mask);
  }
}
// After fold<8> by mask and fold<4>, fold<2> by half and a quarter of it: which of 8 a lane has.
__device__ __forceinline__ int folded_index(int mask) {
  const int lane = threadIdx.x;
  return (lane & mask ? 4 : 0) + (lane & mask / 2 ? 2 : 0) + (lane & mask / 4 ? 1 : 0);
}

__device__ __forceinline__ float add_lanes(float v, int mask) {
  return v + __shfl_xor_sync(~0u, v, mask);
}

__device__ __forceinline__ float warp_total(float v) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) v = add_lanes(v, mask);
  return v;
}
__device__ __forceinline__ float warp_top(float v) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) v = fmaxf(v, __shfl_xor_sync(~0u, v, mask));
  return v;
}

// p[0] + p[stride] + .., not as one long chain.
template <int kCount>
__device__ __forceinline__ float strided_sum(const float* p, int stride) {
  float sums[4] = {};
#pragma unroll
  for (int i = 0; i < kCount; ++i) sums[i % 4] += p[i * stride];
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

}  // namespace mla::layer

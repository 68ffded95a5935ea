// Copyright 2026 The mla-jax Authors
// SPDX-License-Identifier: Apache-2.0
//
// What tiles of all kinds share of the online softmax and of fragments.

#pragma once

#include <cstdint>

#include "../ptx.cuh"
#include "../wgmma.cuh"

namespace mla {

inline constexpr float kNegativeInfinity = -__builtin_huge_valf();

// One number for each of a thread's rows. Maxima are in units of log2: exp2(score * scale - max).
template <int kRows>
struct PerRow {
  float v[kRows];
};
using RowPair = PerRow<2>;

__device__ __forceinline__ float quad_max(float v) {
  v = fmaxf(v, __shfl_xor_sync(0xFFFFFFFFu, v, 1));
  return fmaxf(v, __shfl_xor_sync(0xFFFFFFFFu, v, 2));
}

__device__ __forceinline__ float quad_sum(float v) {
  v += __shfl_xor_sync(0xFFFFFFFFu, v, 1);
  return v + __shfl_xor_sync(0xFFFFFFFFu, v, 2);
}

// Swaps `high` of the lane whose bit is clear with `low` of the lane whose bit is set.
__device__ __forceinline__ void exchange(uint32_t& low, uint32_t& high, int bit) {
  const bool set = threadIdx.x & bit;
  const uint32_t received = __shfl_xor_sync(0xFFFFFFFFu, set ? low : high, bit);
  (set ? low : high) = received;
}

// A quad holds 4 groups of 8 columns of a row, 2 columns of each per lane, packed; transposed, each
// lane holds one whole group.
__device__ __forceinline__ void transpose_quad(uint32_t (&v)[4]) {
  exchange(v[0], v[1], 1);
  exchange(v[2], v[3], 1);
  exchange(v[0], v[2], 2);
  exchange(v[1], v[3], 2);
}

// What sums relative to the old maximum are multiplied by. While nothing has been seen they are
// zeros, and better left alone.
__device__ __forceinline__ float rescale_factor(float old, float fresh) {
  return old == kNegativeInfinity ? 1.f : ptx::exp2_approx(old - fresh);
}

// The reference that exp2 subtracts follows the true maximum only when that has outgrown it by
// 2^8: the result does not depend on it, the weights stay representable, and the accumulators are
// left alone for most blocks.
inline constexpr float kMaxSlack = 8.f;

// A row's new reference, given the largest score of a block.
__device__ __forceinline__ float raise(float max, float top, float scale) {
  return top * scale > max + kMaxSlack ? top * scale : max;
}

// Multiplies the two rows of a fragment of output; skipped by a warp that has nothing to do.
template <int kCount>
__device__ __forceinline__ void rescale(float (&output)[kCount], const RowPair& factor) {
  if (__any_sync(0xFFFFFFFFu, factor.v[0] != 1.f || factor.v[1] != 1.f)) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) output[i] *= factor.v[i / 2 % 2];
  }
}

}  // namespace mla

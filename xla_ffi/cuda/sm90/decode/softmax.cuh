// Copyright 2026 The mla-jax Authors
// SPDX-License-Identifier: Apache-2.0
//
// Online softmax on a 64 x 64 tile of scores in a warpgroup's registers.
//
// Fragment layout of wgmma: thread (warp w, lane l) holds rows 16w + l/4 and that + 8. Of row 0 it
// has scores[4i] and scores[4i + 1], of row 1 scores[4i + 2] and scores[4i + 3], at columns
// 8i + 2(l % 4) and the next one. The four lanes of a quad share two rows.

#pragma once

#include <cstdint>

#include "../ptx.cuh"
#include "../wgmma.cuh"

namespace mla {

inline constexpr float kNegativeInfinity = -__builtin_huge_valf();

// Maxima, in units of log2: exp2(score * scale - max).
struct RowPair {
  float v[2];
};

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

// Hides the columns at or past limit.v[row]. `column` is the token of this lane's first score.
__device__ __forceinline__ void mask_scores(float (&scores)[32], int column,
                                            const int (&limit)[2]) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (column + 8 * i + (e & 1) >= limit[e / 2]) scores[4 * i + e] = kNegativeInfinity;
    }
  }
}

// The reference that exp2 subtracts follows the true maximum only when that has outgrown it by
// 2^8: the result does not depend on it, the weights stay representable, and the accumulators are
// left alone for most blocks.
inline constexpr float kMaxSlack = 8.f;

// The largest score of each row.
__device__ __forceinline__ RowPair row_tops(const float (&scores)[32]) {
  RowPair tops;
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    float top = kNegativeInfinity;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      top = fmaxf(top, fmaxf(scores[4 * i + 2 * row], scores[4 * i + 2 * row + 1]));
    }
    tops.v[row] = quad_max(top);
  }
  return tops;
}

// Turns scores into weights, packed to 16 bits as wgmma's A fragments, and updates the maxima and
// this lane's share of the row sums of the weights.
template <typename T>
__device__ __forceinline__ void softmax_block(float (&scores)[32], const RowPair& tops, float scale,
                                              RowPair& max, RowPair& sum, RowPair& factor,
                                              uint32_t (&weights)[4][4]) {
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    const float top = tops.v[row] * scale;
    const float fresh = top > max.v[row] + kMaxSlack ? top : max.v[row];
    factor.v[row] = rescale_factor(max.v[row], fresh);
    max.v[row] = fresh;
    const float reference = fresh == kNegativeInfinity ? 0.f : fresh;
    float total = 0.f;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
#pragma unroll
      for (int e = 2 * row; e < 2 * row + 2; ++e) {
        scores[4 * i + e] = ptx::exp2_approx(fmaf(scores[4 * i + e], scale, -reference));
        total += scores[4 * i + e];
      }
    }
    sum.v[row] = sum.v[row] * factor.v[row] + total;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    weights[i / 2][2 * (i % 2)] = wgmma::Mma<T>::pack(scores[4 * i], scores[4 * i + 1]);
    weights[i / 2][2 * (i % 2) + 1] = wgmma::Mma<T>::pack(scores[4 * i + 2], scores[4 * i + 3]);
  }
}

// Writes the weights as a row-major swizzled piece (64 rows x 64 tokens).
__device__ __forceinline__ void store_weights(uint8_t* piece, const uint32_t (&weights)[4][4]) {
  const int warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
  const int row = 16 * warp + lane % 16;
  const uint32_t address = ptx::smem_address(piece) + row * 128;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int unit = 2 * i + lane / 16;  // of 16 bytes within the row
    ptx::store_matrix_x4(address + ((unit ^ (row % 8)) << 4), weights[i]);
  }
}

// Multiplies the accumulators' rows; skipped by a warp that has nothing to do.
template <int kCount>
__device__ __forceinline__ void rescale(float (&output)[kCount], const RowPair& factor) {
  if (__any_sync(0xFFFFFFFFu, factor.v[0] != 1.f || factor.v[1] != 1.f)) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) output[i] *= factor.v[i / 2 % 2];
  }
}

}  // namespace mla

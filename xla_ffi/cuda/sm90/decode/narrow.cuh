// Copyright 2026 The mla-jax Authors
// SPDX-License-Identifier: Apache-2.0
//
// A tile of up to 16 query rows in a warpgroup.
//
// wgmma's M side is 64 wide, of which such a tile would fill a quarter. So the scores' operands are
// swapped, tokens on that side and rows on the N side, which may be 16: softmax takes a quarter of
// a wide tile's instructions. Swapping those of the output would gain no time, since wgmma reads no
// more of its left operand than 64 bytes a cycle from shared memory; so warps multiply by mma.sync,
// whose M side is 16, each with 64 columns and operands that it loads at twice that rate.
//
//   scores^T [64 tokens, 16 rows] = K Q^T          thread (warp w, lane l): tokens 16w + l/4 and
//                                                  that + 8, e = 0, 1, of rows 8j + 2(l % 4) + c,
//                                                  c = 0, 1: scores 4j + 2e + c
//   output [16 rows, 64 columns] += weights V      rows l/4 and that + 8, e = 0, 1, at columns
//                                                  64w + 8i + 2(l % 4) + c: outputs 4i + 2e + c

#pragma once

#include "layout.cuh"
#include "softmax.cuh"

namespace mla {

template <typename T>
struct NarrowTile {
  using Element = T;
  using Mma = wgmma::Mma<T>;
  static constexpr int kScores = 8, kOutputs = 32, kRows = 4;  // of one thread; rows of scores
  static constexpr int kQueryStride = kNarrowRows;
  static constexpr bool kHalfPartials = false;
  static constexpr bool kMeetsTwice = true;
  // `max` and `sum` are of the rows of scores, the others of the output's.
  struct State {
    PerRow<kRows> max = {kNegativeInfinity, kNegativeInfinity, kNegativeInfinity,
                         kNegativeInfinity};
    PerRow<kRows> sum = {0.f, 0.f, 0.f, 0.f};
    RowPair output_max = {kNegativeInfinity, kNegativeInfinity}, factor;
  };

  // A thread's first row of scores, and its k-th one.
  __device__ __forceinline__ static int first_row() { return 2 * (threadIdx.x % 4); }
  __device__ __forceinline__ static int row(int first, int k) { return first + k % 2 + k / 2 * 8; }

  // ---- Products ----

  static constexpr bool kHoldsQueries = false;
  struct HeldQueries {};  // the scores' right operand must be in shared memory

  __device__ __forceinline__ static void multiply_scores(float (&scores)[kScores], uint64_t queries,
                                                         uint64_t keys, bool accumulate) {
    Mma::rows_64x16(scores, keys, queries, accumulate);
  }

  // output += weights V over one block, with either warpgroup's weights; done when it returns.
  template <int kBuffer, int kHalf>
  __device__ __forceinline__ static void start_output(Shared& shared, float (&output)[kOutputs]) {
    const int lane = threadIdx.x % 32, row = lane % 16, swizzle = row % 8;
    const uint32_t weights = weights_address(shared, kBuffer) + row * 128;
    const uint32_t values =
        ptx::smem_address(shared.cache[kBuffer][4 * kHalf + threadIdx.x % 128 / 32]) + row * 128;
    // Not unrolled: what runs once waits for its code.
#pragma unroll 1
    for (int k = 0; k < 4; ++k) {  // 16 tokens
      uint32_t a[4];
      ptx::load_matrix_x4(a, weights + (((2 * k + lane / 16) ^ swizzle) << 4));
#pragma unroll
      for (int i = 0; i < 8; i += 2) {  // 8 columns
        uint32_t b[4];
        ptx::load_transposed_x4(b, values + k * 2048 + (((i + lane / 16) ^ swizzle) << 4));
        Mma::warp_16x8(output + 4 * i, a, b[0], b[1]);
        Mma::warp_16x8(output + 4 * i + 4, a, b[2], b[3]);
      }
    }
  }

  struct Weights {};  // in shared memory alone
  template <int kBuffer>
  __device__ __forceinline__ static void start_own_output(Shared& shared, const Weights&,
                                                          float (&output)[kOutputs]) {
    start_output<kBuffer, kBuffer>(shared, output);
  }

  __device__ __forceinline__ static void finish_output(float (&)[kOutputs]) {}

  // ---- Softmax ----

  __device__ __forceinline__ static void hide(float (&scores)[kScores], int token,
                                              const int (&limit)[kRows]) {
    const int first = token + threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
#pragma unroll
    for (int i = 0; i < kScores; ++i) {
      if (first + i / 2 % 2 * 8 >= limit[i / 4 * 2 + i % 2]) scores[i] = kNegativeInfinity;
    }
  }

  // The largest score of each row among each warp's tokens, in shared memory: [row, warp]. Read by
  // weigh(), after a barrier; the next but one block's take the same place.
  using Tops = const float4*;
  template <int kBuffer>
  __device__ __forceinline__ static Tops find_tops(Shared& shared, uint32_t parity,
                                                   const float (&scores)[kScores]) {
    float4* tops = shared.tops[kBuffer][parity];
#pragma unroll
    for (int k = 0; k < kRows; ++k) {
      const int i = k / 2 * 4 + k % 2;
      write_own(tops, k, over_quads(fmaxf(scores[i], scores[i + 2]), fmaxf));
    }
    return tops;
  }

  // Softmax of the block in the buffer; publishes weights, [row, token], and maxima.
  template <int kBuffer>
  __device__ __forceinline__ static void weigh(Shared& shared, int first, float (&scores)[kScores],
                                               Tops tops, float scale, State& state, Weights&) {
    // All warps' tops are there. The odd warpgroup has met when it followed.
    if constexpr (kBuffer == 0) ptx::named_barrier_sync(kWarpgroup, 128);
#pragma unroll
    for (int k = 0; k < kRows; ++k) {
      const float4 of_warps = tops[row(first, k)];
      const float top = fmaxf(fmaxf(of_warps.x, of_warps.y), fmaxf(of_warps.z, of_warps.w));
      const float fresh = raise(state.max.v[k], top, scale);
      const float factor = rescale_factor(state.max.v[k], fresh);
      state.max.v[k] = fresh;
      const float reference = fresh == kNegativeInfinity ? 0.f : fresh;
      float& a = scores[k / 2 * 4 + k % 2];
      float& b = scores[k / 2 * 4 + k % 2 + 2];
      a = ptx::exp2_approx(fmaf(a, scale, -reference));
      b = ptx::exp2_approx(fmaf(b, scale, -reference));
      state.sum.v[k] = state.sum.v[k] * factor + (a + b);
    }
    uint32_t weights[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) weights[i] = Mma::pack(scores[2 * i], scores[2 * i + 1]);
    const int warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
    const int at = lane % 8 + lane / 16 * 8;   // the row whose address this lane gives
    const int unit = 2 * warp + lane / 8 % 2;  // of 8 tokens
    ptx::store_transposed_x4(weights_address(shared, kBuffer) + at * 128 + ((unit ^ (at % 8)) << 4),
                             weights);
    if (threadIdx.x % 128 < 32) write_rows(shared.max[kBuffer], state.max);
    ptx::named_barrier_arrive(kBuffer == 0 ? kEvenWeightsReady : kOddWeightsReady,
                              kConsumerThreads);
    // This warpgroup's products, too, need the weights of all its warps.
    ptx::named_barrier_sync(kWarpgroup + kBuffer, 128);
    follow_output<kBuffer>(shared, state);
  }

  template <int kBuffer>
  __device__ __forceinline__ static void follow(Shared& shared, int first, State& state) {
    follow_output<kBuffer>(shared, state);
#pragma unroll
    for (int k = 0; k < kRows; ++k) {
      const float fresh = shared.max[kBuffer][row(first, k)];
      state.sum.v[k] *= rescale_factor(state.max.v[k], fresh);
      state.max.v[k] = fresh;
    }
  }

  // ---- Results ----

  static constexpr int kGroups = 8;
  __device__ __forceinline__ static int result_row() { return threadIdx.x % 32 / 4; }
  __device__ __forceinline__ static int first_column() { return threadIdx.x % 128 / 32 * 64; }
  __device__ __forceinline__ static const RowPair& result_max(const State& state) {
    return state.output_max;
  }
  __device__ __forceinline__ static bool writes(int) { return true; }
  __device__ __forceinline__ static bool has_first_columns() { return threadIdx.x % 128 < 32; }

  // [row, warp], one after the other for both warpgroups.
  __device__ __forceinline__ static void share_sums(float4 (&sums)[2][kNarrowRows], int half,
                                                    const State& state) {
#pragma unroll
    for (int k = 0; k < kRows; ++k) {
      const auto add = [](float a, float b) { return a + b; };
      write_own(sums[half], k, over_quads(state.sum.v[k], add));
    }
  }
  __device__ __forceinline__ static RowPair add_sums(const float4 (&sums)[2][kNarrowRows]) {
    RowPair sum;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const float4 a = sums[0][result_row() + 8 * e], b = sums[1][result_row() + 8 * e];
      sum.v[e] = ((a.x + a.y) + (a.z + a.w)) + ((b.x + b.y) + (b.z + b.w));
    }
    return sum;
  }

 private:
  // Weights of a buffer's block, 16 rows x 64 tokens: behind the queries' pieces, where no copy
  // comes, so that no fence must order one after what was written here.
  __device__ __forceinline__ static uint32_t weights_address(Shared& shared, int buffer) {
    return ptx::smem_address(shared.query[0]) + (kMaxPieces + buffer) * kNarrowRows * 128;
  }

  // Joins what the eight quads of a warp have; all get it.
  template <typename Join>
  __device__ __forceinline__ static float over_quads(float v, Join&& join) {
#pragma unroll
    for (int d = 4; d < 32; d *= 2) v = join(v, __shfl_xor_sync(0xFFFFFFFFu, v, d));
    return v;
  }

  // Writes what this warp has of a thread's k-th row, on which its quads agree; [row, warp].
  __device__ __forceinline__ static void write_own(float4* dst, int k, float v) {
    if (threadIdx.x % 32 >= 4) return;
    reinterpret_cast<float*>(dst + row(first_row(), k))[threadIdx.x % 128 / 32] = v;
  }

  // Writes a number for each row of scores, which a warp's quads agree on.
  __device__ __forceinline__ static void write_rows(float* dst, const PerRow<kRows>& x) {
    if (threadIdx.x % 32 >= 4) return;
    auto* pairs = reinterpret_cast<float2*>(dst);
    pairs[threadIdx.x % 4] = make_float2(x.v[0], x.v[1]);
    pairs[threadIdx.x % 4 + 4] = make_float2(x.v[2], x.v[3]);
  }

  // Brings the output's rows to the maxima that have been published.
  template <int kBuffer>
  __device__ __forceinline__ static void follow_output(Shared& shared, State& state) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const float fresh = shared.max[kBuffer][result_row() + 8 * e];
      state.factor.v[e] = rescale_factor(state.output_max.v[e], fresh);
      state.output_max.v[e] = fresh;
    }
  }
};

}  // namespace mla

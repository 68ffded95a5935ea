// Copyright 2026 The mla-jax Authors
// SPDX-License-Identifier: Apache-2.0
//
// A tile of 64 query rows in a warpgroup: rows are the M side of all products.
//
// Fragment layout of wgmma: thread (warp w, lane l) holds rows 16w + l/4 and that + 8. Of row 0 it
// has accumulators 4i and 4i + 1, of row 1 4i + 2 and 4i + 3, at columns 8i + 2(l % 4) and the next
// one. The four lanes of a quad share two rows.

#pragma once

#include "layout.cuh"
#include "softmax.cuh"

namespace mla {

template <typename T>
struct WideTile {
  using Element = T;
  using Mma = wgmma::Mma<T>;
  // Of one thread: of a 64 x 64 tile of scores, of the output's 64 x 256, and rows.
  static constexpr int kScores = 32, kOutputs = 128, kRows = 2;
  static constexpr int kQueryStride = kTileRows;  // rows from one piece of queries to the next
  static constexpr bool kHalfPartials = true;     // partial results may be fp16
  static constexpr bool kMeetsTwice = false;      // a warpgroup, to weigh a block
  // Running maxima and sums of a thread's rows, and what the output's rows are multiplied by next.
  struct State {
    RowPair max = {kNegativeInfinity, kNegativeInfinity}, sum = {0.f, 0.f}, factor;
  };

  // A thread's first row, and its k-th one.
  __device__ __forceinline__ static int first_row() {
    return 16 * (threadIdx.x % 128 / 32) + threadIdx.x % 32 / 4;
  }
  __device__ __forceinline__ static int row(int first, int k) { return first + 8 * k; }

  // A row-major swizzled piece (64 rows x 64 columns) as wgmma's A fragments, 16 columns each, and
  // where this lane's row of one begins, for ldmatrix and stmatrix.
  using Fragments = uint32_t[4][4];
  __device__ __forceinline__ static uint32_t fragment_address(const uint8_t* piece, int i) {
    const int warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
    const int row = 16 * warp + lane % 16, unit = 2 * i + lane / 16;  // of 16 bytes within the row
    return ptx::smem_address(piece) + row * 128 + ((unit ^ (row % 8)) << 4);
  }

  // ---- Products ----

  // The queries' last piece stays in registers during an item: shared memory, which all operands
  // pass through, moves 3% less for it. There are none for a second piece.
  static constexpr bool kHoldsQueries = true;
  using HeldQueries = Fragments;
  __device__ __forceinline__ static void hold_queries(const uint8_t* piece, HeldQueries& held) {
#pragma unroll
    for (int i = 0; i < 4; ++i) ptx::load_matrix_x4(held[i], fragment_address(piece, i));
  }

  // scores (+)= Q K^T over 16 columns; operands are descriptors, or queries held as fragments.
  template <typename Queries>
  __device__ __forceinline__ static void multiply_scores(float (&scores)[kScores],
                                                         const Queries& queries, uint64_t keys,
                                                         bool accumulate) {
    Mma::rows_64x64(scores, queries, keys, accumulate);
  }

  // Starts output += weights V over one block, with the other warpgroup's weights, in shared
  // memory.
  template <int kBuffer, int kHalf>
  __device__ __forceinline__ static void start_output(Shared& shared, float (&output)[kOutputs]) {
    const uint64_t weights = wgmma::row_major_descriptor(shared.cache[kBuffer][kWeightsPiece]);
    start_products<kBuffer, kHalf>(shared, output, [&](int k, uint64_t values) {
      Mma::columns_64x256(output, weights + k * wgmma::kRowMajorStep, values);
    });
  }

  // The same with this warpgroup's own weights, in registers.
  using Weights = Fragments;
  template <int kBuffer>
  __device__ __forceinline__ static void start_own_output(Shared& shared, const Weights& weights,
                                                          float (&output)[kOutputs]) {
    start_products<kBuffer, kBuffer>(shared, output, [&](int k, uint64_t values) {
      Mma::columns_64x256(output, weights[k], values);
    });
  }

  __device__ __forceinline__ static void finish_output(float (&output)[kOutputs]) {
    wgmma::wait<0>();
    wgmma::pin(output);
  }

  // ---- Softmax ----

  // Hides what rows do not see of the block that begins at `token`.
  __device__ __forceinline__ static void hide(float (&scores)[kScores], int token,
                                              const int (&limit)[kRows]) {
    const int column = token + 2 * (threadIdx.x % 4);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (column + 8 * i + (e & 1) >= limit[e / 2]) scores[4 * i + e] = kNegativeInfinity;
      }
    }
  }

  // The largest score of each row.
  using Tops = RowPair;
  template <int kBuffer>
  __device__ __forceinline__ static Tops find_tops(Shared&, uint32_t,
                                                   const float (&scores)[kScores]) {
    Tops tops;
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

  // Turns scores into weights, packed to 16 bits as wgmma's A fragments; updates the maxima and
  // this lane's share of the row sums of the weights.
  __device__ __forceinline__ static void softmax(float (&scores)[kScores], const Tops& tops,
                                                 float scale, State& state, Weights& weights) {
    auto& [max, sum, factor] = state;
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const float fresh = raise(max.v[row], tops.v[row], scale);
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
      weights[i / 2][2 * (i % 2)] = Mma::pack(scores[4 * i], scores[4 * i + 1]);
      weights[i / 2][2 * (i % 2) + 1] = Mma::pack(scores[4 * i + 2], scores[4 * i + 3]);
    }
  }

  // Softmax of the block in the buffer; publishes weights and maxima.
  template <int kBuffer>
  __device__ __forceinline__ static void weigh(Shared& shared, int first, float (&scores)[kScores],
                                               const Tops& tops, float scale, State& state,
                                               Weights& weights) {
    softmax(scores, tops, scale, state, weights);
    // The weights overwrite K's RoPE piece: all four warps must be done with the scores. The odd
    // warpgroup has met in follow().
    if constexpr (kBuffer == 0) ptx::named_barrier_sync(kWarpgroup, 128);
    store_weights(shared.cache[kBuffer][kWeightsPiece], weights);
    if (threadIdx.x % 4 == 0) {
      shared.max[kBuffer][first] = state.max.v[0];
      shared.max[kBuffer][first + 8] = state.max.v[1];
    }
    ptx::fence_proxy_async();
    ptx::named_barrier_arrive(kBuffer == 0 ? kEvenWeightsReady : kOddWeightsReady,
                              kConsumerThreads);
  }

  __device__ __forceinline__ static void store_weights(uint8_t* piece, const Weights& weights) {
#pragma unroll
    for (int i = 0; i < 4; ++i) ptx::store_matrix_x4(fragment_address(piece, i), weights[i]);
  }

  // Follows the other warpgroup's maxima, once it has published them.
  template <int kBuffer>
  __device__ __forceinline__ static void follow(Shared& shared, int first, State& state) {
#pragma unroll
    for (int k = 0; k < kRows; ++k) {
      const float fresh = shared.max[kBuffer][row(first, k)];
      state.factor.v[k] = rescale_factor(state.max.v[k], fresh);
      state.max.v[k] = fresh;
      state.sum.v[k] *= state.factor.v[k];
    }
  }

  // ---- Results: two rows of a thread, 8 apart, and of each 8 columns a pair ----

  static constexpr int kGroups = 32;  // of 8 columns
  __device__ __forceinline__ static int result_row() { return first_row(); }
  __device__ __forceinline__ static int first_column() { return 0; }
  __device__ __forceinline__ static const RowPair& result_max(const State& state) {
    return state.max;
  }
  // Whether this thread's warp writes any of a tile of so many rows; whether it has the first
  // columns of its rows.
  __device__ __forceinline__ static bool writes(int rows) {
    return threadIdx.x % 128 / 32 * 16 < rows;
  }
  __device__ __forceinline__ static bool has_first_columns() { return true; }

  // A warpgroup's share of the row sums, and both shares added.
  __device__ __forceinline__ static void share_sums(float4 (&sums)[2][kTileRows / 4], int half,
                                                    const State& state) {
    float* own = &sums[half][0].x;
#pragma unroll
    for (int k = 0; k < kRows; ++k) {
      const float v = quad_sum(state.sum.v[k]);
      if (threadIdx.x % 4 == 0) own[row(first_row(), k)] = v;
    }
  }
  __device__ __forceinline__ static RowPair add_sums(const float4 (&sums)[2][kTileRows / 4]) {
    const float *even = &sums[0][0].x, *odd = &sums[1][0].x;
    RowPair sum;
#pragma unroll
    for (int k = 0; k < kRows; ++k) {
      sum.v[k] = even[row(first_row(), k)] + odd[row(first_row(), k)];
    }
    return sum;
  }

 private:
  // Starts multiply(k, values) for each 16 tokens k, whose values the descriptor tells.
  template <int kBuffer, int kHalf, typename Multiply>
  __device__ __forceinline__ static void start_products(Shared& shared, float (&output)[kOutputs],
                                                        Multiply&& multiply) {
    const uint64_t values = wgmma::column_major_descriptor(shared.cache[kBuffer][4 * kHalf]);
    wgmma::pin(output);
    wgmma::fence();
#pragma unroll
    for (int k = 0; k < 4; ++k) multiply(k, values + k * wgmma::kColumnMajorStep);
    wgmma::commit();
  }
};

}  // namespace mla

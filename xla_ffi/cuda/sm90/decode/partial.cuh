// Copyright 2026 The mla-jax Authors
// SPDX-License-Identifier: Apache-2.0
//
// Partial results of split sequences, as they lie in the workspace.
//
// The unnormalised output is kept as the registers hold it, in chunks of 16 bytes a lane: [16 rows,
// chunk, lane], chunks from left to right. As float where tiles are low: there is little to move,
// and a conversion takes longer. As fp16 where they are high, each row scaled by a power of two
// that brings its largest element near the top of fp16's range: the error is 2^-12 of an element.
// The scale needs no place of its own: it moves from the values to the row's maximum and sum.

#pragma once

#include "layout.cuh"
#include "softmax.cuh"

namespace mla {

// Whether the partial results of a tile of `rows` rows are fp16: of fixed pieces, which all have a
// place of their own, those of all wide tiles.
template <typename Tile, bool kFixed>
__device__ __forceinline__ bool is_half(int rows) {
  return Tile::kHalfPartials && (kFixed || rows > 32);
}

// A part holds at most two pieces of split sequences: the end of one begun before it (slot 0) and
// the beginning of one that goes on after it (slot 1).
__device__ __forceinline__ int partial_slot(int cta, bool holds_first_block) {
  return 2 * cta + holds_first_block;
}

// A fixed piece's.
__device__ __forceinline__ int fixed_slot(const DecodeArgs& args, const Place& place, int seq,
                                          int piece) {
  return (seq * args.fixed_pieces + piece) * place.groups + place.group;
}

// Chunks hold pairs of neighbouring columns; pair k is of the thread's row k % 2 and lies 8 (k / 2)
// columns from the first.
template <typename Partial>
struct PartialFormat;

template <>
struct PartialFormat<float> {
  static constexpr int kPairs = 2;  // of a chunk
  template <int kOutputs>
  __device__ __forceinline__ static int exponent(const float (&)[kOutputs], int) {
    return 0;
  }
  __device__ __forceinline__ static uint4 pack(const float* v, const float (&)[2]) {
    return make_uint4(__float_as_uint(v[0]), __float_as_uint(v[1]), __float_as_uint(v[2]),
                      __float_as_uint(v[3]));
  }
  __device__ __forceinline__ static float2 unpack(const uint32_t (&chunk)[4], int pair) {
    return {__uint_as_float(chunk[2 * pair]), __uint_as_float(chunk[2 * pair + 1])};
  }
};

template <>
struct PartialFormat<__half> {
  static constexpr int kPairs = 4;
  // The exponent of a row's scale. Its bound keeps a piece of zeros comparable with others.
  __device__ __forceinline__ static int exponent(const float (&output)[128], int row) {
    float tops[4] = {};  // not one long chain
#pragma unroll
    for (int i = 0; i < 32; ++i) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        float& top = tops[2 * (i % 2) + j];
        top = fmaxf(top, fabsf(output[4 * i + 2 * row + j]));
      }
    }
    const float top = quad_max(fmaxf(fmaxf(tops[0], tops[1]), fmaxf(tops[2], tops[3])));
    return max((__float_as_int(top) >> 23) - 141, -75);  // top < 2^(exponent + 15)
  }
  __device__ __forceinline__ static uint4 pack(const float* v, const float (&scale)[2]) {
    uint32_t packed[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      packed[k] = wgmma::Mma<__half>::pack(v[2 * k] * scale[k % 2], v[2 * k + 1] * scale[k % 2]);
    }
    return make_uint4(packed[0], packed[1], packed[2], packed[3]);
  }
  __device__ __forceinline__ static float2 unpack(const uint32_t (&chunk)[4], int pair) {
    return __half22float2(reinterpret_cast<const __half2&>(chunk[pair]));
  }
};

// 2^exponent, for -126 <= exponent <= 127.
__device__ __forceinline__ float power_of_two(int exponent) {
  return __int_as_float((127 + exponent) << 23);
}

// Chunks of one thread's share of a warpgroup's output.
template <typename Partial>
inline constexpr int kChunks = 64 / PartialFormat<Partial>::kPairs;
// log2 of the chunks of a warp's 16 rows, both halves'.
template <typename Partial>
inline constexpr int kRowGroupShift = PartialFormat<Partial>::kPairs == 4 ? 5 : 6;

// Where partial results lie.
__device__ __forceinline__ uint4* partial_chunks(const DecodeArgs& args, int slot) {
  return args.partial_out + slot * args.slot_chunks;
}
// (max in log2 units, sum) of a row, in the scale of one half of its values.
__device__ __forceinline__ float2* partial_stats(const DecodeArgs& args, int slot, int half,
                                                 int row) {
  return args.partial_stats + (2 * slot + half) * kTileRows + row;
}

// Warps that tell of a partial result of `rows` rows, of both halves.
__device__ __forceinline__ int partial_tellers(int rows) { return 2 * ((rows + 15) / 16); }

// Of the scales of a thread's two rows.
struct Exponents {
  int v[2];
};

// Writes the values of one warpgroup.
template <typename Partial, typename Tile>
__device__ __forceinline__ Exponents store_values(const DecodeArgs& args, int slot, int half,
                                                  const float (&output)[Tile::kOutputs]) {
  using Format = PartialFormat<Partial>;
  const Exponents exponents = {Format::exponent(output, 0), Format::exponent(output, 1)};
  const float scale[2] = {power_of_two(-exponents.v[0]), power_of_two(-exponents.v[1])};
  constexpr int kColumns = 4 * Format::kPairs;  // of a chunk
  const int chunk =
      (Tile::result_row() / 16 * 2 + half) * kChunks<Partial> + Tile::first_column() / kColumns;
  uint4* dst = partial_chunks(args, slot) + chunk * 32 + threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < Tile::kGroups * 8 / kColumns; ++i) {
    __stcg(dst + i * 32, Format::pack(output + i * 2 * Format::kPairs, scale));
  }
  return exponents;
}

// Writes what they are relative to.
template <typename Tile>
__device__ __forceinline__ void store_stats(const DecodeArgs& args, int slot, int half,
                                            const RowPair& max, const RowPair& sum,
                                            const Exponents& exponents) {
  if (threadIdx.x % 4 != 0) return;
  const int row = Tile::result_row();
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    __stcg(partial_stats(args, slot, half, row + 8 * e),
           make_float2(max.v[e] + exponents.v[e], sum.v[e] * power_of_two(-exponents.v[e])));
  }
}

}  // namespace mla

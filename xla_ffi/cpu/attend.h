// Copyright 2026 The mla-jax Authors
// SPDX-License-Identifier: Apache-2.0
//
// Attention of a tile of query rows to a part of the tokens: what each instruction set implements.
//
// Letters: r query rows, n tokens, d channels of a key, v channels of a value.

#ifndef MLA_JAX_CPU_ATTEND_H_
#define MLA_JAX_CPU_ATTEND_H_

#include <cstdint>
#include <memory>

#include "mla.h"

// Compilers that know AVX512-BF16.
#if defined(__x86_64__) && (defined(__clang__) || __GNUC__ >= 10)
#define MLA_HAS_AVX512_BF16
#endif
// And AMX, which Linux alone gives to those who ask.
#if defined(__x86_64__) && defined(__linux__) && \
    ((defined(__clang__) && __clang_major__ >= 12) || (!defined(__clang__) && __GNUC__ >= 11))
#define MLA_HAS_AMX
#endif

namespace mla {

constexpr int kTileRows = 32;        // rows that share one reading of the keys
constexpr int kMaxTileRows = 128;    // the same with AMX, beside whose products reading takes long
constexpr int kMaxBlockTokens = 64;  // tokens per step of the online softmax; keys stay in L2
constexpr int kMaxLanes = 16;        // floats of the widest vector

// A sequence is cut every so many tokens, whatever the batch and the number of threads: that keeps
// a row's bits its own. Large enough that combining (2 KB a row) costs nothing beside the keys.
constexpr int64_t kPartTokens = 960;

// Rows [row0, row0 + rows) of one sequence and KV head against tokens [token0, token1).
struct Tile {
  int32_t seq;
  int32_t kv_head;
  int32_t row0;    // packed row, see MlaDecodeParams
  int32_t rows;    // in [1, kMaxTileRows]
  int64_t token0;  // inclusive
  int64_t token1;  // exclusive, at most the sequence's clamped length
};

// Working memory of one thread, enough for any tile of one call, whose rows are padded to 16, the
// height of AMX's. value_stride is a multiple of three of the widest vectors, the width of a
// register tile, key_stride of two, a vector of bfloat16.
struct Scratch {
  Scratch(const MlaDecodeParams& p, int32_t tile_rows);

  int64_t key_stride;    // of q and k, at least max(d_k, value_stride)
  int64_t value_stride;  // of acc, at least d_v
  float* q;              // [tile_rows, key_stride]
  float* k;              // [kMaxBlockTokens, key_stride]
  float* scores;         // [tile_rows, kMaxBlockTokens]
  float* acc;            // [tile_rows, value_stride]: sum of exp(score - top) * value
  float* top;            // [tile_rows]: largest score, -inf where no token is seen
  float* total;          // [tile_rows]: sum of exp(score - top)

 private:
  std::unique_ptr<float[]> memory_;
};

// Length of a sequence, clamped to [0, capacity].
int64_t ClampedLength(const MlaDecodeParams& p, int32_t seq);

// Attends a tile; leaves its results in the scratch's acc, top and total.
using AttendFn = void (*)(const MlaDecodeParams&, const Tile&, Scratch&);

namespace baseline {
void Attend(const MlaDecodeParams& p, const Tile& tile, Scratch& scratch);
}
#if defined(__x86_64__)
namespace avx2 {
void Attend(const MlaDecodeParams& p, const Tile& tile, Scratch& scratch);
}
namespace avx512 {
void Attend(const MlaDecodeParams& p, const Tile& tile, Scratch& scratch);
}
#endif
#ifdef MLA_HAS_AVX512_BF16
namespace avx512bf16 {
void Attend(const MlaDecodeParams& p, const Tile& tile, Scratch& scratch);
}
#endif
#ifdef MLA_HAS_AMX
namespace amx {
void Attend(const MlaDecodeParams& p, const Tile& tile, Scratch& scratch);
}
#endif

}  // namespace mla

#endif  // MLA_JAX_CPU_ATTEND_H_

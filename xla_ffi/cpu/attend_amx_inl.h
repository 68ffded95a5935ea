// Copyright 2026 The mla-jax Authors
// SPDX-License-Identifier: Apache-2.0
//
// Products of bfloat16 by AMX's tile registers: 16 rows of 64 bytes each. Included by attend_inl.h.
//
// TDPBF16PS adds to C, 16 x 16 of float32, the product of A, 16 rows of 32 elements, and B, 32 x 16
// whose rows come by twos, side by side ("Intel Architecture Instruction Set Extensions", chapter
// 3). Where keys are A and queries B, only the queries, once, have to be brought into pairs, and
// scores come out transposed; where weights are A and values B, it is the block's values.

struct AsBf16 : Bf16Pairs<64> {
  static constexpr int kRows = 16;
  static constexpr int64_t kRowBytes = 64;
  static_assert(kTileRows % kRows == 0 && kTokens % 32 == 0);

  // The queries in pairs lie behind the queries: [rows / 16, key_stride / 2, 16, 2].
  static Bf16* QueryPairs(const Scratch& s, int32_t rows) {
    return reinterpret_cast<Bf16*>(s.q) + rows * s.key_stride;
  }

  MLA_TARGET static void Begin(Scratch& s, int32_t rows) {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    Fence();
    _tile_loadconfig(&config);
    const Ints index = Lanes() * static_cast<int32_t>(s.key_stride / 2);
    Bf16* pairs = QueryPairs(s, rows);
    for (int32_t r = 0; r < rows; r += kRows) {
      const Bf16* from = reinterpret_cast<const Bf16*>(s.q) + r * s.key_stride;
      for (int64_t d = 0; d < s.key_stride; d += 2, pairs += 2 * kRows) {
        Store(pairs, Gather(index, from + d));
      }
    }
  }

  MLA_TARGET static void End() { _tile_release(); }

  // The macros of tiles do not tell GCC that they read memory.
  static void Fence() { __asm__ volatile("" ::: "memory"); }

  // The words from[index]. By a mask, since of the plain gather GCC says that it may be undefined.
  MLA_TARGET static __m512i Gather(const Ints& index, const void* from) {
    return _mm512_mask_i32gather_epi32(__m512i{}, 0xffff, (__m512i)index, from, 4);
  }

  MLA_TARGET static Ints Lanes() {
    Ints lanes;
    Load(lanes, kLaneIndex);
    return lanes;
  }
};

// Writes scale * C^T, of 16 tokens and 16 rows, to scores.
MLA_TARGET void StoreScores(float* scores, const float* c, float scale) {
  const Ints index = AsBf16::Lanes() * 16;
  for (int r = 0; r < AsBf16::kRows; ++r) {
    const Floats x = (Floats)AsBf16::Gather(index, c + r);
    Store(scores + r * AsBf16::kTokens, x * scale);
  }
}

// Scores of 32 tokens, from t on, by 16 or 32 rows, from r on.
MLA_TARGET void ScoresOfTokens(Scratch& s, int32_t rows, int32_t r, int64_t t, float scale) {
  const bool two = rows - r > AsBf16::kRows;
  const int64_t key_bytes = s.key_stride * sizeof(Bf16), steps = s.key_stride / 32;
  const Bf16* pairs = AsBf16::QueryPairs(s, rows) + r * s.key_stride;
  const Bf16* keys = reinterpret_cast<const Bf16*>(s.k) + t * s.key_stride;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t i = 0; i < steps; ++i) {
    _tile_loadd(4, pairs + 512 * i, AsBf16::kRowBytes);
    _tile_loadd(6, keys + 32 * i, key_bytes);
    _tile_loadd(7, keys + 32 * i + 16 * s.key_stride, key_bytes);
    _tile_dpbf16ps(0, 6, 4);
    _tile_dpbf16ps(1, 7, 4);
    if (two) {
      _tile_loadd(5, pairs + 512 * (steps + i), AsBf16::kRowBytes);
      _tile_dpbf16ps(2, 6, 5);
      _tile_dpbf16ps(3, 7, 5);
    }
  }
  alignas(64) float c[256];
  float* scores = s.scores + r * AsBf16::kTokens + t;
  _tile_stored(0, c, AsBf16::kRowBytes);
  StoreScores(scores, c, scale);
  _tile_stored(1, c, AsBf16::kRowBytes);
  StoreScores(scores + 16, c, scale);
  if (two) {
    scores += AsBf16::kRows * AsBf16::kTokens;
    _tile_stored(2, c, AsBf16::kRowBytes);
    StoreScores(scores, c, scale);
    _tile_stored(3, c, AsBf16::kRowBytes);
    StoreScores(scores + 16, c, scale);
  }
}

MLA_TARGET void Scores(Scratch& s, AsBf16, int32_t rows, int64_t n, float scale) {
  AsBf16::Fence();
  for (int64_t t = 0; t < n; t += 32) {
    for (int32_t r = 0; r < rows; r += 2 * AsBf16::kRows) ScoresOfTokens(s, rows, r, t, scale);
  }
}

// Adds to all columns of 16 or 32 rows, from r on, whose weights stay in registers.
MLA_TARGET void ValuesOfRows(Scratch& s, int32_t rows, int32_t r) {
  static_assert(AsBf16::kTokens == 64);
  const bool two = rows - r > AsBf16::kRows;
  const int64_t acc_bytes = s.value_stride * sizeof(float);
  const int64_t pair_bytes = 2 * s.value_stride * sizeof(Bf16);
  constexpr int64_t kWeightBytes = AsBf16::kTokens * sizeof(float);  // of a row
  const Bf16* weights = reinterpret_cast<const Bf16*>(s.scores + r * AsBf16::kTokens);
  const Bf16* more = weights + AsBf16::kRows * 2 * AsBf16::kTokens;
  _tile_loadd(4, weights, kWeightBytes);
  _tile_loadd(5, weights + 32, kWeightBytes);
  if (two) {
    _tile_loadd(6, more, kWeightBytes);
    _tile_loadd(7, more + 32, kWeightBytes);
  }
  for (int64_t i = 0; i < s.value_stride; i += 16) {
    const Bf16* pairs = AsBf16::BlockValues(s) + 2 * i;
    float *acc = s.acc + r * s.value_stride + i, *next = acc + AsBf16::kRows * s.value_stride;
    _tile_loadd(2, pairs, pair_bytes);
    _tile_loadd(3, pairs + 32 * s.value_stride, pair_bytes);
    _tile_loadd(0, acc, acc_bytes);
    _tile_dpbf16ps(0, 4, 2);
    _tile_dpbf16ps(0, 5, 3);
    _tile_stored(0, acc, acc_bytes);
    if (two) {
      _tile_loadd(1, next, acc_bytes);
      _tile_dpbf16ps(1, 6, 2);
      _tile_dpbf16ps(1, 7, 3);
      _tile_stored(1, next, acc_bytes);
    }
  }
}

MLA_TARGET void Values(Scratch& s, AsBf16, int32_t rows, int64_t) {
  AsBf16::Fence();
  for (int32_t r = 0; r < rows; r += 2 * AsBf16::kRows) ValuesOfRows(s, rows, r);
}

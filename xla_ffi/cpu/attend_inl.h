// Copyright 2026 The mla-jax Authors
// SPDX-License-Identifier: Apache-2.0
//
// The arithmetic, for vectors of any width. attend.cc includes this file once per instruction set,
// with MLA_NAMESPACE, MLA_LANES and MLA_TARGET (the function attribute) defined; hence no guard.
// MLA_BF16_DOTS says that the set multiplies bfloat16 as it is; else all is multiplied as float32.
// MLA_TILES says that it does so by matrices, AMX's.
//
// Plain vector extensions of GCC and Clang: the compiler fuses a * b + c where the target has FMA.
// Every row goes through the same operations in the same order wherever it lies in a tile.

namespace MLA_NAMESPACE {
namespace {

constexpr int kLanes = MLA_LANES;
typedef float Floats __attribute__((vector_size(4 * MLA_LANES)));
typedef float Quad __attribute__((vector_size(16)));
typedef int32_t Ints __attribute__((vector_size(4 * MLA_LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * MLA_LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * MLA_LANES)));

#define MLA_INLINE MLA_TARGET inline __attribute__((always_inline))

// Vectors travel by reference: by value their calling convention would depend on the target.
template <typename V, typename T>
MLA_INLINE void Load(V& v, const T* from) {
  typedef V Unaligned __attribute__((aligned(1), may_alias));
  v = *reinterpret_cast<const Unaligned*>(from);
}

template <typename V, typename T>
MLA_INLINE void Store(T* to, const V& v) {
  typedef V Unaligned __attribute__((aligned(1), may_alias));
  *reinterpret_cast<Unaligned*>(to) = v;
}

// Keeps GCC from loading an operand anew for each of its products, which then wait for loads.
template <typename V>
MLA_INLINE void Keep(V& x) {
#if defined(__x86_64__)
  __asm__("" : "+x"(x));
#endif
}

MLA_INLINE float Sum(const Floats& x) {
  float lanes[kLanes];
  Store(lanes, x);
  Quad sum, next;
  Load(sum, lanes);
  for (int i = 4; i < kLanes; i += 4) {
    Load(next, lanes + i);
    sum += next;
  }
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

// exp(x) for x <= 0 within 2 ulp; 0 below -87; NaN for NaN.
MLA_INLINE void Exp(Floats& x) {
  const Floats kRound = Floats{} + 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const Floats shifted = x * 1.44269504f + kRound;
  const Floats n = shifted - kRound;
  const Floats r = (x - n * 0.693359375f) - n * -2.12194440e-4f;  // ln 2 in two pieces
  // Taylor up to r^7 / 7!, |r| <= ln 2 / 2: the rest is below 2^-27.
  Floats y = Floats{} + 1.98412698e-4f;
  y = y * r + 1.38888889e-3f;
  y = y * r + 8.33333333e-3f;
  y = y * r + 4.16666667e-2f;
  y = y * r + 1.66666667e-1f;
  y = y * r + 0.5f;
  y = y * r + 1.0f;
  y = y * r + 1.0f;
  // 2^n by its exponent bits. A product, not a sum of bits: NaN stays NaN.
  const Floats power = (Floats)((((Ints)shifted - (Ints)kRound) + 127) << 23);
  const Floats result = y * power;
  x = x < -87.0f ? Floats{} : result;
}

// Conversions of kLanes elements to float32.
MLA_INLINE void Widen(Floats& out, const float* x) { Load(out, x); }

MLA_INLINE void Widen(Floats& out, const Bf16* x) {
  Halves bits;
  Load(bits, x);
  out = (Floats)(__builtin_convertvector(bits, Words) << 16);
}

MLA_INLINE void Widen(Floats& out, const F16* x) {
  Halves bits;
  Load(bits, x);
  const Words all = __builtin_convertvector(bits, Words);
  const Words sign = (all & 0x8000u) << 16;
  const Words magnitude = (all & 0x7fffu) << 13;
  const Words normal = magnitude + (112u << 23);  // bias 15 to bias 127
  const Words special = magnitude + (224u << 23);
  // m * 2^-24 as (2^-14 + m * 2^-24) - 2^-14: XLA's threads flush denormal operands to zero.
  const Floats small = (Floats)(magnitude + (113u << 23)) - 6.103515625e-05f;
  Words result = magnitude >= (31u << 23) ? special : normal;
  result = magnitude < (1u << 23) ? (Words)small : result;
  out = (Floats)(result | sign);
}

// Writes d elements of x as float32.
template <typename T>
MLA_TARGET void WidenRow(float* out, const T* x, int64_t d) {
  Floats v;
  int64_t i = 0;
  for (; i + kLanes <= d; i += kLanes) {
    Widen(v, x + i);
    Store(out + i, v);
  }
  if (i < d) {
    T rest[kLanes] = {};
    for (int64_t j = 0; j < d - i; ++j) rest[j] = x[i + j];
    Widen(v, rest);
    float widened[kLanes];
    Store(widened, v);
    for (int64_t j = 0; j < d - i; ++j) out[i + j] = widened[j];
  }
}

// Register tiles of 4 x 3: 12 accumulators, and operands for 12 products from 7 loads. The small
// loops must be unrolled for the accumulators to be registers; compilers do not do it unasked.
constexpr int kRowsPerTile = 4;
constexpr int kTokensPerTile = 3;
constexpr int kColumnVectors = 3;
constexpr int kTokensInL1 = 12;  // of keys, beside four rows of queries
static_assert(kTileRows % kRowsPerTile == 0 && kTokensInL1 % kTokensPerTile == 0);
#define MLA_UNROLL _Pragma("GCC unroll 4")

// Products of float32, whatever the inputs are.
struct AsFloat32 {
  using Operand = float;
  using Vector = Floats;
  static constexpr int kRows = kRowsPerTile;  // rows are padded to a multiple
  static constexpr int kTokens = 48;          // of a block
  static constexpr int kTerms = 1;            // of a lane in one product

  // sum += a * b, lane by lane.
  MLA_INLINE static void Add(Floats& sum, const Floats& a, const Floats& b) { sum += a * b; }

  // The weights of kTerms neighbouring tokens in each lane.
  MLA_INLINE static void Broadcast(Floats& out, const float* weights) {
    out = *weights - Floats{};  // not plus, which is no copy of -0
  }

  // Reads d channels as operands.
  template <typename T>
  MLA_TARGET static void Read(float* out, const T* x, int64_t d) {
    WidenRow(out, x, d);
  }

  // Before the first block, once the queries are read; after the last.
  static void Begin(Scratch&, int32_t) {}
  static void End() {}

  // Brings a block's weights and values, once they are known, into the form that Values() takes.
  static void Prepare(Scratch&, int32_t) {}

  // A block's values, of kTerms neighbouring tokens column by column, and the columns of a token.
  static const float* BlockValues(const Scratch& s) { return s.k; }
  static int64_t ValueStride(const Scratch& s) { return s.key_stride; }
};

// What a dtype is multiplied as.
template <typename T>
struct Products {
  using As = AsFloat32;
};

#ifdef MLA_BF16_DOTS
// Products of bfloat16 by pairs, summed in float32: an instruction does 32. Softmax weights are
// rounded to bfloat16 for it, as on a GPU. Operands lie where float32 would, in half of the space.
template <int kBlockTokens>
struct Bf16Pairs {
  using Operand = Bf16;
  using Vector = Words;
  static constexpr int kRows = kRowsPerTile;
  static constexpr int kTokens = kBlockTokens;
  static constexpr int kTerms = 2;

  MLA_INLINE static void Add(Floats& sum, const Words& a, const Words& b) {
    sum = (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
  }

  MLA_INLINE static void Broadcast(Words& out, const Bf16* weights) {
    uint32_t pair;
    __builtin_memcpy(&pair, weights, sizeof(pair));
    out = Words{} + pair;
  }

  static void Read(Bf16* out, const Bf16* x, int64_t d) {
    __builtin_memcpy(out, x, d * sizeof(Bf16));
  }

  static void Begin(Scratch&, int32_t) {}
  static void End() {}

  // A row's weights stay in its place, in the first half of it; the values go behind the keys.
  MLA_TARGET static void Prepare(Scratch& s, int32_t rows) {
    for (int64_t i = 0; i < int64_t{rows} * kBlockTokens; i += kBlockTokens) {
      for (int t = 0; t < kBlockTokens; t += kLanes) {
        Floats x;
        Load(x, s.scores + i + t);
        Store(reinterpret_cast<Bf16*>(s.scores + i) + t, (Halves)_mm512_cvtneps_pbh((__m512)x));
      }
    }
    // Columns 0, 0, 1, 1, .. of both, and 16, 16, .. Half a vector behind a row's last columns is
    // written, too, and again by the next row; key_stride leaves room for the last one's.
    Ints lane;
    Load(lane, kLaneIndex);
    const auto first = (__m512i)(lane | (lane + 32) << 16),
               second = (__m512i)((Ints)first + 0x100010);
    const Bf16* keys = reinterpret_cast<const Bf16*>(s.k);
    Bf16* pairs = const_cast<Bf16*>(BlockValues(s));
    for (int t = 0; t < kBlockTokens; t += 2, pairs += 2 * s.value_stride) {
      for (int64_t c = 0; c < s.value_stride; c += 2 * kLanes) {
        __m512i even, odd;
        Load(even, keys + t * s.key_stride + c);
        Load(odd, keys + (t + 1) * s.key_stride + c);
        Store(pairs + 2 * c, _mm512_permutex2var_epi16(even, first, odd));
        Store(pairs + 2 * c + 2 * kLanes, _mm512_permutex2var_epi16(even, second, odd));
      }
    }
  }

  static const Bf16* BlockValues(const Scratch& s) {
    return reinterpret_cast<const Bf16*>(s.k) + kBlockTokens * s.key_stride;
  }
  static int64_t ValueStride(const Scratch& s) { return s.value_stride; }
};

#ifdef MLA_TILES
#include "cpu/attend_amx_inl.h"
#else
using AsBf16 = Bf16Pairs<48>;
#endif

template <>
struct Products<Bf16> {
  using As = AsBf16;
};
#endif

// scores[4, 3] = scale * q[4, d] k[3, d]^T.
template <typename As>
MLA_TARGET void ScoresOfTile(float* scores, const typename As::Operand* q,
                             const typename As::Operand* k, int64_t stride, float scale) {
  using Vector = typename As::Vector;
  Floats acc[kRowsPerTile][kTokensPerTile];
  MLA_UNROLL for (int r = 0; r < kRowsPerTile; ++r) {
    MLA_UNROLL for (int t = 0; t < kTokensPerTile; ++t) acc[r][t] = Floats{};
  }
  for (int64_t i = 0; i < stride; i += As::kTerms * kLanes) {
    Vector key[kTokensPerTile];
    MLA_UNROLL for (int t = 0; t < kTokensPerTile; ++t) Load(key[t], k + t * stride + i);
    MLA_UNROLL for (int r = 0; r < kRowsPerTile; ++r) {
      Vector query;
      Load(query, q + r * stride + i);
      Keep(query);
      MLA_UNROLL for (int t = 0; t < kTokensPerTile; ++t) As::Add(acc[r][t], query, key[t]);
    }
  }
  MLA_UNROLL for (int r = 0; r < kRowsPerTile; ++r) {
    MLA_UNROLL for (int t = 0; t < kTokensPerTile; ++t) {
      scores[r * As::kTokens + t] = scale * Sum(acc[r][t]);
    }
  }
}

// acc[4, 3 vectors] += weights[4, n] v[n, 3 vectors], from row r0 and column c0 on.
template <typename As>
MLA_TARGET void ValuesOfTile(Scratch& s, int32_t r0, int64_t c0, int64_t n) {
  using Operand = typename As::Operand;
  using Vector = typename As::Vector;
  constexpr int kRow = As::kTokens * sizeof(float) / sizeof(Operand);  // of weights
  float* acc = s.acc + r0 * s.value_stride + c0;
  const Operand* weights = reinterpret_cast<const Operand*>(s.scores) + r0 * kRow;
  const Operand* v = As::BlockValues(s) + As::kTerms * c0;
  const int64_t v_stride = As::ValueStride(s);
  Floats sum[kRowsPerTile][kColumnVectors];
  MLA_UNROLL for (int r = 0; r < kRowsPerTile; ++r) {
    MLA_UNROLL for (int c = 0; c < kColumnVectors; ++c) {
      Load(sum[r][c], acc + r * s.value_stride + c * kLanes);
    }
  }
  for (int64_t t = 0; t < n; t += As::kTerms) {  // past the end weights and values are 0
    Vector value[kColumnVectors];
    MLA_UNROLL for (int c = 0; c < kColumnVectors; ++c) {
      Load(value[c], v + t * v_stride + As::kTerms * c * kLanes);
    }
    MLA_UNROLL for (int r = 0; r < kRowsPerTile; ++r) {
      Vector weight;
      As::Broadcast(weight, weights + r * kRow + t);
      MLA_UNROLL for (int c = 0; c < kColumnVectors; ++c) As::Add(sum[r][c], weight, value[c]);
    }
  }
  MLA_UNROLL for (int r = 0; r < kRowsPerTile; ++r) {
    MLA_UNROLL for (int c = 0; c < kColumnVectors; ++c) {
      Store(acc + r * s.value_stride + c * kLanes, sum[r][c]);
    }
  }
}
#undef MLA_UNROLL

// Scores of a block of n tokens.
template <typename As>
MLA_TARGET void Scores(Scratch& s, As, int32_t rows, int64_t n, float scale) {
  using Operand = typename As::Operand;
  static_assert(As::kTokens % kTokensInL1 == 0);
  const Operand *queries = reinterpret_cast<const Operand*>(s.q),
                *keys = reinterpret_cast<const Operand*>(s.k);
  // Some keys stay in L1 while all queries pass, each few of them by all these keys.
  for (int64_t t0 = 0; t0 < n; t0 += kTokensInL1) {
    const int64_t t1 = t0 + kTokensInL1 < n ? t0 + kTokensInL1 : n;
    for (int32_t r = 0; r < rows; r += kRowsPerTile) {
      for (int64_t t = t0; t < t1; t += kTokensPerTile) {
        ScoresOfTile<As>(s.scores + r * As::kTokens + t, queries + r * s.key_stride,
                         keys + t * s.key_stride, s.key_stride, scale);
      }
    }
  }
}

// Adds a block's values, n of them, by their weights.
template <typename As>
MLA_TARGET void Values(Scratch& s, As, int32_t rows, int64_t n) {
  for (int64_t c = 0; c < s.value_stride; c += kColumnVectors * kLanes) {
    for (int32_t r = 0; r < rows; r += kRowsPerTile) ValuesOfTile<As>(s, r, c, n);
  }
}

// Turns a row of a block's scores, of which the first `seen` count, into weights exp(score - top),
// and brings the row's top, total and acc up to date.
template <int kBlockTokens>
MLA_TARGET void Softmax(float* scores, int64_t seen, float* top, float* total, float* acc,
                        int64_t acc_stride) {
  static_assert(kBlockTokens % kMaxLanes == 0 && kBlockTokens <= kMaxBlockTokens);
  Ints lane;
  Load(lane, kLaneIndex);
  Floats largest = Floats{} + *top;
  for (int64_t t = 0; t < seen; t += kLanes) {
    Floats x;
    Load(x, scores + t);
    largest = ((lane < (int32_t)(seen - t)) & (x > largest)) ? x : largest;  // passes NaN over
  }
  float highest = *top;
  for (int i = 0; i < kLanes; ++i) highest = largest[i] > highest ? largest[i] : highest;
  const float base = highest == -kInfinity ? 0.0f : highest;  // -inf - -inf would be NaN
  Floats sum = {};
  for (int64_t t = 0; t < kBlockTokens; t += kLanes) {
    Floats x = {};
    if (t < seen) {
      Load(x, scores + t);
      x -= base;
      Exp(x);
      x = lane < (int32_t)(seen - t) ? x : Floats{};
      sum += x;
    }
    Store(scores + t, x);
  }
  if (*top != highest) {
    Floats factor = Floats{} + (*top - base);  // <= 0: -inf before the first token
    Exp(factor);
    *total *= factor[0];
    for (int64_t i = 0; i < acc_stride; i += kLanes) {
      Floats x;
      Load(x, acc + i);
      x *= factor;
      Store(acc + i, x);
    }
    *top = highest;
  }
  *total += Sum(sum);
}

template <typename T>
MLA_TARGET void AttendAs(const MlaDecodeParams& p, const Tile& tile, Scratch& s) {
  using As = typename Products<T>::As;
  using Operand = typename As::Operand;
  Operand *queries = reinterpret_cast<Operand*>(s.q), *keys = reinterpret_cast<Operand*>(s.k);
  const int64_t group = p.h_q / p.h_kv;
  const int64_t length = ClampedLength(p, tile.seq);
  constexpr int kBlockTokens = As::kTokens;
  static_assert(kPartTokens % kBlockTokens == 0);
  const int32_t rows = (tile.rows + As::kRows - 1) / As::kRows * As::kRows;

  int64_t visible[kMaxTileRows] = {};  // tokens each row sees, from the sequence's first on
  __builtin_memset(s.q, 0, rows * s.key_stride * sizeof(float));
  __builtin_memset(s.k, 0, kBlockTokens * s.key_stride * sizeof(float));
  __builtin_memset(s.acc, 0, rows * s.value_stride * sizeof(float));
  for (int32_t r = 0; r < rows; ++r) {
    s.top[r] = -kInfinity;
    s.total[r] = 0;
    if (r >= tile.rows) continue;  // sees nothing
    const int64_t j = (tile.row0 + r) / group;
    const int64_t head = tile.kv_head * group + (tile.row0 + r) % group;
    visible[r] = p.causal ? length - p.s_q + j + 1 : length;
    As::Read(queries + r * s.key_stride,
             static_cast<const T*>(p.q) + ((tile.seq * (int64_t)p.s_q + j) * p.h_q + head) * p.d_k,
             p.d_k);
  }
  As::Begin(s, rows);

  const int32_t* table = p.block_table + tile.seq * (int64_t)p.max_pages_per_seq;
  for (int64_t start = tile.token0; start < tile.token1; start += kBlockTokens) {
    const int64_t n = tile.token1 - start < kBlockTokens ? tile.token1 - start : kBlockTokens;
    for (int64_t t = 0; t < kBlockTokens; ++t) {
      Operand* key = keys + t * s.key_stride;
      const int64_t page = t < n ? table[(start + t) / p.page_size] : -1;
      if (page < 0 || page >= p.num_pages) {
        __builtin_memset(key, 0, p.d_k * sizeof(Operand));
        continue;
      }
      const int64_t slot = page * p.page_size + (start + t) % p.page_size;
      As::Read(key, static_cast<const T*>(p.k_cache) + (slot * p.h_kv + tile.kv_head) * p.d_k,
               p.d_k);
    }
    Scores(s, As{}, rows, n, p.softmax_scale);
    for (int32_t r = 0; r < rows; ++r) {
      const int64_t left = visible[r] - start;
      const int64_t seen = left < 0 ? 0 : left < n ? left : n;
      Softmax<kBlockTokens>(s.scores + r * kBlockTokens, seen, s.top + r, s.total + r,
                            s.acc + r * s.value_stride, s.value_stride);
    }
    As::Prepare(s, rows);
    Values(s, As{}, rows, n);
  }
  As::End();
}

}  // namespace

void Attend(const MlaDecodeParams& p, const Tile& tile, Scratch& scratch) {
  switch (p.dtype) {
    case MLA_BF16:
      return AttendAs<Bf16>(p, tile, scratch);
    case MLA_F16:
      return AttendAs<F16>(p, tile, scratch);
    case MLA_F32:
      return AttendAs<float>(p, tile, scratch);
  }
}

#undef MLA_INLINE
}  // namespace MLA_NAMESPACE

// Copyright 2026 The mla-jax Authors
// SPDX-License-Identifier: Apache-2.0

#include "cpu/attend.h"

#include <algorithm>
#include <limits>

#ifdef MLA_HAS_AVX512_BF16
#include <immintrin.h>
#endif

namespace mla {
namespace {

// The bits of one element; types of their own to choose the conversion.
struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

constexpr float kInfinity = std::numeric_limits<float>::infinity();
alignas(64) constexpr int32_t kLaneIndex[kMaxLanes] = {0, 1, 2,  3,  4,  5,  6,  7,
                                                       8, 9, 10, 11, 12, 13, 14, 15};

constexpr int64_t RoundUp(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

}  // namespace

Scratch::Scratch(const MlaDecodeParams& p, int32_t tile_rows) {
  const int64_t rows = RoundUp(std::min<int64_t>(int64_t{p.s_q} * (p.h_q / p.h_kv), tile_rows), 16);
  value_stride = RoundUp(p.d_v, 3 * kMaxLanes);
  key_stride = RoundUp(std::max<int64_t>(p.d_k, value_stride), 2 * kMaxLanes);
  const int64_t sizes[] = {rows * key_stride,
                           kMaxBlockTokens * key_stride,
                           rows * kMaxBlockTokens,
                           rows * value_stride,
                           rows,
                           rows};
  float** fields[] = {&q, &k, &scores, &acc, &top, &total};
  int64_t all = kMaxLanes;  // to align the first
  for (int64_t size : sizes) all += RoundUp(size, kMaxLanes);
  memory_.reset(new float[all]);
  const auto address = reinterpret_cast<uintptr_t>(memory_.get());
  float* next = memory_.get() + (-address % 64) / sizeof(float);
  for (int i = 0; i < 6; ++i) {
    *fields[i] = next;
    next += RoundUp(sizes[i], kMaxLanes);
  }
}

int64_t ClampedLength(const MlaDecodeParams& p, int32_t seq) {
  const int64_t capacity = int64_t{p.max_pages_per_seq} * p.page_size;
  return std::min(std::max<int64_t>(p.cache_seqlens[seq], 0), capacity);
}

// What every processor of the architecture has: SSE2, NEON.
#define MLA_NAMESPACE baseline
#define MLA_LANES 4
#define MLA_TARGET
#include "cpu/attend_inl.h"
#undef MLA_NAMESPACE
#undef MLA_LANES
#undef MLA_TARGET

#if defined(__x86_64__)
// GCC would halve the vectors. Clang does not, and forgets the whole attribute for what it does not
// know.
#ifdef __clang__
#define MLA_AVX512 "avx512f,avx512bw,avx512dq,avx512vl"
#else
#define MLA_AVX512 "avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512"
#endif

#define MLA_NAMESPACE avx2
#define MLA_LANES 8
#define MLA_TARGET __attribute__((target("avx2,fma")))
#include "cpu/attend_inl.h"
#undef MLA_NAMESPACE
#undef MLA_LANES
#undef MLA_TARGET

#define MLA_NAMESPACE avx512
#define MLA_LANES 16
#define MLA_TARGET __attribute__((target(MLA_AVX512)))
#include "cpu/attend_inl.h"
#undef MLA_NAMESPACE
#undef MLA_LANES
#undef MLA_TARGET
#endif

#ifdef MLA_HAS_AVX512_BF16
#define MLA_NAMESPACE avx512bf16
#define MLA_LANES 16
#define MLA_BF16_DOTS
#define MLA_TARGET __attribute__((target(MLA_AVX512 ",avx512bf16")))
#include "cpu/attend_inl.h"
#undef MLA_NAMESPACE
#undef MLA_LANES
#undef MLA_BF16_DOTS
#undef MLA_TARGET
#endif

#ifdef MLA_HAS_AMX
#define MLA_NAMESPACE amx
#define MLA_LANES 16
#define MLA_BF16_DOTS
#define MLA_TILES
#define MLA_TARGET __attribute__((target(MLA_AVX512 ",avx512bf16,amx-tile,amx-bf16")))
#include "cpu/attend_inl.h"
#undef MLA_NAMESPACE
#undef MLA_LANES
#undef MLA_BF16_DOTS
#undef MLA_TILES
#undef MLA_TARGET
#endif

}  // namespace mla

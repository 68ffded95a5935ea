// Copyright 2026 The mla-jax Authors
// SPDX-License-Identifier: Apache-2.0
//
// The append on a CPU: one token after the other.

#include "append.h"

#include <cmath>
#include <cstdint>

#include "cpu/convert.h"
#include "mla.h"

namespace mla {
namespace {

struct Bf16 {
  uint16_t bits;
  operator float() const { return FromBf16(bits); }
  static Bf16 Of(float x) { return {ToBf16(x)}; }
};

struct F16 {
  uint16_t bits;
  operator float() const { return FromF16(bits); }
  static F16 Of(float x) { return {ToF16(x)}; }
};

struct F32 {
  float value;
  operator float() const { return value; }
  static F32 Of(float x) { return {x}; }
};

template <typename T, typename Scale>
void Append(const MlaAppendParams& p) {
  const int64_t width = int64_t{p.c} + p.r, half = p.r / 2;
  const auto* scale = static_cast<const Scale*>(p.scale);
  for (int64_t token = 0; token < int64_t{p.b} * p.t; ++token) {
    const int64_t to_token = Destination(p, token / p.t, token % p.t);
    if (to_token < 0) continue;
    const T* from = static_cast<const T*>(p.latents) + token * width;
    T* to = static_cast<T*>(p.pages) + to_token * width;
    float sum = 0;
    for (int64_t i = 0; i < p.c; ++i) sum += float{from[i]} * float{from[i]};
    const float factor = 1 / std::sqrt(sum / p.c + p.epsilon);
    for (int64_t i = 0; i < p.c; ++i) to[i] = T::Of(from[i] * (factor * scale[i]));
    for (int64_t i = 0; i < half; ++i) {
      const int64_t first = p.c + (p.interleaved ? 2 * i : i);
      const int64_t second = first + (p.interleaved ? 1 : half);
      const float x0 = from[first], x1 = from[second];
      const float cos = p.cos[token * half + i], sin = p.sin[token * half + i];
      to[first] = T::Of(x0 * cos - x1 * sin);
      to[second] = T::Of(x1 * cos + x0 * sin);
    }
  }
}

template <typename T>
void Dispatch(const MlaAppendParams& p) {
  p.scale_dtype == MLA_F32 ? Append<T, F32>(p) : Append<T, T>(p);
}

}  // namespace
}  // namespace mla

extern "C" void mla_cpu_append(const MlaAppendParams* params) {
  switch (params->dtype) {
    case MLA_BF16:
      return mla::Dispatch<mla::Bf16>(*params);
    case MLA_F16:
      return mla::Dispatch<mla::F16>(*params);
    case MLA_F32:
      return mla::Dispatch<mla::F32>(*params);
  }
}

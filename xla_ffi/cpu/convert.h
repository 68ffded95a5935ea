// Copyright 2026 The mla-jax Authors
// SPDX-License-Identifier: Apache-2.0
//
// Numbers of 16 bits, one by one. All is right in threads that flush denormals to zero, as XLA's
// do.

#ifndef MLA_JAX_CPU_CONVERT_H_
#define MLA_JAX_CPU_CONVERT_H_

#include <cstdint>
#include <cstring>

namespace mla {

// Rounds to nearest, ties to even; NaN stays NaN.
inline uint16_t ToBf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) return static_cast<uint16_t>((bits >> 16) | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline uint16_t ToF16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t sign = (bits >> 16) & 0x8000;
  const uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
  if (magnitude >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);  // rounds to infinity
  if (magnitude >= 0x38800000) {
    const uint32_t rounded = magnitude + 0xfff + ((magnitude >> 13) & 1);
    return static_cast<uint16_t>(sign | ((rounded - (112u << 23)) >> 13));
  }
  // Below 2^-14 a step is 2^-24, as in the float32 numbers of [0.5, 1): adding rounds.
  float small;
  std::memcpy(&small, &magnitude, 4);
  small += 0.5f;
  uint32_t shifted;
  std::memcpy(&shifted, &small, 4);
  return static_cast<uint16_t>(sign | (shifted - 0x3f000000));
}

inline float FromBits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline float FromBf16(uint16_t x) { return FromBits(uint32_t{x} << 16); }

inline float FromF16(uint16_t x) {
  const uint32_t sign = (x & 0x8000u) << 16, magnitude = (x & 0x7fffu) << 13;
  if (magnitude >= (31u << 23)) return FromBits(sign | (magnitude + (224u << 23)));
  if (magnitude >= (1u << 23)) return FromBits(sign | (magnitude + (112u << 23)));
  // m * 2^-24 as (2^-14 + m * 2^-24) - 2^-14.
  const float small = FromBits(magnitude + (113u << 23)) - 6.103515625e-05f;
  return sign ? -small : small;
}

}  // namespace mla

#endif  // MLA_JAX_CPU_CONVERT_H_

// Copyright 2026 The mla-jax Authors
// SPDX-License-Identifier: Apache-2.0
//
// The append: a warp a token. It moves 1152 bytes each way, so it is as long as its longest chain
// of loads; that of the destination (length, table) runs beside that of the latent.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "../../append.h"

namespace mla {
namespace {

constexpr int kWarp = 32;
constexpr int kLatent = 512;
constexpr int kRotated = 2 * kWarp;  // a lane rotates a pair
constexpr int kPack = 8;             // channels of 16 bits in a load
constexpr int kPacks = kLatent / kPack / kWarp;

template <typename T>
struct alignas(kPack * sizeof(T)) Pack {
  T channels[kPack];
};

template <typename T, typename Scale>
__global__ void __launch_bounds__(kWarp) append_kernel(const __grid_constant__ MlaAppendParams p) {
  const uint32_t token = blockIdx.x;
  const int64_t row = token;
  const int lane = threadIdx.x;
  const T* from = static_cast<const T*>(p.latents) + row * (kLatent + kRotated);

  Pack<T> packs[kPacks];
  Pack<Scale> scales[kPacks];
  for (int i = 0; i < kPacks; ++i) {
    packs[i] = reinterpret_cast<const Pack<T>*>(from)[i * kWarp + lane];
    scales[i] = static_cast<const Pack<Scale>*>(p.scale)[i * kWarp + lane];
  }
  const int first = kLatent + (p.interleaved ? 2 * lane : lane);
  const int second = first + (p.interleaved ? 1 : kWarp);
  const float x0 = static_cast<float>(from[first]), x1 = static_cast<float>(from[second]);
  const float cos = p.cos[row * kWarp + lane], sin = p.sin[row * kWarp + lane];
  const int64_t to_token = Destination(p, token / p.t, token % p.t);

  float sum = 0;
  for (const Pack<T>& pack : packs) {
    for (T x : pack.channels) sum += static_cast<float>(x) * static_cast<float>(x);
  }
  for (int step = kWarp / 2; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
  const float factor = rsqrtf(sum / kLatent + p.epsilon);

  if (to_token < 0) return;
  T* to = static_cast<T*>(p.pages) + to_token * (kLatent + kRotated);
  for (int i = 0; i < kPacks; ++i) {
    for (int j = 0; j < kPack; ++j) {
      const float scaled = factor * static_cast<float>(scales[i].channels[j]);
      packs[i].channels[j] = static_cast<T>(static_cast<float>(packs[i].channels[j]) * scaled);
    }
    reinterpret_cast<Pack<T>*>(to)[i * kWarp + lane] = packs[i];
  }
  to[first] = static_cast<T>(x0 * cos - x1 * sin);
  to[second] = static_cast<T>(x1 * cos + x0 * sin);
}

template <typename T>
cudaError_t launch(const MlaAppendParams& p, cudaStream_t stream) {
  const auto kernel = p.scale_dtype == MLA_F32 ? append_kernel<T, float> : append_kernel<T, T>;
  kernel<<<static_cast<unsigned>(p.b * p.t), kWarp, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace
}  // namespace mla

extern "C" int mla_sm90_append(const MlaAppendParams* params, void* stream) {
  using namespace mla;
  const MlaAppendParams& p = *params;
  if (p.c != kLatent || p.r != kRotated || p.dtype == MLA_F32 || int64_t{p.b} * p.t > INT32_MAX) {
    return cudaErrorInvalidValue;
  }
  if (p.b == 0 || p.t == 0) return cudaSuccess;
  return p.dtype == MLA_BF16 ? launch<__nv_bfloat16>(p, static_cast<cudaStream_t>(stream))
                             : launch<__half>(p, static_cast<cudaStream_t>(stream));
}

// Copyright 2026 The mla-jax Authors
// SPDX-License-Identifier: Apache-2.0
//
// Launcher of one attention layer of one token.

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "../../../mla.h"
#include "../decode/chain.h"
#include "kernels.cuh"

namespace mla::layer {
namespace {

// Takes the workspace apart; all of it stays aligned to 128 bytes. Returns the bytes of scratch.
size_t lay_out(int h, void* workspace, Scratch* scratch, char** rest) {
  size_t used = 0;
  const auto take = [&](size_t bytes) {
    char* at = static_cast<char*>(workspace) + used;
    used += (bytes + 127) / 128 * 128;
    return at;
  };
  const size_t heads = h;
  scratch->queries = reinterpret_cast<float*>(take(heads * kQuery * sizeof(float)));
  scratch->latent = reinterpret_cast<float*>(take(kCached * sizeof(float)));
  scratch->q = take(heads * kLatent * 2);
  scratch->q_pe = take(heads * kRotated * 2);
  scratch->values = reinterpret_cast<float*>(take(8 * heads * kValue * sizeof(float)));
  *rest = static_cast<char*>(workspace) + used;
  return used;
}

// Launches a kernel; all but the first may start while the one before it ends.
template <typename... Args>
cudaError_t launch(void (*kernel)(Args...), int ctas, int threads, bool is_first,
                   cudaStream_t stream, const Args&... args) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(ctas);
  config.blockDim = dim3(threads);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = is_first ? 0 : 1;
  return cudaLaunchKernelEx(&config, kernel, args...);
}

template <typename T>
cudaError_t launch_layer(const MlaLayerParams& p, cudaStream_t stream) {
  LayerArgs args = {p, {}};
  char* rest;
  lay_out(p.h, p.workspace, &args.scratch, &rest);

  MlaDecodeParams decode = {};
  decode.q = args.scratch.q;
  decode.q_pe = args.scratch.q_pe;
  decode.k_cache = static_cast<const char*>(p.pages) +
                   int64_t{p.layer} * p.num_pages * p.page_size * kCached * sizeof(T);
  decode.block_table = p.block_table;
  decode.cache_seqlens = p.seqlen;
  decode.workspace = rest;
  decode.b = decode.s_q = decode.h_kv = 1;
  decode.h_q = p.h;
  decode.d_k = kCached;
  decode.d_v = kLatent;
  decode.num_pages = p.num_pages;
  decode.page_size = p.page_size;
  decode.max_pages_per_seq = p.max_pages;
  decode.softmax_scale = p.softmax_scale;
  decode.dtype = p.dtype;

  const bool norm = p.norm != nullptr;
  cudaError_t error =
      launch(norm ? project_kernel<T, true> : project_kernel<T, false>,
             (p.h * kQuery + kCached) / kProjectColumns, kWideThreads, true, stream, args);
  if (error != cudaSuccess) return error;
  error = launch(absorb_kernel<T>, absorb_ctas(p.h), kThreads, false, stream, args);
  if (error != cudaSuccess) return error;
  ChainPieces pieces;
  error = decode_in_chain(decode, &pieces, stream);
  if (error != cudaSuccess) return error;
  error = launch(values_kernel<T>, p.h * kHeadCtas, kThreads, false, stream, args, pieces);
  if (error != cudaSuccess) return error;
  return launch(norm ? output_kernel<T, true> : output_kernel<T, false>,
                p.d / kOutputColumns * kOutputSplit, kWideThreads, false, stream, args);
}

}  // namespace
}  // namespace mla::layer

extern "C" size_t mla_sm90_layer_workspace_bytes(int32_t h) {
  mla::layer::Scratch scratch;
  char* rest;
  return mla::layer::lay_out(h, nullptr, &scratch, &rest) + mla::chain_workspace_bytes(h);
}

extern "C" int mla_sm90_layer(const MlaLayerParams* params, void* stream) {
  using namespace mla::layer;
  const MlaLayerParams& p = *params;
  if (p.c != kLatent || p.r != kRotated || p.n != kNope || p.v != kValue || p.h < 1 ||
      p.h > MLA_SM90_LAYER_MAX_HEADS || p.d < 1 || p.d % 512 != 0 ||
      p.d > MLA_SM90_LAYER_MAX_WIDTH || p.dtype == MLA_F32 || p.layer < 0 ||
      p.layer >= p.num_layers || p.num_pages < 1 || p.max_pages < 1 ||
      !mla_sm90_takes_page_size(p.page_size) ||
      int64_t{p.max_pages} * p.page_size > MLA_SM90_MAX_SEQUENCE_TOKENS) {
    return cudaErrorInvalidValue;
  }
  return p.dtype == MLA_BF16 ? launch_layer<__nv_bfloat16>(p, static_cast<cudaStream_t>(stream))
                             : launch_layer<__half>(p, static_cast<cudaStream_t>(stream));
}

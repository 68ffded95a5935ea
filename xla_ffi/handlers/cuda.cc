// Copyright 2026 The mla-jax Authors
// SPDX-License-Identifier: Apache-2.0
//
// What XLA calls on a GPU. Nothing is allocated or waited for and nothing outlives a call, so calls
// may be recorded in a command buffer, replayed, and run side by side on any number of devices.

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>

#include "handlers/check.h"
#include "mla.h"

namespace mla {
namespace {

// The most multiprocessors that a device of compute capability 9.0 has.
constexpr int kMaxMultiprocessors = 144;
// The counters, which the kernel clears, lie first in the workspace; what follows stays aligned.
constexpr size_t kCountersBytes = (sizeof(uint32_t) * MLA_SM90_COUNTERS + 127) / 128 * 128;

size_t WorkspaceBytes(const MlaDecodeParams& p) {
  return kCountersBytes + mla_sm90_decode_workspace_bytes(&p, kMaxMultiprocessors);
}

// What the kernel takes of what the op allows. No call to CUDA: tests reach this without a GPU.
ffi::Error CheckCuda(ffi::AnyBuffer q, ffi::AnyBuffer k_cache, ffi::AnyBuffer block_table,
                     ffi::AnyBuffer cache_seqlens, std::optional<ffi::AnyBuffer> q_pe,
                     ffi::AnyBuffer out, ffi::AnyBuffer lse, ffi::AnyBuffer workspace,
                     float softmax_scale, bool causal, bool batch_invariant, MlaDecodeParams& p) {
  int64_t dims[4];
  XLA_FFI_Buffer whole = {};
  if (q_pe.has_value()) {  // q in two parts, checked as the whole that they are
    if (q.dimensions().size() != 3 || q.dimensions()[2] != 512) {
      return Invalid("q", Describe(q), "[h_q, b, 512] beside q_pe");
    }
    const int64_t h_q = q.dimensions()[0], b = q.dimensions()[1];
    const auto rotated = q_pe->dimensions();
    if (q_pe->element_type() != q.element_type() || rotated.size() != 3 || rotated[0] != b ||
        rotated[1] != h_q || rotated[2] != 64) {
      return Invalid("q_pe", Describe(*q_pe), "[b, h_q, 64] of q's dtype, as q has them");
    }
    if (k_cache.dimensions().size() != 4 || k_cache.dimensions()[2] != 1) {
      return Invalid("k_cache", Describe(k_cache), "4 axes, one head beside q_pe");
    }
    p.q_pe = q_pe->untyped_data();
    const int64_t shape[4] = {b, 1, h_q, 576};
    std::copy_n(shape, 4, dims);
    whole.struct_size = XLA_FFI_Buffer_STRUCT_SIZE;
    whole.dtype = static_cast<XLA_FFI_DataType>(q.element_type());
    whole.data = q.untyped_data();
    whole.rank = 4;
    whole.dims = dims;
    q = ffi::AnyBuffer(&whole);
  }
  ffi::Error error =
      Check(q, k_cache, block_table, cache_seqlens, out, lse, softmax_scale, causal, p);
  if (error.failure()) return error;
  if (p.dtype == MLA_F32) return Invalid("q", Describe(q), "bfloat16 or float16 on a GPU");
  if (p.d_k != 576 && p.d_k != 512) {
    return Invalid("q", "d_k " + std::to_string(p.d_k), "576 or 512 on a GPU");
  }
  if (p.d_v != 512) {
    return Invalid("out", "head_dim_v " + std::to_string(p.d_v), "512 on a GPU");
  }
  if (p.page_size != 16 && p.page_size != 32 && p.page_size != 64 && p.page_size != 128) {
    return Invalid("k_cache", "page_size " + std::to_string(p.page_size),
                   "16, 32, 64 or 128 on a GPU");
  }
  const int64_t tokens = int64_t{p.max_pages_per_seq} * p.page_size;
  if (tokens > MLA_SM90_MAX_SEQUENCE_TOKENS || tokens * p.b > MLA_SM90_MAX_BATCH_TOKENS) {
    return Invalid("block_table", Describe(block_table),
                   "pages of at most 2^30 tokens a sequence and 2^34 in all on a GPU");
  }
  p.batch_invariant = batch_invariant;
  if (workspace.size_bytes() < WorkspaceBytes(p)) {
    return Invalid("workspace", std::to_string(workspace.size_bytes()) + " bytes",
                   "at least " + std::to_string(WorkspaceBytes(p)));
  }
  auto* bytes = static_cast<char*>(workspace.untyped_data());
  p.counters = reinterpret_cast<uint32_t*>(bytes);
  p.workspace = bytes + kCountersBytes;
  return ffi::Error::Success();
}

ffi::Error Failed(const std::string& what, cudaError_t error) {
  return ffi::Error::Internal(what + ": " + cudaGetErrorName(error) + ", " +
                              cudaGetErrorString(error));
}

// Whether the current device, which XLA has made that of the stream, runs the kernels.
ffi::Error CheckDevice(const std::string& target) {
  int device = 0, major = 0, minor = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  }
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  }
  if (error != cudaSuccess) return Failed(target + ": the device", error);
  if (major != 9 || minor != 0) {
    return Invalid("device " + std::to_string(device),
                   "compute capability " + std::to_string(major) + "." + std::to_string(minor),
                   "9.0 (Hopper)", target);
  }
  return ffi::Error::Success();
}

ffi::Error DecodeCuda(cudaStream_t stream, ffi::AnyBuffer q, ffi::AnyBuffer k_cache,
                      ffi::AnyBuffer block_table, ffi::AnyBuffer cache_seqlens,
                      std::optional<ffi::AnyBuffer> q_pe, ffi::Result<ffi::AnyBuffer> out,
                      ffi::Result<ffi::AnyBuffer> lse, ffi::Result<ffi::AnyBuffer> workspace,
                      float softmax_scale, bool causal, bool batch_invariant) {
  MlaDecodeParams params = {};
  ffi::Error refused = CheckCuda(q, k_cache, block_table, cache_seqlens, q_pe, *out, *lse,
                                 *workspace, softmax_scale, causal, batch_invariant, params);
  if (refused.failure()) return refused;
  refused = CheckDevice("mla_jax_decode");
  if (refused.failure()) return refused;
  const auto error = static_cast<cudaError_t>(mla_sm90_decode(&params, stream));
  if (error != cudaSuccess) return Failed("mla_jax_decode: launching the kernel", error);
  return ffi::Error::Success();
}

ffi::Error CheckAppendCuda(ffi::AnyBuffer pages, ffi::AnyBuffer latents, ffi::AnyBuffer scale,
                           ffi::AnyBuffer cos, ffi::AnyBuffer sin, ffi::AnyBuffer block_table,
                           ffi::AnyBuffer seqlens, ffi::AnyBuffer num_new, ffi::AnyBuffer place,
                           ffi::AnyBuffer result, int32_t num_layers, int32_t num_pages,
                           int32_t page_size, float epsilon, bool interleaved, MlaAppendParams& p) {
  ffi::Error error =
      CheckAppend(pages, latents, scale, cos, sin, block_table, seqlens, num_new, place, result,
                  num_layers, num_pages, page_size, epsilon, interleaved, p);
  if (error.failure()) return error;
  if (p.dtype == MLA_F32) {
    return Invalid("pages", Describe(pages), "bfloat16 or float16 on a GPU", "mla_jax_append");
  }
  if (p.c != 512 || p.r != 64) {
    return Invalid("scale", Describe(scale), "512 channels, and 64 to rotate, on a GPU",
                   "mla_jax_append");
  }
  return ffi::Error::Success();
}

ffi::Error AppendCuda(cudaStream_t stream, ffi::AnyBuffer pages, ffi::AnyBuffer latents,
                      ffi::AnyBuffer scale, ffi::AnyBuffer cos, ffi::AnyBuffer sin,
                      ffi::AnyBuffer block_table, ffi::AnyBuffer seqlens, ffi::AnyBuffer num_new,
                      ffi::AnyBuffer place, ffi::Result<ffi::AnyBuffer> result, int32_t num_layers,
                      int32_t num_pages, int32_t page_size, float epsilon, bool interleaved) {
  MlaAppendParams params = {};
  ffi::Error refused =
      CheckAppendCuda(pages, latents, scale, cos, sin, block_table, seqlens, num_new, place,
                      *result, num_layers, num_pages, page_size, epsilon, interleaved, params);
  if (refused.failure()) return refused;
  refused = CheckDevice("mla_jax_append");
  if (refused.failure()) return refused;
  const auto error = static_cast<cudaError_t>(mla_sm90_append(&params, stream));
  if (error != cudaSuccess) return Failed("mla_jax_append: launching the kernel", error);
  return ffi::Error::Success();
}

// The checks alone, for tests where there is no GPU.
ffi::Error CheckAppendOnly(ffi::AnyBuffer pages, ffi::AnyBuffer latents, ffi::AnyBuffer scale,
                           ffi::AnyBuffer cos, ffi::AnyBuffer sin, ffi::AnyBuffer block_table,
                           ffi::AnyBuffer seqlens, ffi::AnyBuffer num_new, ffi::AnyBuffer place,
                           ffi::Result<ffi::AnyBuffer> result, int32_t num_layers,
                           int32_t num_pages, int32_t page_size, float epsilon, bool interleaved) {
  MlaAppendParams params = {};
  return CheckAppendCuda(pages, latents, scale, cos, sin, block_table, seqlens, num_new, place,
                         *result, num_layers, num_pages, page_size, epsilon, interleaved, params);
}

ffi::Error CheckOnly(ffi::AnyBuffer q, ffi::AnyBuffer k_cache, ffi::AnyBuffer block_table,
                     ffi::AnyBuffer cache_seqlens, std::optional<ffi::AnyBuffer> q_pe,
                     ffi::Result<ffi::AnyBuffer> out, ffi::Result<ffi::AnyBuffer> lse,
                     ffi::Result<ffi::AnyBuffer> workspace, float softmax_scale, bool causal,
                     bool batch_invariant) {
  MlaDecodeParams params = {};
  return CheckCuda(q, k_cache, block_table, cache_seqlens, q_pe, *out, *lse, *workspace,
                   softmax_scale, causal, batch_invariant, params);
}

template <typename Binding>
auto Operands(Binding binding) {
  return std::move(binding)
      .template Arg<ffi::AnyBuffer>()          // q, its heads in the order of mla.h
      .template Arg<ffi::AnyBuffer>()          // k_cache
      .template Arg<ffi::AnyBuffer>()          // block_table
      .template Arg<ffi::AnyBuffer>()          // cache_seqlens
      .template OptionalArg<ffi::AnyBuffer>()  // q_pe, where q is in two parts
      .template Ret<ffi::AnyBuffer>()          // out
      .template Ret<ffi::AnyBuffer>()          // lse
      .template Ret<ffi::AnyBuffer>()          // workspace: mla_jax_cuda_workspace_bytes() bytes
      .template Attr<float>("softmax_scale")
      .template Attr<bool>("causal")
      .template Attr<bool>("batch_invariant");
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(mla_jax_decode_cuda, DecodeCuda,
                              Operands(ffi::Ffi::Bind().Ctx<ffi::PlatformStream<cudaStream_t>>()),
                              {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER_SYMBOL(mla_jax_check_cuda, CheckOnly, Operands(ffi::Ffi::Bind()));
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    mla_jax_append_cuda, AppendCuda,
    AppendOperands(ffi::Ffi::Bind().Ctx<ffi::PlatformStream<cudaStream_t>>()),
    {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER_SYMBOL(mla_jax_check_append_cuda, CheckAppendOnly,
                              AppendOperands(ffi::Ffi::Bind()));

}  // namespace mla

// Bytes of the result `workspace` of a call of these sizes, on any device.
extern "C" size_t mla_jax_cuda_workspace_bytes(int32_t b, int32_t s_q, int32_t h_q, int32_t h_kv,
                                               int32_t max_pages_per_seq, int32_t page_size,
                                               int32_t batch_invariant) {
  MlaDecodeParams p = {};
  p.b = b;
  p.s_q = s_q;
  p.h_q = h_q;
  p.h_kv = h_kv;
  p.max_pages_per_seq = max_pages_per_seq;
  p.page_size = page_size;
  p.batch_invariant = batch_invariant;
  return mla::WorkspaceBytes(p);
}

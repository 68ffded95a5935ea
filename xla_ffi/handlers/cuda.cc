// Copyright 2026 The mla-jax Authors
// SPDX-License-Identifier: Apache-2.0
//
// What XLA calls on a GPU. Nothing is allocated or waited for and nothing outlives a call, so calls
// may be recorded in a command buffer, replayed, and run side by side on any number of devices.

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
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
  if (!mla_sm90_takes_page_size(p.page_size)) {
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

// All of a layer: its operands, results and attributes in the order of LayerOperands.
ffi::Error CheckLayer(ffi::AnyBuffer pages, ffi::AnyBuffer x, ffi::AnyBuffer w_q,
                      ffi::AnyBuffer w_kv, ffi::AnyBuffer kv_norm, ffi::AnyBuffer w_uk,
                      ffi::AnyBuffer w_uv, ffi::AnyBuffer w_o, ffi::AnyBuffer cos,
                      ffi::AnyBuffer sin, ffi::AnyBuffer block_table, ffi::AnyBuffer seqlens,
                      ffi::AnyBuffer num_new, std::optional<ffi::AnyBuffer> norm,
                      ffi::Result<ffi::AnyBuffer> result, ffi::Result<ffi::AnyBuffer> y,
                      ffi::Result<ffi::AnyBuffer> workspace, int32_t layer, int32_t num_layers,
                      int32_t num_pages, float norm_epsilon, float kv_norm_epsilon,
                      float softmax_scale, bool interleaved, MlaLayerParams& p) {
  constexpr int64_t c = 512, r = 64, n = 128, v = 128;
  const auto invalid = [](const char* operand, const std::string& got,
                          const std::string& expected) {
    return Invalid(operand, got, expected, "mla_jax_layer");
  };
  const ffi::DataType dtype = pages.element_type();
  if (dtype != ffi::DataType::BF16 && dtype != ffi::DataType::F16) {
    return invalid("pages", Describe(pages), "bfloat16 or float16");
  }
  const auto rows = pages.dimensions();
  if (rows.size() != 4 || rows[2] != 1 || rows[3] != c + r) {
    return invalid("pages", Describe(pages), "[num_layers * num_pages, page_size, 1, 576]");
  }
  const int64_t page_size = rows[1];
  if (!mla_sm90_takes_page_size(page_size)) {
    return invalid("pages", "page_size " + std::to_string(page_size), "16, 32, 64 or 128");
  }
  for (const auto& [name, count] :
       {std::pair{"num_layers", num_layers}, {"num_pages", num_pages}}) {
    if (count < 1) return invalid(name, std::to_string(count), "at least 1");
  }
  const int64_t num_rows = int64_t{num_layers} * num_pages;
  if (rows[0] != num_rows || num_rows > INT32_MAX) {
    return invalid("pages", std::to_string(rows[0]) + " rows",
                   "num_layers * num_pages = " + std::to_string(num_rows) + ", less than 2^31");
  }
  if (layer < 0 || layer >= num_layers) {
    return invalid("layer", std::to_string(layer),
                   "0 <= layer < num_layers = " + std::to_string(num_layers));
  }
  const auto width = x.dimensions();
  const int64_t d = width.size() == 3 ? width[2] : 0;
  if (d < 512 || d % 512 != 0 || d > MLA_SM90_LAYER_MAX_WIDTH) {
    return invalid(
        "x", Describe(x),
        "[1, 1, d], d a multiple of 512 up to " + std::to_string(MLA_SM90_LAYER_MAX_WIDTH));
  }
  const auto heads = w_uk.dimensions();
  const int64_t h = heads.size() == 3 ? heads[0] : 0;
  if (h < 1 || h > MLA_SM90_LAYER_MAX_HEADS) {
    return invalid("w_uk", Describe(w_uk),
                   "[h, 512, 128], 1 <= h <= " + std::to_string(MLA_SM90_LAYER_MAX_HEADS));
  }
  const auto table = block_table.dimensions();
  const int64_t max_pages = table.size() == 2 ? table[1] : 0;
  if (max_pages < 1 || max_pages > MLA_SM90_MAX_SEQUENCE_TOKENS / page_size) {
    return invalid("block_table", Describe(block_table),
                   "int32[1, max_pages], pages of 1 to 2^30 tokens in all");
  }
  ffi::Error error = ffi::Error::Success();
  const auto is = [&](const char* operand, const ffi::AnyBuffer& got, ffi::DataType type,
                      std::initializer_list<int64_t> shape) {
    const auto dims = got.dimensions();
    const bool right = got.element_type() == type &&
                       std::equal(dims.begin(), dims.end(), shape.begin(), shape.end());
    if (!right) {
      error = invalid(operand, Describe(got), Describe(type, shape.begin(), shape.size()));
    }
    return right;
  };
  const auto f32 = ffi::DataType::F32, s32 = ffi::DataType::S32;
  if (!is("x", x, dtype, {1, 1, d}) || !is("w_q", w_q, dtype, {d, h * (n + r)}) ||
      !is("w_kv", w_kv, dtype, {d, c + r}) || !is("kv_norm", kv_norm, dtype, {c}) ||
      !is("w_uk", w_uk, dtype, {h, c, n}) || !is("w_uv", w_uv, dtype, {h, c, v}) ||
      !is("w_o", w_o, dtype, {h * v, d}) || !is("cos", cos, f32, {1, 1, r / 2}) ||
      !is("sin", sin, f32, {1, 1, r / 2}) || !is("block_table", block_table, s32, {1, max_pages}) ||
      !is("seqlens", seqlens, s32, {1}) || !is("num_new", num_new, s32, {1}) ||
      (norm.has_value() && !is("norm", *norm, dtype, {d})) || !is("y", *y, dtype, {1, 1, d})) {
    return error;
  }
  for (const auto& [name, epsilon] :
       {std::pair{"norm_epsilon", norm_epsilon}, std::pair{"kv_norm_epsilon", kv_norm_epsilon}}) {
    if (!(epsilon >= 0) || !std::isfinite(epsilon)) {
      return invalid(name, std::to_string(epsilon), "a finite number of at least 0");
    }
  }
  if (!(softmax_scale > 0) || !std::isfinite(softmax_scale)) {
    return invalid("softmax_scale", std::to_string(softmax_scale), "a positive finite number");
  }
  if (!is("result", *result, dtype, {num_rows, page_size, 1, c + r})) return error;
  if (result->untyped_data() != pages.untyped_data()) {
    return invalid("result", Describe(*result) + " of its own",
                   "the memory of pages, " + Describe(pages));
  }
  const size_t bytes = mla_sm90_layer_workspace_bytes(static_cast<int32_t>(h));
  if (workspace->size_bytes() < bytes) {
    return invalid("workspace", std::to_string(workspace->size_bytes()) + " bytes",
                   "at least " + std::to_string(bytes));
  }

  p.x = x.untyped_data();
  p.norm = norm.has_value() ? norm->untyped_data() : nullptr;
  p.w_q = w_q.untyped_data();
  p.w_kv = w_kv.untyped_data();
  p.kv_norm = kv_norm.untyped_data();
  p.w_uk = w_uk.untyped_data();
  p.w_uv = w_uv.untyped_data();
  p.w_o = w_o.untyped_data();
  p.cos = static_cast<const float*>(cos.untyped_data());
  p.sin = static_cast<const float*>(sin.untyped_data());
  p.block_table = static_cast<const int32_t*>(block_table.untyped_data());
  p.seqlen = static_cast<const int32_t*>(seqlens.untyped_data());
  p.num_new = static_cast<const int32_t*>(num_new.untyped_data());
  p.pages = pages.untyped_data();
  p.y = y->untyped_data();
  p.workspace = workspace->untyped_data();
  p.d = static_cast<int32_t>(d);
  p.h = static_cast<int32_t>(h);
  p.n = n;
  p.r = r;
  p.c = c;
  p.v = v;
  p.layer = layer;
  p.num_layers = num_layers;
  p.num_pages = num_pages;
  p.page_size = static_cast<int32_t>(page_size);
  p.max_pages = static_cast<int32_t>(max_pages);
  p.norm_epsilon = norm_epsilon;
  p.kv_norm_epsilon = kv_norm_epsilon;
  p.softmax_scale = softmax_scale;
  p.interleaved = interleaved;
  p.dtype = dtype == ffi::DataType::BF16 ? MLA_BF16 : MLA_F16;
  return ffi::Error::Success();
}

// The arguments of the handlers of a layer are those of its check, which names them.
constexpr auto LayerCuda = [](cudaStream_t stream, auto... arguments) {
  MlaLayerParams params = {};
  ffi::Error refused = CheckLayer(arguments..., params);
  if (refused.failure()) return refused;
  refused = CheckDevice("mla_jax_layer");
  if (refused.failure()) return refused;
  const auto error = static_cast<cudaError_t>(mla_sm90_layer(&params, stream));
  if (error != cudaSuccess) return Failed("mla_jax_layer: launching the kernels", error);
  return ffi::Error::Success();
};

constexpr auto CheckLayerOnly = [](auto... arguments) {
  MlaLayerParams params = {};
  return CheckLayer(arguments..., params);
};

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

template <typename Binding>
auto LayerOperands(Binding binding) {
  return std::move(binding)
      .template Arg<ffi::AnyBuffer>()          // pages
      .template Arg<ffi::AnyBuffer>()          // x
      .template Arg<ffi::AnyBuffer>()          // w_q
      .template Arg<ffi::AnyBuffer>()          // w_kv
      .template Arg<ffi::AnyBuffer>()          // kv_norm
      .template Arg<ffi::AnyBuffer>()          // w_uk
      .template Arg<ffi::AnyBuffer>()          // w_uv
      .template Arg<ffi::AnyBuffer>()          // w_o
      .template Arg<ffi::AnyBuffer>()          // cos
      .template Arg<ffi::AnyBuffer>()          // sin
      .template Arg<ffi::AnyBuffer>()          // block_table
      .template Arg<ffi::AnyBuffer>()          // seqlens
      .template Arg<ffi::AnyBuffer>()          // num_new
      .template OptionalArg<ffi::AnyBuffer>()  // norm, where the layer has its own
      .template Ret<ffi::AnyBuffer>()          // pages again, the same memory
      .template Ret<ffi::AnyBuffer>()          // y
      .template Ret<ffi::AnyBuffer>()  // workspace: mla_jax_cuda_layer_workspace_bytes() bytes
      .template Attr<int32_t>("layer")
      .template Attr<int32_t>("num_layers")
      .template Attr<int32_t>("num_pages")
      .template Attr<float>("norm_epsilon")
      .template Attr<float>("kv_norm_epsilon")
      .template Attr<float>("softmax_scale")
      .template Attr<bool>("interleaved");
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
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    mla_jax_layer_cuda, LayerCuda,
    LayerOperands(ffi::Ffi::Bind().Ctx<ffi::PlatformStream<cudaStream_t>>()),
    {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER_SYMBOL(mla_jax_check_layer_cuda, CheckLayerOnly,
                              LayerOperands(ffi::Ffi::Bind()));

}  // namespace mla

// Bytes of the result `workspace` of a layer of `h` heads.
extern "C" size_t mla_jax_cuda_layer_workspace_bytes(int32_t h) {
  return mla_sm90_layer_workspace_bytes(h);
}

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

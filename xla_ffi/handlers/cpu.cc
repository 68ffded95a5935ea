// Copyright 2026 The mla-jax Authors
// SPDX-License-Identifier: Apache-2.0
//
// What XLA calls on a CPU.

#include <cstdint>

#include "handlers/check.h"
#include "mla.h"

namespace mla {
namespace {

void Schedule(void* pool, void (*task)(void* data), void* data) {
  static_cast<ffi::ThreadPool*>(pool)->Schedule([task, data] { task(data); });
}

ffi::Error DecodeCpu(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer k_cache,
                     ffi::AnyBuffer block_table, ffi::AnyBuffer cache_seqlens,
                     ffi::Result<ffi::AnyBuffer> out, ffi::Result<ffi::AnyBuffer> lse,
                     float softmax_scale, bool causal) {
  MlaDecodeParams params = {};
  ffi::Error error =
      Check(q, k_cache, block_table, cache_seqlens, *out, *lse, softmax_scale, causal, params);
  if (error.failure()) return error;
  const MlaThreads threads = {&pool, static_cast<int32_t>(pool.num_threads()), Schedule};
  if (mla_cpu_decode(&params, &threads) != 0) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted,
                      "mla_jax_decode: no memory for the working arrays of the threads");
  }
  return ffi::Error::Success();
}

ffi::Error AppendCpu(ffi::AnyBuffer pages, ffi::AnyBuffer latents, ffi::AnyBuffer scale,
                     ffi::AnyBuffer cos, ffi::AnyBuffer sin, ffi::AnyBuffer block_table,
                     ffi::AnyBuffer seqlens, ffi::AnyBuffer num_new, ffi::AnyBuffer place,
                     ffi::Result<ffi::AnyBuffer> result, int32_t num_layers, int32_t num_pages,
                     int32_t page_size, float epsilon, bool interleaved) {
  MlaAppendParams params = {};
  ffi::Error error =
      CheckAppend(pages, latents, scale, cos, sin, block_table, seqlens, num_new, place, *result,
                  num_layers, num_pages, page_size, epsilon, interleaved, params);
  if (error.failure()) return error;
  mla_cpu_append(&params);
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(mla_jax_append_cpu, AppendCpu, AppendOperands(ffi::Ffi::Bind()));
XLA_FFI_DEFINE_HANDLER_SYMBOL(mla_jax_decode_cpu, DecodeCpu,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()  // q
                                  .Arg<ffi::AnyBuffer>()  // k_cache
                                  .Arg<ffi::AnyBuffer>()  // block_table
                                  .Arg<ffi::AnyBuffer>()  // cache_seqlens
                                  .Ret<ffi::AnyBuffer>()  // out
                                  .Ret<ffi::AnyBuffer>()  // lse
                                  .Attr<float>("softmax_scale")
                                  .Attr<bool>("causal"));

}  // namespace mla

extern "C" const char* mla_jax_cpu_isa() { return mla_cpu_isa(); }

// Copyright 2026 The mla-jax Authors
// SPDX-License-Identifier: Apache-2.0
//
// What the handlers of all platforms check. Python has checked for people; here it is for memory
// safety, whoever writes the custom call.

#ifndef MLA_JAX_HANDLERS_CHECK_H_
#define MLA_JAX_HANDLERS_CHECK_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>

#include "mla.h"
#include "xla/ffi/api/ffi.h"

namespace mla {

namespace ffi = xla::ffi;

// For example bfloat16[2, 1, 16, 576].
std::string Describe(const ffi::AnyBuffer& x);
std::string Describe(ffi::DataType dtype, const int64_t* dims, size_t rank);

// An error that says which operand, result or attribute is wrong, what it is and what it may be.
ffi::Error Invalid(const std::string& operand, const std::string& got, const std::string& expected,
                   const std::string& target = "mla_jax_decode");

// Checks all of a decode but the limits of one platform's kernel, and fills `p` with it.
ffi::Error Check(const ffi::AnyBuffer& q, const ffi::AnyBuffer& k_cache,
                 const ffi::AnyBuffer& block_table, const ffi::AnyBuffer& cache_seqlens,
                 const ffi::AnyBuffer& out, const ffi::AnyBuffer& lse, float softmax_scale,
                 bool causal, MlaDecodeParams& p);

// The same of an append.
ffi::Error CheckAppend(const ffi::AnyBuffer& pages, const ffi::AnyBuffer& latents,
                       const ffi::AnyBuffer& scale, const ffi::AnyBuffer& cos,
                       const ffi::AnyBuffer& sin, const ffi::AnyBuffer& block_table,
                       const ffi::AnyBuffer& seqlens, const ffi::AnyBuffer& num_new,
                       const ffi::AnyBuffer& place, const ffi::AnyBuffer& result,
                       int32_t num_layers, int32_t num_pages, int32_t page_size, float epsilon,
                       bool interleaved, MlaAppendParams& p);

// What follows the stream, if any, in the binding of a handler of the append.
template <typename Binding>
auto AppendOperands(Binding binding) {
  return std::move(binding)
      .template Arg<ffi::AnyBuffer>()  // pages
      .template Arg<ffi::AnyBuffer>()  // latents
      .template Arg<ffi::AnyBuffer>()  // scale
      .template Arg<ffi::AnyBuffer>()  // cos
      .template Arg<ffi::AnyBuffer>()  // sin
      .template Arg<ffi::AnyBuffer>()  // block_table
      .template Arg<ffi::AnyBuffer>()  // seqlens
      .template Arg<ffi::AnyBuffer>()  // num_new
      .template Arg<ffi::AnyBuffer>()  // place
      .template Ret<ffi::AnyBuffer>()  // pages again, the same memory
      .template Attr<int32_t>("num_layers")
      .template Attr<int32_t>("num_pages")
      .template Attr<int32_t>("page_size")
      .template Attr<float>("epsilon")
      .template Attr<bool>("interleaved");
}

}  // namespace mla

// The version of the FFI that a library was built for: it runs under that one and newer ones.
extern "C" int mla_jax_ffi_major();
extern "C" int mla_jax_ffi_minor();

#endif  // MLA_JAX_HANDLERS_CHECK_H_

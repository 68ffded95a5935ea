// Copyright 2026 The mla-jax Authors
// SPDX-License-Identifier: Apache-2.0
//
// What the handlers of all platforms check. Python has checked for people; here it is for memory
// safety, whoever writes the custom call.

#ifndef MLA_JAX_HANDLERS_CHECK_H_
#define MLA_JAX_HANDLERS_CHECK_H_

#include <string>

#include "mla.h"
#include "xla/ffi/api/ffi.h"

namespace mla {

namespace ffi = xla::ffi;

// For example bfloat16[2, 1, 16, 576].
std::string Describe(const ffi::AnyBuffer& x);

// An error that says which operand, result or attribute is wrong, what it is and what it may be.
ffi::Error Invalid(const std::string& operand, const std::string& got, const std::string& expected);

// Checks all of a call but the limits of one platform's kernel, and fills `p` with it.
ffi::Error Check(const ffi::AnyBuffer& q, const ffi::AnyBuffer& k_cache,
                 const ffi::AnyBuffer& block_table, const ffi::AnyBuffer& cache_seqlens,
                 const ffi::AnyBuffer& out, const ffi::AnyBuffer& lse, float softmax_scale,
                 bool causal, MlaDecodeParams& p);

}  // namespace mla

// The version of the FFI that a library was built for: it runs under that one and newer ones.
extern "C" int mla_jax_ffi_major();
extern "C" int mla_jax_ffi_minor();

#endif  // MLA_JAX_HANDLERS_CHECK_H_

// Copyright 2026 The mla-jax Authors
// SPDX-License-Identifier: Apache-2.0

#include "handlers/check.h"

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <limits>
#include <sstream>

namespace mla {
namespace {

const char* NameOf(ffi::DataType dtype) {
  switch (dtype) {
    case ffi::DataType::BF16:
      return "bfloat16";
    case ffi::DataType::F16:
      return "float16";
    case ffi::DataType::F32:
      return "float32";
    case ffi::DataType::F64:
      return "float64";
    case ffi::DataType::S32:
      return "int32";
    case ffi::DataType::S64:
      return "int64";
    default:
      return "another dtype";
  }
}

bool HasShape(const ffi::AnyBuffer& x, std::initializer_list<int64_t> shape) {
  const auto dims = x.dimensions();
  return std::equal(dims.begin(), dims.end(), shape.begin(), shape.end());
}

// An axis of an operand whose size the others follow.
struct Size {
  const char* operand;
  const char* axis;
  int64_t value;
  int64_t least;

  bool ok() const { return value >= least && value <= std::numeric_limits<int32_t>::max(); }
  std::string got() const {
    return std::string(axis) + (*axis == '\0' ? "" : " ") + std::to_string(value);
  }
  std::string expected() const {
    return "at least " + std::to_string(least) + " and less than 2^31";
  }
};

bool TakesDtype(ffi::DataType dtype, MlaDtype& p) {
  switch (dtype) {
    case ffi::DataType::BF16:
      p = MLA_BF16;
      return true;
    case ffi::DataType::F16:
      p = MLA_F16;
      return true;
    case ffi::DataType::F32:
      p = MLA_F32;
      return true;
    default:
      return false;
  }
}

}  // namespace

std::string Describe(ffi::DataType dtype, const int64_t* dims, size_t rank) {
  std::ostringstream text;
  text << NameOf(dtype) << "[";
  const char* separator = "";
  for (size_t axis = 0; axis < rank; ++axis) {
    text << separator << dims[axis];
    separator = ", ";
  }
  text << "]";
  return text.str();
}

std::string Describe(const ffi::AnyBuffer& x) {
  return Describe(x.element_type(), x.dimensions().begin(), x.dimensions().size());
}

ffi::Error Invalid(const std::string& operand, const std::string& got, const std::string& expected,
                   const std::string& target) {
  return ffi::Error::InvalidArgument(target + ": " + operand + ": got " + got + ", expected " +
                                     expected);
}

ffi::Error Check(const ffi::AnyBuffer& q, const ffi::AnyBuffer& k_cache,
                 const ffi::AnyBuffer& block_table, const ffi::AnyBuffer& cache_seqlens,
                 const ffi::AnyBuffer& out, const ffi::AnyBuffer& lse, float softmax_scale,
                 bool causal, MlaDecodeParams& p) {
  if (!TakesDtype(q.element_type(), p.dtype)) {
    return Invalid("q", Describe(q), "bfloat16, float16 or float32");
  }
  const std::string q_dtype = NameOf(q.element_type());
  if (q.dimensions().size() != 4) {
    return Invalid("q", Describe(q), "4 axes [b, s_q, h_q, d_k]");
  }
  if (k_cache.element_type() != q.element_type()) {
    return Invalid("k_cache", Describe(k_cache), "q's dtype " + q_dtype);
  }
  if (k_cache.dimensions().size() != 4) {
    return Invalid("k_cache", Describe(k_cache), "4 axes [num_pages, page_size, h_kv, d_k]");
  }
  if (block_table.element_type() != ffi::DataType::S32 || block_table.dimensions().size() != 2) {
    return Invalid("block_table", Describe(block_table), "int32[b, max_pages_per_seq]");
  }
  if (out.dimensions().size() != 4) {
    return Invalid("out", Describe(out), "4 axes [b, s_q, h_q, head_dim_v]");
  }
  const int64_t b = q.dimensions()[0], s_q = q.dimensions()[1], h_q = q.dimensions()[2];
  const int64_t d_k = q.dimensions()[3], h_kv = k_cache.dimensions()[2];
  const int64_t d_v = out.dimensions()[3];
  const int64_t num_pages = k_cache.dimensions()[0], page_size = k_cache.dimensions()[1];
  const int64_t max_pages = block_table.dimensions()[1];
  for (const Size& size :
       {Size{"q", "b", b, 0}, Size{"q", "s_q", s_q, 1}, Size{"q", "h_q", h_q, 1},
        Size{"q", "d_k", d_k, 1}, Size{"k_cache", "num_pages", num_pages, 1},
        Size{"k_cache", "page_size", page_size, 1}, Size{"k_cache", "h_kv", h_kv, 1},
        Size{"block_table", "max_pages_per_seq", max_pages, 1},
        Size{"out", "head_dim_v", d_v, 1}}) {
    if (!size.ok()) return Invalid(size.operand, size.got(), size.expected());
  }
  if (s_q * h_q > std::numeric_limits<int32_t>::max()) {
    return Invalid("q", Describe(q), "less than 2^31 rows s_q * h_q");
  }
  if (k_cache.dimensions()[3] != d_k) {
    return Invalid("k_cache", "d_k " + std::to_string(k_cache.dimensions()[3]),
                   "q's d_k " + std::to_string(d_k));
  }
  if (h_q % h_kv != 0) {
    return Invalid("q", std::to_string(h_q) + " heads",
                   "a multiple of k_cache's " + std::to_string(h_kv) + " heads");
  }
  if (block_table.dimensions()[0] != b) {
    return Invalid("block_table", Describe(block_table),
                   "int32[b=" + std::to_string(b) + ", max_pages_per_seq]");
  }
  if (cache_seqlens.element_type() != ffi::DataType::S32 || !HasShape(cache_seqlens, {b})) {
    return Invalid("cache_seqlens", Describe(cache_seqlens), "int32[b=" + std::to_string(b) + "]");
  }
  if (d_v > d_k) {
    return Invalid("out", "head_dim_v " + std::to_string(d_v),
                   "at most d_k " + std::to_string(d_k));
  }
  if (out.element_type() != q.element_type() || !HasShape(out, {b, s_q, h_q, d_v})) {
    return Invalid("out", Describe(out), q_dtype + "[b, s_q, h_q, head_dim_v] as q has them");
  }
  if (lse.element_type() != ffi::DataType::F32 || !HasShape(lse, {b, h_q, s_q})) {
    return Invalid("lse", Describe(lse), "float32[b, h_q, s_q] as q has them");
  }
  if (!(softmax_scale > 0) || !std::isfinite(softmax_scale)) {
    return Invalid("softmax_scale", std::to_string(softmax_scale), "a positive finite number");
  }

  p.q = q.untyped_data();
  p.k_cache = k_cache.untyped_data();
  p.block_table = static_cast<const int32_t*>(block_table.untyped_data());
  p.cache_seqlens = static_cast<const int32_t*>(cache_seqlens.untyped_data());
  p.out = out.untyped_data();
  p.lse = static_cast<float*>(lse.untyped_data());
  p.b = static_cast<int32_t>(b);
  p.s_q = static_cast<int32_t>(s_q);
  p.h_q = static_cast<int32_t>(h_q);
  p.h_kv = static_cast<int32_t>(h_kv);
  p.d_k = static_cast<int32_t>(d_k);
  p.d_v = static_cast<int32_t>(d_v);
  p.num_pages = static_cast<int32_t>(num_pages);
  p.page_size = static_cast<int32_t>(page_size);
  p.max_pages_per_seq = static_cast<int32_t>(max_pages);
  p.softmax_scale = softmax_scale;
  p.causal = causal;
  return ffi::Error::Success();
}

ffi::Error CheckAppend(const ffi::AnyBuffer& pages, const ffi::AnyBuffer& latents,
                       const ffi::AnyBuffer& scale, const ffi::AnyBuffer& cos,
                       const ffi::AnyBuffer& sin, const ffi::AnyBuffer& block_table,
                       const ffi::AnyBuffer& seqlens, const ffi::AnyBuffer& num_new,
                       const ffi::AnyBuffer& place, const ffi::AnyBuffer& result,
                       int32_t num_layers, int32_t num_pages, int32_t page_size, float epsilon,
                       bool interleaved, MlaAppendParams& p) {
  const auto invalid = [](const char* operand, const std::string& got,
                          const std::string& expected) {
    return Invalid(operand, got, expected, "mla_jax_append");
  };
  const auto is = [](const ffi::AnyBuffer& x, ffi::DataType dtype,
                     std::initializer_list<int64_t> shape) {
    return x.element_type() == dtype && HasShape(x, shape);
  };
  if (!TakesDtype(pages.element_type(), p.dtype)) {
    return invalid("pages", Describe(pages), "bfloat16, float16 or float32");
  }
  const std::string dtype = NameOf(pages.element_type());
  const auto rows = pages.dimensions();
  if (rows.size() != 4 || rows[2] != 1) {
    return invalid("pages", Describe(pages), "4 axes [num_rows, num_slots, 1, c + r]");
  }
  if (latents.element_type() != pages.element_type() || latents.dimensions().size() != 3 ||
      latents.dimensions()[2] != rows[3]) {
    return invalid("latents", Describe(latents),
                   dtype + "[b, t, c + r=" + std::to_string(rows[3]) + "]");
  }
  const int64_t b = latents.dimensions()[0], t = latents.dimensions()[1];
  if (!TakesDtype(scale.element_type(), p.scale_dtype) ||
      (p.scale_dtype != p.dtype && p.scale_dtype != MLA_F32) || scale.dimensions().size() != 1) {
    return invalid("scale", Describe(scale), dtype + "[c] or float32[c]");
  }
  const int64_t c = scale.dimensions()[0], r = rows[3] - c;
  if (c < 1 || r < 0 || r % 2 != 0) {
    return invalid("scale", Describe(scale),
                   "at least 1 channel, and an even number of the " + std::to_string(rows[3]) +
                       " left to rotate");
  }
  if (block_table.element_type() != ffi::DataType::S32 || block_table.dimensions().size() != 2 ||
      block_table.dimensions()[0] != b) {
    return invalid("block_table", Describe(block_table),
                   "int32[b=" + std::to_string(b) + ", max_pages_per_seq]");
  }
  const int64_t width = block_table.dimensions()[1];
  for (const Size& size :
       {Size{"pages", "num_rows", rows[0], 1}, Size{"pages", "num_slots", rows[1], 1},
        Size{"pages", "c + r", rows[3], 1}, Size{"latents", "b", b, 0}, Size{"latents", "t", t, 0},
        Size{"latents", "b * t", b * t, 0}, Size{"block_table", "max_pages_per_seq", width, 1},
        Size{"num_layers", "", num_layers, 1}, Size{"num_pages", "", num_pages, 1},
        Size{"page_size", "", page_size, 1}}) {
    if (!size.ok()) return invalid(size.operand, size.got(), size.expected());
  }
  for (const auto* table : {&cos, &sin}) {
    if (!is(*table, ffi::DataType::F32, {b, t, r / 2})) {
      return invalid(table == &cos ? "cos" : "sin", Describe(*table),
                     "float32[b, t, r / 2=" + std::to_string(r / 2) + "] as latents has them");
    }
  }
  for (const auto* counts : {&seqlens, &num_new}) {
    if (!is(*counts, ffi::DataType::S32, {b})) {
      return invalid(counts == &seqlens ? "seqlens" : "num_new", Describe(*counts),
                     "int32[b=" + std::to_string(b) + "]");
    }
  }
  if (!is(place, ffi::DataType::S32, {3})) return invalid("place", Describe(place), "int32[3]");
  if (!(epsilon >= 0) || !std::isfinite(epsilon)) {
    return invalid("epsilon", std::to_string(epsilon), "a finite number of at least 0");
  }
  if (!is(result, pages.element_type(), {rows[0], rows[1], rows[2], rows[3]}) ||
      result.untyped_data() != pages.untyped_data()) {
    return invalid("result", Describe(result) + " of its own",
                   "the memory of pages, " + Describe(pages));
  }

  p.pages = pages.untyped_data();
  p.latents = latents.untyped_data();
  p.scale = scale.untyped_data();
  p.cos = static_cast<const float*>(cos.untyped_data());
  p.sin = static_cast<const float*>(sin.untyped_data());
  p.block_table = static_cast<const int32_t*>(block_table.untyped_data());
  p.seqlens = static_cast<const int32_t*>(seqlens.untyped_data());
  p.num_new = static_cast<const int32_t*>(num_new.untyped_data());
  p.place = static_cast<const int32_t*>(place.untyped_data());
  p.b = static_cast<int32_t>(b);
  p.t = static_cast<int32_t>(t);
  p.c = static_cast<int32_t>(c);
  p.r = static_cast<int32_t>(r);
  p.num_rows = static_cast<int32_t>(rows[0]);
  p.num_slots = static_cast<int32_t>(rows[1]);
  p.num_layers = num_layers;
  p.num_pages = num_pages;
  p.page_size = page_size;
  p.max_pages_per_seq = static_cast<int32_t>(width);
  p.epsilon = epsilon;
  p.interleaved = interleaved;
  return ffi::Error::Success();
}

}  // namespace mla

extern "C" int mla_jax_ffi_major() { return XLA_FFI_API_MAJOR; }
extern "C" int mla_jax_ffi_minor() { return XLA_FFI_API_MINOR; }

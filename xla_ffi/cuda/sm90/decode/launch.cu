// Copyright 2026 The mla-jax Authors
// SPDX-License-Identifier: Apache-2.0
//
// Launcher of the Hopper decode kernel.

#include <cuda.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "../../../mla.h"
#include "chain.h"
#include "kernel.cuh"
#include "narrow.cuh"
#include "wide.cuh"

namespace mla {
namespace {

constexpr size_t kSharedBytes = sizeof(Shared) + 1024;  // and room to align it
static_assert(2 * kMaxParts <= MLA_SM90_COUNTERS);

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

// The driver's tensor map encoder, without linking libcuda: the library must load without a GPU.
cudaError_t encode_tiled(EncodeTiled* encode) {
  void* f = nullptr;
  cudaDriverEntryPointQueryResult found;
  cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &f, 12000,
                                                       cudaEnableDefault, &found);
  if (error != cudaSuccess) return error;
  if (found != cudaDriverEntryPointSuccess) return cudaErrorNotSupported;
  *encode = reinterpret_cast<EncodeTiled>(f);
  return cudaSuccess;
}

// An array [n3, n1, n2, n0] of 16-bit elements, row-major but for the steps given, in bytes.
struct Tensor {
  const void* base;
  uint64_t n0, n1, n2, n3;
  uint64_t step1 = n2 * n0 * 2, step2 = n0 * 2, step3 = n1 * step1;
};

// Describes it; a box is `box1` rows of dimension 1 by `pieces` of 64 elements of dimension 0, each
// piece a swizzled block of its own in shared memory.
cudaError_t make_map(EncodeTiled encode, CUtensorMap* map, const Tensor& x, MlaDtype dtype,
                     int box1, int pieces) {
  const cuuint64_t sizes[5] = {64, x.n1, x.n0 / 64, x.n2, x.n3};
  const cuuint64_t strides[4] = {x.step1, 128, x.step2, x.step3};
  const cuuint32_t box[5] = {64, static_cast<cuuint32_t>(box1), static_cast<cuuint32_t>(pieces), 1,
                             1};
  const cuuint32_t steps[5] = {1, 1, 1, 1, 1};
  const CUresult result = encode(
      map, dtype == MLA_BF16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
      5, const_cast<void*>(x.base), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// Where partial results go: how many, and the bytes of one.
struct Slots {
  int64_t count;
  size_t bytes;
  size_t size() const { return count * (bytes + 2 * kTileRows * sizeof(float2)); }
};

int64_t num_groups(int rows, int h_kv, int height) {
  return (int64_t{rows} + height - 1) / height * h_kv;
}

int64_t max_tokens(const MlaDecodeParams& p) { return int64_t{p.max_pages_per_seq} * p.page_size; }

// The most blocks of one sequence.
int most_blocks(const MlaDecodeParams& p) {
  return std::max(static_cast<int>((max_tokens(p) + kBlockTokens - 1) / kBlockTokens), 1);
}

// The most pieces of one sequence in batch-invariant decode.
int most_pieces(const MlaDecodeParams& p) { return most_fixed_pieces(most_blocks(p)); }

Slots slots_of(const MlaDecodeParams& p, int num_sms) {
  if (!p.batch_invariant) {
    return {int64_t{2} * num_sms, kTileRows * kValueColumns * sizeof(float)};
  }
  const int rows = p.s_q * (p.h_q / p.h_kv);
  const size_t of_row = kValueColumns * sizeof(float);
  return {p.b * num_groups(rows, p.h_kv, kTileRows) * most_pieces(p),
          rows <= kNarrowRows ? kNarrowRows * of_row : kTileRows * of_row / 2};
}

// What is launched.
struct Plan {
  DecodeArgs args;  // but where partial results go
  int64_t ctas;
  bool narrow;
};

Plan plan_of(const MlaDecodeParams& p, int num_sms) {
  Plan plan;
  auto& [args, ctas, narrow] = plan;
  args.block_table = p.block_table;
  args.seqlens = p.cache_seqlens;
  args.out = p.out;
  args.lse = p.lse;
  args.counters = p.counters;
  args.b = p.b;
  args.s_q = p.s_q;
  args.h_q = p.h_q;
  args.h_kv = KnownDivisor::of(p.h_kv);
  args.heads_per_kv = KnownDivisor::of(p.h_q / p.h_kv);
  args.rows = p.s_q * args.heads_per_kv.value;
  args.page_size = p.page_size;
  args.page_shift = __builtin_ctz(p.page_size);
  args.max_pages_per_seq = p.max_pages_per_seq;
  args.scale_log2 = p.softmax_scale * 1.4426950408889634f;
  args.causal = p.causal != 0;
  args.query_pieces = static_cast<int>(p.q_pe != nullptr ? p.d_v : p.d_k) / 64;

  // With more tiles than multiprocessors nothing is split, and all tiles are high; so are those of
  // batch-invariant calls, whose pieces do not depend on how many there are.
  int64_t groups[kTileHeights];
  for (int i = 0; i < kTileHeights; ++i) {
    groups[i] = num_groups(args.rows, p.h_kv, tile_height(p.batch_invariant ? 0 : i));
  }
  ctas = std::max<int64_t>(std::min(num_sms, kMaxParts), groups[0]);
  lay_out(args.grids, groups, static_cast<int>(ctas), p.b);
  args.fixed_pieces = most_pieces(p);
  args.cooperative = !p.batch_invariant && args.grids[0].parts.value > 1;
  static_assert(tile_height(kTileHeights - 1) <= kNarrowRows);
  const int64_t room = int64_t{p.b} * most_blocks(p);
  narrow = args.rows <= kNarrowRows || prefer_lowest(args.grids, room);
  return plan;
}

// Lets a kernel start while the one before it runs.
cudaLaunchAttribute starts_early() {
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  return attribute;
}

template <typename Tile>
cudaError_t launch_combination(const MlaDecodeParams& p, const DecodeArgs& args,
                               cudaStream_t stream) {
  const int bytes = fixed_combine_bytes(args.fixed_pieces);
  const auto kernel = combine_kernel<Tile>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute attribute = starts_early();
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(p.b * args.grids[0].groups.value * kFixedShares);
  config.blockDim = dim3(kConsumerThreads);
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, args);
}

template <typename Tile, int kPieces, Form kForm>
cudaError_t launch(const MlaDecodeParams& p, const Plan& plan, cudaStream_t stream) {
  const DecodeArgs& args = plan.args;
  QueryMaps query_maps;
  CacheMaps cache_maps;
  EncodeTiled encode;
  cudaError_t error = encode_tiled(&encode);
  if (error != cudaSuccess) return error;
  const uint64_t d_k = p.d_k, d_v = p.d_v, h_kv = p.h_kv, b = p.b, rows = args.rows;
  Tensor values = {p.q, d_k, rows, h_kv, b};
  Tensor last = values;
  last.base = static_cast<const char*>(p.q) + d_v * 2;
  last.n0 = d_k - d_v;
  if (p.q_pe != nullptr) {
    values = {p.q, d_v, rows, 1, b, /*step1=*/b * d_v * 2, /*step2=*/d_v * 2, /*step3=*/d_v * 2};
    last = {p.q_pe, d_k - d_v, rows, 1, b};
  }
  for (int i = 0; i < kTileHeights; ++i) {
    const QueryBox box = query_box(args.rows, i, Tile::kQueryStride, args.query_pieces);
    error = make_map(encode, &query_maps.values[i], values, p.dtype, box.rows, box.pieces);
    if (error == cudaSuccess && last.n0 > 0) {
      error = make_map(encode, &query_maps.last[i], last, p.dtype, box.rows, 1);
    }
    if (error != cudaSuccess) return error;
  }
  const Tensor cache = {p.k_cache, d_k, static_cast<uint64_t>(p.page_size), h_kv,
                        static_cast<uint64_t>(p.num_pages)};
  for (int pieces : {1, 2}) {
    error = make_map(encode, pieces == 1 ? &cache_maps.one : &cache_maps.two, cache, p.dtype,
                     std::min(p.page_size, kBlockTokens), pieces);
    if (error != cudaSuccess) return error;
  }

  const auto kernel = decode_kernel<Tile, kPieces, kForm>;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (error != cudaSuccess) return error;

  cudaLaunchAttribute attributes[1];
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(plan.ctas);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = kSharedBytes;
  config.stream = stream;
  config.attrs = attributes;
  if (kForm == Form::kChain) {
    attributes[0] = starts_early();
    config.numAttrs = 1;
  } else if (args.cooperative) {
    attributes[0].id = cudaLaunchAttributeCooperative;
    attributes[0].val.cooperative = 1;
    config.numAttrs = 1;
  }
  error = cudaLaunchKernelEx(&config, kernel, args, query_maps, cache_maps);
  if (error != cudaSuccess) return error;
  if constexpr (kForm == Form::kFixed) {
    if (args.fixed_pieces > 1) return launch_combination<Tile>(p, args, stream);
  }
  return cudaSuccess;
}

template <typename Tile, Form kForm>
cudaError_t dispatch(const MlaDecodeParams& p, const Plan& plan, cudaStream_t stream) {
  if constexpr (kForm != Form::kChain) {
    if (p.d_k != 576) return launch<Tile, 8, kForm>(p, plan, stream);
  }
  return launch<Tile, 9, kForm>(p, plan, stream);
}

template <typename T, Form kForm>
cudaError_t dispatch_tile(const MlaDecodeParams& p, const Plan& plan, cudaStream_t stream) {
  return plan.narrow ? dispatch<NarrowTile<T>, kForm>(p, plan, stream)
                     : dispatch<WideTile<T>, kForm>(p, plan, stream);
}

template <Form kForm>
cudaError_t dispatch_dtype(const MlaDecodeParams& p, const Plan& plan, cudaStream_t stream) {
  return p.dtype == MLA_BF16 ? dispatch_tile<__nv_bfloat16, kForm>(p, plan, stream)
                             : dispatch_tile<__half, kForm>(p, plan, stream);
}

cudaError_t multiprocessors(int* count) {
  int device;
  const cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  return cudaDeviceGetAttribute(count, cudaDevAttrMultiProcessorCount, device);
}

}  // namespace

size_t chain_workspace_bytes(int heads) {
  return size_t{kMaxParts} * heads * (kValueColumns * sizeof(float) + sizeof(float2));
}

cudaError_t decode_in_chain(const MlaDecodeParams& p, ChainPieces* pieces, cudaStream_t stream) {
  int num_sms;
  const cudaError_t error = multiprocessors(&num_sms);
  if (error != cudaSuccess) return error;
  Plan plan = plan_of(p, num_sms);
  DecodeArgs& args = plan.args;
  args.cooperative = false;
  auto* values = static_cast<float*>(p.workspace);
  auto* stats = reinterpret_cast<float2*>(values + size_t{kMaxParts} * p.h_q * kValueColumns);
  args.partial_out = reinterpret_cast<uint4*>(values);
  args.partial_stats = stats;
  *pieces = {values, stats, p.cache_seqlens, static_cast<int>(max_tokens(p)), {}};
  std::copy_n(args.grids, kTileHeights, pieces->grids);
  return dispatch_dtype<Form::kChain>(p, plan, stream);
}

}  // namespace mla

extern "C" size_t mla_sm90_decode_workspace_bytes(const MlaDecodeParams* params, int num_sms) {
  return mla::slots_of(*params, num_sms).size();
}

extern "C" int mla_sm90_decode(const MlaDecodeParams* params, void* stream) {
  using namespace mla;
  const MlaDecodeParams& p = *params;
  if ((p.d_k != 576 && p.d_k != 512) || p.d_v != kValueColumns || p.h_kv < 1 ||
      p.h_q % p.h_kv != 0 || !mla_sm90_takes_page_size(p.page_size)) {
    return cudaErrorInvalidValue;
  }
  if (p.num_pages < 1 || (p.q_pe != nullptr && (p.s_q != 1 || p.h_kv != 1 || p.d_k == p.d_v))) {
    return cudaErrorInvalidValue;
  }
  if (max_tokens(p) > MLA_SM90_MAX_SEQUENCE_TOKENS ||
      max_tokens(p) * p.b > MLA_SM90_MAX_BATCH_TOKENS) {
    return cudaErrorInvalidValue;
  }
  if (p.b == 0 || p.s_q == 0 || p.h_q == 0) return cudaSuccess;

  int num_sms;
  const cudaError_t error = multiprocessors(&num_sms);
  if (error != cudaSuccess) return error;

  Plan plan = plan_of(p, num_sms);
  DecodeArgs& args = plan.args;
  if (plan.ctas > INT32_MAX) return cudaErrorInvalidValue;
  const int64_t tiles = int64_t{p.b} * args.grids[0].groups.value;
  if (p.batch_invariant && tiles > INT32_MAX / kFixedShares) return cudaErrorInvalidValue;
  const Slots slots = slots_of(p, num_sms);
  args.slot_chunks = slots.bytes / sizeof(uint4);
  args.partial_out = static_cast<uint4*>(p.workspace);
  args.partial_stats = reinterpret_cast<float2*>(args.partial_out + slots.count * args.slot_chunks);
  return p.batch_invariant
             ? dispatch_dtype<Form::kFixed>(p, plan, static_cast<cudaStream_t>(stream))
             : dispatch_dtype<Form::kOp>(p, plan, static_cast<cudaStream_t>(stream));
}

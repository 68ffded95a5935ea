// Copyright 2026 The mla-jax Authors
// SPDX-License-Identifier: Apache-2.0
//
// One attention layer of one token: four of its five kernels, all but the decode (../decode).
//
//   project  norm; queries and latent, x [w_q | w_kv]     a CTA: 32 columns
//   absorb   of each head q w_uk; rotations; append       8 CTAs: a head
//   decode   pieces of the sequence, not combined
//   values   combines them; of each head o w_uv           a cluster of 8 CTAs: a head
//   output   .. w_o; residual sum                         a cluster of 4 CTAs: 64 columns
//
// With one token each weight is used once: a kernel takes as long as the memory needs to bring its
// weights, and what is lost is between kernels. So each is launched while the one before it ends
// (programmatic dependent launch), and asks for its weights, into registers, before it waits:
//
//   - what is read before grid_dependency_wait() is written by no kernel of the layer;
//   - nothing is written before it, but by the first kernel, which waits for all before it;
//   - each CTA waits before it ends, so that a kernel that has ended implies those before it;
//   - launch_dependents() follows the loads, which are issued in its order.
//
// Two kernels overlap where a multiprocessor has registers for both: 512 threads x 96 and 256 x 64.

#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../../../append.h"
#include "../../../mla.h"
#include "../decode/chain.h"
#include "../ptx.cuh"
#include "../wgmma.cuh"
#include "vectors.cuh"

namespace mla::layer {

constexpr int kLatent = 512, kNope = 128, kRotated = 64, kValue = 128;
constexpr int kQuery = kNope + kRotated, kCached = kLatent + kRotated;
constexpr int kWarp = 32;
constexpr int kWideThreads = 512, kThreads = 256;
constexpr int kHeadCtas = 8;
constexpr int kProjectColumns = 32;                   // of a CTA
constexpr int kOutputColumns = 64, kOutputSplit = 4;  // of a cluster, and its CTAs
constexpr int kBatch = 2048;  // rows of w_q, w_kv or w_o that are in registers at once

// Where the kernels leave what the next ones read.
struct Scratch {
  float* queries;  // [h, 192], as projected
  float* latent;   // [576], as projected
  void* q;         // [h, 512], what the decode takes
  void* q_pe;      // [h, 64]
  float* values;   // [h, 128]
};

struct LayerArgs {
  MlaLayerParams p;
  Scratch scratch;
};

// ---- project ----

// The bound, of more threads than there are, is one of registers.
template <typename T, bool kNorm>
__global__ void __launch_bounds__(640, 1) project_kernel(const __grid_constant__ LayerArgs args) {
  constexpr int kColumnGroups = kProjectColumns / 8;        // of eight columns, a thread's
  constexpr int kRowGroups = kWideThreads / kColumnGroups;  // of four neighbouring rows
  constexpr int kSteps = kBatch / (4 * kRowGroups);
  __shared__ float4 z[MLA_SM90_LAYER_MAX_WIDTH / 4];
  __shared__ float sums[kWideThreads / kWarp][kProjectColumns];
  __shared__ float squares[kWideThreads / kWarp];
  const MlaLayerParams& p = args.p;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int column_group = threadIdx.x % kColumnGroups, row_group = threadIdx.x / kColumnGroups;

  const int q_ctas = p.h * kQuery / kProjectColumns;
  const bool is_query = blockIdx.x < q_ctas;
  const int first_column = (is_query ? blockIdx.x : blockIdx.x - q_ctas) * kProjectColumns;
  const int64_t width = is_query ? p.h * kQuery : kCached;
  const T* column =
      static_cast<const T*>(is_query ? p.w_q : p.w_kv) + first_column + 8 * column_group;

  // Ahead of the weights, which the memory brings in order.
  const auto load_x = [&](const void* from, int i) {
    return load_2(static_cast<const T*>(from) + 4 * i);
  };
  const bool has_first = 4 * threadIdx.x < p.d;
  uint2 x = {}, scale = {};
  if (has_first) {
    x = load_x(p.x, threadIdx.x);
    if constexpr (kNorm) scale = load_x(p.norm, threadIdx.x);
  }
  uint4 weights[kSteps][4];
  const auto load_batch = [&](int first_row) {
#pragma unroll
    for (int j = 0; j < kSteps; ++j) {
      const int row = first_row + 4 * (kRowGroups * j + row_group);
      if (row >= p.d) break;
#pragma unroll
      for (int i = 0; i < 4; ++i) weights[j][i] = load_weights(column + (row + i) * width);
    }
  };
  load_batch(0);
  ptx::launch_dependents();

  float square = 0;
  const auto take = [&](int i, uint2 x, uint2 scale) {
    float4 v = unpack_4<T>(x);
    if constexpr (kNorm) {
      square += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
      const float4 s = unpack_4<T>(scale);
      v = {v.x * s.x, v.y * s.y, v.z * s.z, v.w * s.w};
    }
    z[i] = v;
  };
  if (has_first) take(threadIdx.x, x, scale);
  for (int i = threadIdx.x + kWideThreads; 4 * i < p.d; i += kWideThreads) {
    take(i, load_x(p.x, i), kNorm ? load_x(p.norm, i) : uint2{});
  }
  if constexpr (kNorm) {
    square = warp_total(square);
    if (lane == 0) squares[warp] = square;
  }
  __syncthreads();

  float products[8] = {};
  for (int first_row = 0;;) {
#pragma unroll
    for (int j = 0; j < kSteps; ++j) {
      const int row = first_row + 4 * (kRowGroups * j + row_group);
      if (row >= p.d) break;
      const float4 v = z[row / 4];
      multiply_add<T>(products, weights[j][0], v.x);
      multiply_add<T>(products, weights[j][1], v.y);
      multiply_add<T>(products, weights[j][2], v.z);
      multiply_add<T>(products, weights[j][3], v.w);
    }
    first_row += kBatch;
    if (first_row >= p.d) break;
    load_batch(first_row);
  }
  fold<8>(products, 16);
  fold<4>(products, 8);
  fold<2>(products, 4);
  sums[warp][8 * column_group + folded_index(16)] = products[0];
  __syncthreads();
  if (warp == 0) {
    float sum = strided_sum<kWideThreads / kWarp>(&sums[0][lane], kProjectColumns);
    if constexpr (kNorm) {
      const float mean = strided_sum<kWideThreads / kWarp>(squares, 1) / p.d;
      sum *= rsqrtf(mean + p.norm_epsilon);
    }
    (is_query ? args.scratch.queries : args.scratch.latent)[first_column + lane] = sum;
  }
}

// ---- absorb ----

constexpr int kRotatedHeads = 16;  // of a CTA
__host__ __device__ constexpr int absorb_ctas(int h) {
  return h * kHeadCtas + (h + kRotatedHeads - 1) / kRotatedHeads + 1;
}

// The pair of channels that lane `lane` rotates.
__device__ __forceinline__ int2 rotated_pair(const MlaLayerParams& p, int lane) {
  return p.interleaved ? int2{2 * lane, 2 * lane + 1} : int2{lane, lane + kWarp};
}

// A head's 64 columns of the latent that the CTA is for, as rows of w_uk.
template <typename T>
__device__ __forceinline__ void absorb_head(const LayerArgs& args) {
  constexpr int kRows = kLatent / kHeadCtas / (kThreads / 16);  // 16 threads have a row
  const int head = blockIdx.x / kHeadCtas, lane = threadIdx.x % 16;
  const int first_row = blockIdx.x % kHeadCtas * (kLatent / kHeadCtas) + threadIdx.x / 16 * kRows;
  const T* row =
      static_cast<const T*>(args.p.w_uk) + (int64_t{head} * kLatent + first_row) * kNope + 8 * lane;
  uint4 weights[kRows];
#pragma unroll
  for (int i = 0; i < kRows; ++i) weights[i] = load_weights(row + i * kNope);
  ptx::launch_dependents();
  ptx::grid_dependency_wait();
  const float* q = args.scratch.queries + head * kQuery + 8 * lane;
  const float4 first = load_4(q), last = load_4(q + 4);
  float sums[kRows];
#pragma unroll
  for (int i = 0; i < kRows; ++i) sums[i] = dot<T>(weights[i], first, last);
  static_assert(kRows == 4);
  fold<4>(sums, 8);
  fold<2>(sums, 4);
  const float sum = add_lanes(add_lanes(sums[0], 2), 1);
  if (lane % 4 == 0) {
    const int i = (lane & 8 ? 2 : 0) + (lane & 4 ? 1 : 0);
    static_cast<T*>(args.scratch.q)[head * kLatent + first_row + i] = static_cast<T>(sum);
  }
}

// The rotated channels of some heads' queries; a warp a head.
template <typename T>
__device__ __forceinline__ void rotate_queries(const LayerArgs& args, int first_head) {
  constexpr int kWarps = kThreads / kWarp, kEach = kRotatedHeads / kWarps;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const float cos = args.p.cos[lane], sin = args.p.sin[lane];
  const int2 pair = rotated_pair(args.p, lane);
  ptx::launch_dependents();
  ptx::grid_dependency_wait();
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int head = first_head + i * kWarps + warp;
    if (head >= args.p.h) break;
    const float* q = args.scratch.queries + head * kQuery + kNope;
    const float a = __ldcg(q + pair.x), b = __ldcg(q + pair.y);
    T* q_pe = static_cast<T*>(args.scratch.q_pe) + head * kRotated;
    q_pe[pair.x] = static_cast<T>(a * cos - b * sin);
    q_pe[pair.y] = static_cast<T>(b * cos + a * sin);
  }
}

// Norm, rotation and append of the latent: four channels a thread, and a pair of the first warp's.
template <typename T>
__device__ __forceinline__ void append_latent(const LayerArgs& args) {
  constexpr int kUsed = kLatent / 4;
  __shared__ float squares[kUsed / kWarp];
  const MlaLayerParams& p = args.p;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const float cos = p.cos[lane], sin = p.sin[lane];
  const int2 pair = rotated_pair(p, lane);
  uint2 scale = {};
  if (threadIdx.x < kUsed) scale = load_2(static_cast<const T*>(p.kv_norm) + 4 * threadIdx.x);
  const int32_t place[3] = {p.layer, 0, 0};
  MlaAppendParams append = {};
  append.block_table = p.block_table;
  append.seqlens = p.seqlen;
  append.num_new = p.num_new;
  append.place = place;
  append.t = 1;
  append.num_rows = p.num_layers * p.num_pages;
  append.num_slots = append.page_size = p.page_size;
  append.num_layers = p.num_layers;
  append.num_pages = p.num_pages;
  append.max_pages_per_seq = p.max_pages;
  const int64_t to_token = Destination(append, 0, 0);
  ptx::launch_dependents();
  ptx::grid_dependency_wait();

  float4 x = {};
  if (threadIdx.x < kUsed) x = load_4(args.scratch.latent + 4 * threadIdx.x);
  const float a = __ldcg(args.scratch.latent + kLatent + pair.x);
  const float b = __ldcg(args.scratch.latent + kLatent + pair.y);
  const float square = warp_total(x.x * x.x + x.y * x.y + x.z * x.z + x.w * x.w);
  if (threadIdx.x < kUsed && lane == 0) squares[warp] = square;
  __syncthreads();
  if (to_token < 0 || threadIdx.x >= kUsed) return;
  const float mean = strided_sum<kUsed / kWarp>(squares, 1) / kLatent;
  const float factor = rsqrtf(mean + p.kv_norm_epsilon);
  const float4 s = unpack_4<T>(scale);
  T* to = static_cast<T*>(p.pages) + to_token * kCached;
  *reinterpret_cast<uint2*>(to + 4 * threadIdx.x) =
      make_uint2(wgmma::Mma<T>::pack(x.x * factor * s.x, x.y * factor * s.y),
                 wgmma::Mma<T>::pack(x.z * factor * s.z, x.w * factor * s.w));
  if (warp == 0) {
    to[kLatent + pair.x] = static_cast<T>(a * cos - b * sin);
    to[kLatent + pair.y] = static_cast<T>(b * cos + a * sin);
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 4)
    absorb_kernel(const __grid_constant__ LayerArgs args) {
  const int others = static_cast<int>(blockIdx.x) - args.p.h * kHeadCtas;
  if (others < 0) {
    absorb_head<T>(args);
  } else if (blockIdx.x + 1 < gridDim.x) {
    rotate_queries<T>(args, others * kRotatedHeads);
  } else {
    append_latent<T>(args);
  }
}

// Adds up what the warps of all CTAs of a cluster have, each CTA its share of the columns: thread i
// calls store(sum) for the i-th of them. The cluster has arrived once before.
template <int kCtas, int kWarps, int kColumns, typename Store>
__device__ __forceinline__ void sum_over_cluster(const float (&sums)[kWarps][kColumns],
                                                 float (&own)[kCtas][kColumns / kCtas], int rank,
                                                 Store&& store) {
  constexpr int kOwn = kColumns / kCtas;
  __syncthreads();
  ptx::cluster_wait();
  if (threadIdx.x < kColumns) {
    const float v = strided_sum<kWarps>(&sums[0][threadIdx.x], kColumns);
    ptx::store_in_cluster(&own[rank][threadIdx.x % kOwn], threadIdx.x / kOwn, v);
  }
  ptx::cluster_arrive();
  ptx::cluster_wait();
  if (threadIdx.x < kOwn) store(strided_sum<kCtas>(&own[0][threadIdx.x], kOwn));
}

// ---- values ----

// The CTA combines 64 columns of its head's output and multiplies them with their rows of w_uv;
// the cluster adds up the products, each CTA 16 columns.
template <typename T>
__global__ void __cluster_dims__(kHeadCtas) __launch_bounds__(kThreads, 4)
    values_kernel(const __grid_constant__ LayerArgs args,
                  const __grid_constant__ ChainPieces pieces) {
  constexpr int kColumns = kLatent / kHeadCtas;               // of the output; rows of w_uv
  constexpr int kOwn = kValue / kHeadCtas;                    // columns that it adds up
  constexpr int kGroups = kThreads / 16;                      // of pieces, and of four rows
  constexpr int kEach = (kMaxParts + kGroups - 1) / kGroups;  // pieces of a thread
  constexpr int kLaneStats = (kMaxParts + kWarp - 1) / kWarp;
  constexpr int kWarps = kThreads / kWarp;
  __shared__ float4 outputs[kWarps][kColumns / 4];
  __shared__ float products[kWarps][kValue];
  __shared__ float sums[kHeadCtas][kOwn];
  const MlaLayerParams& p = args.p;
  const int head = blockIdx.x / kHeadCtas, rank = blockIdx.x % kHeadCtas;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int group = threadIdx.x / 16, member = threadIdx.x % 16;

  const T* row = static_cast<const T*>(p.w_uv) +
                 (int64_t{head} * kLatent + rank * kColumns + 4 * group) * kValue + 8 * member;
  uint4 weights[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) weights[i] = load_weights(row + i * kValue);
  ptx::cluster_arrive();  // no CTA writes to another one that has not started
  const int count = pieces.count();
  ptx::launch_dependents();
  ptx::grid_dependency_wait();

  float2 stats[kLaneStats];
#pragma unroll
  for (int i = 0; i < kLaneStats; ++i) {
    const int piece = i * kWarp + lane;
    stats[i] = {-INFINITY, 0.f};
    if (piece < count) stats[i] = __ldcg(pieces.stats + piece * p.h + head);
  }
  float4 parts[kEach];
  const float* part = pieces.values + (group * p.h + head) * kLatent + rank * kColumns + 4 * member;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    parts[i] = {};
    if (i * kGroups + group < count) {
      parts[i] = load_4(part + i * kGroups * p.h * kLatent);
    }
  }
  // Each warp for itself: no barrier.
  float top = stats[0].x, sum = 0;
#pragma unroll
  for (int i = 1; i < kLaneStats; ++i) top = fmaxf(top, stats[i].x);
  top = warp_top(top);
  float factors[kLaneStats];
#pragma unroll
  for (int i = 0; i < kLaneStats; ++i) {
    factors[i] = top == -INFINITY ? 0.f : ptx::exp2_approx(stats[i].x - top);
    sum += factors[i] * stats[i].y;
  }
  sum = warp_total(sum);
  const float inverse = sum == 0.f ? 0.f : ptx::reciprocal_approx(sum);
  float output[4] = {};
#pragma unroll
  for (int i = 0; i < kEach; ++i) {  // piece i * 16 + group
    const float factor = __shfl_sync(~0u, factors[i / 2], i % 2 * 16 + group);
    output[0] += factor * parts[i].x;
    output[1] += factor * parts[i].y;
    output[2] += factor * parts[i].z;
    output[3] += factor * parts[i].w;
  }
#pragma unroll
  for (float& v : output) v = add_lanes(v, 16) * inverse;
  if (lane < 16) outputs[warp][member] = {output[0], output[1], output[2], output[3]};
  __syncthreads();

  float4 o = {};
#pragma unroll
  for (int i = 0; i < kWarps; ++i) {
    const float4 v = outputs[i][group];
    o = {o.x + v.x, o.y + v.y, o.z + v.z, o.w + v.w};
  }
  float product[8] = {};
  multiply_add<T>(product, weights[0], o.x);
  multiply_add<T>(product, weights[1], o.y);
  multiply_add<T>(product, weights[2], o.z);
  multiply_add<T>(product, weights[3], o.w);
  fold<8>(product, 16);
  *reinterpret_cast<float4*>(&products[warp][8 * member + (lane & 16 ? 4 : 0)]) = {
      product[0], product[1], product[2], product[3]};
  sum_over_cluster(products, sums, rank, [&](float sum) {
    args.scratch.values[head * kValue + rank * kOwn + threadIdx.x] = sum;
  });
}

// ---- output ----

// The columns of a cluster are whole lines of memory; each of its CTAs takes a quarter of every
// batch of rows, and adds up a quarter of the columns.
template <typename T, bool kResidual>
__global__ void __cluster_dims__(kOutputSplit) __launch_bounds__(kWideThreads, 2)
    output_kernel(const __grid_constant__ LayerArgs args) {
  constexpr int kOwn = kOutputColumns / kOutputSplit;
  constexpr int kColumnGroups = kOutputColumns / 8;
  constexpr int kRows = 8;  // neighbours, a thread's
  constexpr int kWarps = kWideThreads / kWarp;
  static_assert(kWideThreads / kColumnGroups * kRows * kOutputSplit == kBatch);
  __shared__ float sums[kWarps][kOutputColumns];
  __shared__ float own[kOutputSplit][kOwn];
  const MlaLayerParams& p = args.p;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int rank = blockIdx.x % kOutputSplit, column_group = threadIdx.x % kColumnGroups;
  const int first_column = blockIdx.x / kOutputSplit * kOutputColumns, rows = p.h * kValue;
  const T* column = static_cast<const T*>(p.w_o) + first_column + 8 * column_group;

  int row = rank * (kBatch / kOutputSplit) + threadIdx.x / kColumnGroups * kRows;
  uint4 weights[kRows] = {};
  const auto load_batch = [&] {
#pragma unroll
    for (int i = 0; i < kRows; ++i) weights[i] = load_weights(column + int64_t{row + i} * p.d);
  };
  if (row < rows) load_batch();
  ptx::cluster_arrive();
  const int own_column = first_column + rank * kOwn + threadIdx.x;
  float x = 0;
  if (kResidual && threadIdx.x < kOwn) {
    x = static_cast<float>(__ldg(static_cast<const T*>(p.x) + own_column));
  }
  // For nobody, but the compiler moves loads past the wait without it.
  ptx::launch_dependents();
  ptx::grid_dependency_wait();

  float products[8] = {};
  while (row < rows) {
    const float4 first = load_4(args.scratch.values + row);
    const float4 last = load_4(args.scratch.values + row + 4);
    const float v[kRows] = {first.x, first.y, first.z, first.w, last.x, last.y, last.z, last.w};
#pragma unroll
    for (int i = 0; i < kRows; ++i) multiply_add<T>(products, weights[i], v[i]);
    row += kBatch;
    if (row < rows) load_batch();
  }
  fold<8>(products, 16);
  fold<4>(products, 8);
  const int index = (lane & 16 ? 4 : 0) + (lane & 8 ? 2 : 0);
  *reinterpret_cast<float2*>(&sums[warp][8 * column_group + index]) = {products[0], products[1]};
  sum_over_cluster(sums, own, rank,
                   [&](float sum) { static_cast<T*>(p.y)[own_column] = static_cast<T>(x + sum); });
}

}  // namespace mla::layer

// Copyright 2026 The mla-jax Authors
// SPDX-License-Identifier: Apache-2.0
//
// Combining the partial results of a split sequence, inside the decode kernel.
//
// Batch-invariant results are combined by a kernel of their own, all others in the decode kernel:
// all CTAs that hold a piece of the sequence as the last thing they do wait until every piece is
// written, then each combines a share of the output. Waiting needs all CTAs to be resident: the
// kernel is launched cooperatively when it splits.

#pragma once

#include <cooperative_groups.h>

#include "layout.cuh"
#include "partial.cuh"
#include "softmax.cuh"

namespace mla {

// A split sequence as those who combine it see it.
struct Split {
  int first_part;  // holds the first piece; the others follow
  int pieces;
  int helpers;  // the parts, from the first on, that combine
};

// The counters hold garbage when the kernel starts. One idle thread of each CTA clears the CTA's
// own and tells the CTA when all are clear, long before the first is wanted. It meets the others at
// the barrier that a cooperative launch brings: memory prepared by CUDA, which grid.sync() of
// cooperative_groups would use with all threads of a CTA. The high bit flips when all have arrived.
__device__ __forceinline__ void clear_counters(const DecodeArgs& args, uint64_t* all_clear) {
  uint32_t* barrier = &cooperative_groups::details::get_grid_workspace()->barrier;
  args.counters[blockIdx.x] = 0;
  const uint32_t before =
      ptx::release_add(barrier, blockIdx.x == 0 ? 0x80000000u - (gridDim.x - 1) : 1u);
  while (((ptx::acquire_load(barrier) ^ before) & 0x80000000u) == 0) {
  }
  ptx::mbarrier_arrive(all_clear);
}

// Tells the others that this CTA's piece is written; called by all consumers.
__device__ __forceinline__ void announce_partial(uint32_t* counter) {
  ptx::named_barrier_sync(kConsumers, kConsumerThreads);
  if (threadIdx.x == 0) {
    ptx::fence_gpu();
    ptx::increment(counter);
  }
}

// Scratch of the combination, in the query and block buffers, which are free by then.
struct CombineScratch {
  int64_t offsets[kTileRows];   // of the tile's rows in `out`
  float inverse[2][kTileRows];  // [half]: 1 / sum of all pieces' weights
  float2 sums[8][4][32];        // [warp][pair][lane]
  // [row of this CTA][pieces | 1]: (max, sum) of both halves, then (factor, -) of both. After the
  // last row the chunks of this CTA's units, [unit][piece][lane].
  float4 stats[];
};

// What combining threads need to find and place things. A unit is one chunk of one warp of the
// partial outputs: 16 rows, and columns in pairs. A CTA sums neighbouring units.
struct Combination {
  const DecodeArgs& args;
  CombineScratch& scratch;
  int pieces;
  int seq, kv_head, first_row, rows;
  int first_slot, next_slot, slot_stride;  // of pieces 0, 1 and from there on
  int first_unit, units;                   // of this CTA
  int row_group_shift;                     // log2 of the units of 16 rows
  int first_row_group, row_groups;         // that the units touch

  __device__ __forceinline__ int slot_of(int s) const {
    return s == 0 ? first_slot : next_slot + (s - 1) * slot_stride;
  }
  // An odd stride: neither rows nor pieces share banks.
  __device__ __forceinline__ float4& stats(int row, int s) const {
    return scratch.stats[(row - 16 * first_row_group) * (pieces | 1) + s];
  }
  __device__ __forceinline__ uint4* chunks() const {
    return reinterpret_cast<uint4*>(&stats(16 * (first_row_group + row_groups), 0));
  }
};

// Joins what the members of a team hold, neighbouring lanes: every one gets the whole.
template <typename Join>
__device__ __forceinline__ float2 join_team(float2 v, int team, Join&& join) {
#pragma unroll 1
  for (int d = 1; d < team; d *= 2) {
    v.x = join(v.x, __shfl_xor_sync(0xFFFFFFFFu, v.x, d));
    v.y = join(v.y, __shfl_xor_sync(0xFFFFFFFFu, v.y, d));
  }
  return v;
}

// Turns the pieces' statistics into factors for their values. All threads share the rows: 16, 8 or
// 4 for each.
__device__ __forceinline__ void find_factors(const Combination& c) {
  const int team = c.row_groups == 1 ? 16 : c.row_groups == 2 ? 8 : 4;
  const int row = 16 * c.first_row_group + threadIdx.x / team, member = threadIdx.x % team;
  if (threadIdx.x < 16 * c.row_groups * team) {  // whole warps
    float2 max = {kNegativeInfinity, kNegativeInfinity}, sum = {0.f, 0.f};
#pragma unroll 4
    for (int s = member; s < c.pieces; s += team) {
      const float4 v = __ldcg(partial_stats(c.args, c.slot_of(s), row));
      c.stats(row, s) = v;
      max.x = fmaxf(max.x, v.x);
      max.y = fmaxf(max.y, v.z);
    }
    max = join_team(max, team, [](float a, float b) { return fmaxf(a, b); });
#pragma unroll 4
    for (int s = member; s < c.pieces; s += team) {
      float4& v = c.stats(row, s);
      v.x = rescale_factor(v.x, max.x);
      v.z = rescale_factor(v.z, max.y);
      sum.x += v.x * v.y;
      sum.y += v.z * v.w;
    }
    sum = join_team(sum, team, [](float a, float b) { return a + b; });
    if (member == 0 && row < c.rows) {
      c.scratch.offsets[row] = out_offset(c.args, c.seq, c.kv_head, c.first_row + row);
      c.scratch.inverse[0][row] = sum.x == 0.f ? 0.f : 1.f / sum.x;
      c.scratch.inverse[1][row] = sum.y == 0.f ? 0.f : 1.f / sum.y;
      // By the CTA that has the first unit of these rows.
      const int first_unit = row / 16 << c.row_group_shift;
      if (c.first_unit <= first_unit && first_unit < c.first_unit + c.units) {
        c.args.lse[lse_offset(c.args, c.seq, c.kv_head, c.first_row + row)] =
            log_sum_exp(max.x, sum.x);
      }
    }
  }
  ptx::named_barrier_sync(kConsumers, kConsumerThreads);
}

// Sums the CTA's units. All that they need is on the way to shared memory while the factors are
// found. Loops are hardly unrolled: code that runs once takes longest to fetch.
template <typename T, typename Partial>
__device__ __forceinline__ void combine_units(const Combination& c) {
  using Format = PartialFormat<Partial>;
  constexpr int kPairs = Format::kPairs;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, pieces = c.pieces;
  const int team = c.units > 4 ? 1 : c.units > 2 ? 2 : c.units > 1 ? 4 : 8;  // warps of a unit
  const int member = warp % team, step = 8 / team;
  uint4* chunks = c.chunks();

#pragma unroll 1
  for (int i = warp / team; i < c.units; i += step) {
    const int unit = c.first_unit + i, row_group = unit >> kRowGroupShift<Partial>;
    const int chunk = unit - (row_group << kRowGroupShift<Partial>);
#pragma unroll 4
    for (int s = member; s < pieces; s += team) {
      ptx::copy_async_16(
          chunks + (i * pieces + s) * 32 + lane,
          partial_chunks(c.args, c.slot_of(s)) + chunk * 128 + row_group * 32 + lane);
    }
  }
  find_factors(c);
  ptx::copy_async_wait();

  int i = warp / team;
#pragma unroll 1
  do {  // once where warps share units, so that all of them meet
    const int unit = c.first_unit + i, row_group = unit >> kRowGroupShift<Partial>;
    const int chunk = unit - (row_group << kRowGroupShift<Partial>);
    const int half = chunk / kChunks<Partial>, row = 16 * row_group + lane / 4;
    float2 sum[kPairs] = {};
    if (i < c.units) {
#pragma unroll 4
      for (int s = member; s < pieces; s += team) {
        const uint4 v = chunks[(i * pieces + s) * 32 + lane];
        const uint32_t packed[4] = {v.x, v.y, v.z, v.w};
        const float factor[2] = {(&c.stats(row, s).x)[2 * half],
                                 (&c.stats(row + 8, s).x)[2 * half]};
#pragma unroll
        for (int k = 0; k < kPairs; ++k) {
          const float2 x = Format::unpack(packed, k);
          sum[k].x += x.x * factor[k % 2];
          sum[k].y += x.y * factor[k % 2];
        }
      }
    }
    if (team > 1) {
#pragma unroll
      for (int k = 0; k < kPairs; ++k) c.scratch.sums[warp][k][lane] = sum[k];
      ptx::named_barrier_sync(kConsumers, kConsumerThreads);
      if (member > 0) return;
#pragma unroll 1
      for (int other = 1; other < team; ++other) {
#pragma unroll
        for (int k = 0; k < kPairs; ++k) {
          sum[k].x += c.scratch.sums[warp + other][k][lane].x;
          sum[k].y += c.scratch.sums[warp + other][k][lane].y;
        }
      }
    }
    if (i >= c.units) return;
    const int column = chunk * (4 * kPairs) + 2 * (lane % 4);
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int r = row + 8 * e;
      if (r >= c.rows) continue;
      const float inverse = c.scratch.inverse[half][r];
      T* dst = static_cast<T*>(c.args.out) + c.scratch.offsets[r] + column;
#pragma unroll
      for (int k = e; k < kPairs; k += 2) {
        *reinterpret_cast<uint32_t*>(dst + k / 2 * 8) =
            wgmma::Mma<T>::pack(sum[k].x * inverse, sum[k].y * inverse);
      }
    }
    i += step;
  } while (i < c.units);
}

// Gives share `share` of `shares` its units.
__device__ __forceinline__ void take_units(Combination& c, bool half, int share, int shares) {
  c.row_group_shift = half ? kRowGroupShift<__half> : kRowGroupShift<float>;
  const int all = (c.rows + 15) / 16 << c.row_group_shift;
  const int most = Divisor(shares).ceil(all);
  c.first_unit = share * most;
  c.units = min(most, all - c.first_unit);
  c.first_row_group = c.first_unit >> c.row_group_shift;
  c.row_groups = (c.first_unit + c.units - 1 >> c.row_group_shift) - c.first_row_group + 1;
}

// Waits for all pieces and combines this part's share; called by all consumers.
template <typename T>
__device__ __forceinline__ void combine(const DecodeArgs& args, const Place& place, int seq,
                                        const Split& split, void* scratch) {
  const int rows = place.end_row - place.first_row, cta = place.peer(split.first_part);
  Combination c = {args,
                   *static_cast<CombineScratch*>(scratch),
                   split.pieces,
                   seq,
                   place.kv_head,
                   place.first_row,
                   rows,
                   partial_slot(cta, true),
                   partial_slot(cta + place.groups, false),
                   2 * place.groups};
  const bool half = is_half(args, rows);
  take_units(c, half, place.part - split.first_part, split.helpers);
  if (c.units <= 0) return;
  if (threadIdx.x == 0) {
    while (ptx::acquire_load(args.counters + cta) < static_cast<uint32_t>(split.pieces)) {
    }
  }
  ptx::named_barrier_sync(kConsumers, kConsumerThreads);
  if (half) {
    combine_units<T, __half>(c);
  } else {
    combine_units<T, float>(c);
  }
}

// Combines what batch-invariant decode has cut; kFixedShares CTAs for each sequence and tile.
inline constexpr int kFixedShares = 16;
inline constexpr int kFixedCombineBytes =  // at most 8 units, of one row group
    sizeof(CombineScratch) + 16 * (kFixedPieces | 1) * 16 + 8 * kFixedPieces * 512;

template <typename T>
__global__ void __launch_bounds__(kConsumerThreads)
    combine_kernel(const __grid_constant__ DecodeArgs args) {
  extern __shared__ __align__(16) uint8_t scratch[];
  const int tile_of_seq = blockIdx.x / kFixedShares, seq = args.grids[0].groups.floor(tile_of_seq);
  const int group = tile_of_seq - seq * args.grids[0].groups.value;
  const int blocks =
      sequence_blocks(sequence_tokens(args.seqlens, seq, args.max_pages_per_seq * args.page_size));
  const int size = fixed_piece_blocks(blocks), pieces = (blocks + size - 1) / size;
  if (pieces == 1) return;
  const Place place = Place::of_group(args, 0, group);
  const int slot = seq * args.fixed_pieces * place.groups + group;
  Combination c = {args,
                   *reinterpret_cast<CombineScratch*>(scratch),
                   pieces,
                   seq,
                   place.kv_head,
                   place.first_row,
                   place.end_row - place.first_row,
                   slot,
                   slot + place.groups,
                   place.groups};
  take_units(c, true, blockIdx.x % kFixedShares, kFixedShares);
  if (c.units > 0) combine_units<T, __half>(c);
}

}  // namespace mla

// Copyright 2026 The mla-jax Authors
// SPDX-License-Identifier: Apache-2.0
//
// Combining the partial results of a split sequence, inside the decode kernel.
//
// All CTAs that hold a piece of the sequence as the last thing they do wait until every piece is
// written, then each combines a share of the output. The counter of the sequence counts arrivals
// and departures. Waiting needs all CTAs to be resident: the kernel is launched cooperatively when
// it splits.

#pragma once

#include <cooperative_groups.h>

#include "layout.cuh"
#include "softmax.cuh"

namespace mla {

// Writes the unnormalised accumulators of one warpgroup as fp16, coalesced: the layout is private.
// Each row is scaled by a power of two that brings its largest element near the top of fp16's
// range. The scale needs no place of its own: it moves from the values to the maximum and the sum.
__device__ __forceinline__ void store_partial(const DecodeArgs& args, int slot, int half, int rows,
                                              const float (&output)[128], const RowPair& max,
                                              const RowPair& sum) {
  const int thread = threadIdx.x % 128, row = 16 * (thread / 32) + thread % 32 / 4;
  if (16 * (thread / 32) >= rows) return;
  float inverse[2];
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    float tops[4] = {};  // not one long chain
#pragma unroll
    for (int i = 0; i < 32; ++i) {
#pragma unroll
      for (int j = 2 * e; j < 2 * e + 2; ++j) {
        float& top = tops[2 * (i % 2) + j % 2];
        top = fmaxf(top, fabsf(output[4 * i + j]));
      }
    }
    const float top = quad_max(fmaxf(fmaxf(tops[0], tops[1]), fmaxf(tops[2], tops[3])));
    // top < 2^(exponent + 15). The bound keeps a piece of zeros comparable with others.
    const int exponent = ::max((__float_as_int(top) >> 23) - 141, -75);
    inverse[e] = __int_as_float((127 - exponent) << 23);
    if (thread % 4 == 0) {
      __stcg(args.partial_stats + (slot * kTileRows + row + 8 * e) * 2 + half,
             make_float2(max.v[e] + exponent, sum.v[e] * inverse[e]));
    }
  }
  uint4* dst = args.partial_out + (int64_t{slot} * 2 + half) * kFragments * 128 + thread;
#pragma unroll
  for (int i = 0; i < kFragments; ++i) {
    uint32_t v[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const float scale = inverse[k % 2];
      v[k] = wgmma::Mma<__half>::pack(output[8 * i + 2 * k] * scale,
                                      output[8 * i + 2 * k + 1] * scale);
    }
    __stcg(dst + i * 128, make_uint4(v[0], v[1], v[2], v[3]));
  }
}

// A split sequence as those who combine it see it.
struct Split {
  int first_part;  // holds the first piece; the others follow
  int pieces;
  int helpers;  // the parts, from the first on, that combine
};

// The counter counts `pieces` arrivals and `helpers` departures, then is zero again.
__device__ __forceinline__ void count(uint32_t* counter, const Split& split) {
  ptx::increment_wrap(counter, split.pieces + split.helpers - 1);
}

// The counters hold garbage when the kernel starts. One idle thread of each CTA clears the CTA's own
// and tells the CTA when all are clear, long before the first is wanted. It meets the others at the
// barrier that a cooperative launch brings: memory prepared by CUDA, which grid.sync() of
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
__device__ __forceinline__ void announce_partial(uint32_t* counter, const Split& split,
                                                 uint64_t* all_clear) {
  ptx::named_barrier_sync(kConsumers, kConsumerThreads);
  if (threadIdx.x == 0) {
    ptx::mbarrier_wait(all_clear, 0);
    ptx::fence_gpu();
    count(counter, split);
  }
}

// Scratch of the combination, in the query and block buffers, which are free by then.
struct CombineScratch {
  float inverse[2][kTileRows];  // [half]: 1 / sum of all pieces' weights
  float sums[8][8][32];         // [warp][element][lane]
  // [pieces]: (max, sum) of both halves, then (factor, -) of both.
  float4 stats[][kTileRows];
};

// What combining threads need to find and place things.
struct Combination {
  const DecodeArgs& args;
  CombineScratch& scratch;
  Split split;
  int seq, kv_head, first_row, rows, row_groups;
  int first_slot, slot_stride;

  // Piece s lies in slot 0 of its CTA, but the first one in slot 1.
  __device__ __forceinline__ int slot_of(int s) const {
    return first_slot + s * slot_stride + (s == 0);
  }
};

// Turns the pieces' statistics into factors for their values. All threads share the rows: 16, 8 or 4
// for each.
__device__ __forceinline__ void find_factors(const Combination& c, bool write_lse) {
  const int team = c.row_groups == 1 ? 16 : c.row_groups == 2 ? 8 : 4;
  const int row = threadIdx.x / team, member = threadIdx.x % team;
  if (row < 16 * c.row_groups) {  // whole warps
    const auto* all = reinterpret_cast<const float4*>(c.args.partial_stats) + row;
    float2 max = {kNegativeInfinity, kNegativeInfinity}, sum = {0.f, 0.f};
#pragma unroll 4
    for (int s = member; s < c.split.pieces; s += team) {
      const float4 v = __ldcg(all + c.slot_of(s) * kTileRows);
      c.scratch.stats[s][row] = v;
      max.x = fmaxf(max.x, v.x);
      max.y = fmaxf(max.y, v.z);
    }
    for (int d = 1; d < team; d *= 2) {
      max.x = fmaxf(max.x, __shfl_xor_sync(0xFFFFFFFFu, max.x, d));
      max.y = fmaxf(max.y, __shfl_xor_sync(0xFFFFFFFFu, max.y, d));
    }
    for (int s = member; s < c.split.pieces; s += team) {
      float4& v = c.scratch.stats[s][row];
      v.x = rescale_factor(v.x, max.x);
      v.z = rescale_factor(v.z, max.y);
      sum.x += v.x * v.y;
      sum.y += v.z * v.w;
    }
    for (int d = 1; d < team; d *= 2) {
      sum.x += __shfl_xor_sync(0xFFFFFFFFu, sum.x, d);
      sum.y += __shfl_xor_sync(0xFFFFFFFFu, sum.y, d);
    }
    if (member == 0) {
      c.scratch.inverse[0][row] = sum.x == 0.f ? 0.f : 1.f / sum.x;
      c.scratch.inverse[1][row] = sum.y == 0.f ? 0.f : 1.f / sum.y;
      if (write_lse && row < c.rows) {
        c.args.lse[lse_offset(c.args, c.seq, c.kv_head, c.first_row + row)] =
            log_sum_exp(max.x, sum.x);
      }
    }
  }
  ptx::named_barrier_sync(kConsumers, kConsumerThreads);
}

// A unit is one fragment of one warp of the partial outputs: 16 rows x 16 columns, 16 bytes a
// lane. A warp sums kUnits units at a time, kPieces pieces of each, so that 16 loads are under way;
// with more than 16 pieces, all warps share one unit. The factors are found while the first loads
// are.
template <typename T, int kUnits, int kPieces>
__device__ __forceinline__ void combine_units(const Combination& c, int share) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const bool together = c.split.pieces > 16;
  const int units = 2 * kFragments * c.row_groups;
  const int member = together ? warp : 0, team = together ? 8 : 1;
  const int stride = c.split.helpers * (8 / team);  // to this warp's next unit
  bool factors_known = false;

  for (int base = share; base < units; base += stride * kUnits) {
    const int first_unit = base + (together ? 0 : warp * c.split.helpers);
    float sum[kUnits][8];
    int fragment[kUnits], row[kUnits];
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      const int unit = first_unit + u * stride;
      fragment[u] = unit / c.row_groups;
      const int row_group = unit - fragment[u] * c.row_groups;
      row[u] = unit < units ? 16 * row_group + lane / 4 : kTileRows;
#pragma unroll
      for (float& x : sum[u]) x = 0.f;
    }
    for (int first = member; first < c.split.pieces; first += team * kPieces) {
      uint4 v[kUnits][kPieces];
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
#pragma unroll
        for (int i = 0; i < kPieces; ++i) {
          const int s = first + i * team;
          if (s < c.split.pieces && row[u] < kTileRows) {
            v[u][i] = __ldcg(c.args.partial_out + c.slot_of(s) * (2 * kFragments * 128) +
                             fragment[u] * 128 + row[u] / 16 * 32 + lane);
          }
        }
      }
      if (!factors_known) find_factors(c, share == 0);
      factors_known = true;
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
        const bool right = fragment[u] >= kFragments;
#pragma unroll
        for (int i = 0; i < kPieces; ++i) {
          const int s = first + i * team;
          if (s < c.split.pieces && row[u] < kTileRows) {
            const float* stats = &c.scratch.stats[s][row[u]].x + 2 * right;
            const float factor[2] = {stats[0], stats[8 * 4]};
            const uint32_t packed[4] = {v[u][i].x, v[u][i].y, v[u][i].z, v[u][i].w};
#pragma unroll
            for (int k = 0; k < 4; ++k) {
              const float2 x = __half22float2(reinterpret_cast<const __half2&>(packed[k]));
              sum[u][2 * k] += x.x * factor[k % 2];
              sum[u][2 * k + 1] += x.y * factor[k % 2];
            }
          }
        }
      }
    }
    if (together) {
#pragma unroll
      for (int k = 0; k < 8; ++k) c.scratch.sums[warp][k][lane] = sum[0][k];
      ptx::named_barrier_sync(kConsumers, kConsumerThreads);
      if (member == 0) {
#pragma unroll
        for (int i = 1; i < 8; ++i) {
#pragma unroll
          for (int k = 0; k < 8; ++k) sum[0][k] += c.scratch.sums[i][k][lane];
        }
      }
      ptx::named_barrier_sync(kConsumers, kConsumerThreads);
      if (member != 0) continue;
    }
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      const int column = fragment[u] * 16 + 2 * (lane % 4);
      const float* inverse = c.scratch.inverse[fragment[u] >= kFragments];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int r = row[u] + 8 * e;
        if (r >= c.rows) continue;
        T* dst = static_cast<T*>(c.args.out) +
                 out_offset(c.args, c.seq, c.kv_head, c.first_row + r) + column;
#pragma unroll
        for (int k = e; k < 4; k += 2) {
          *reinterpret_cast<uint32_t*>(dst + k / 2 * 8) = wgmma::Mma<T>::pack(
              sum[u][2 * k] * inverse[r], sum[u][2 * k + 1] * inverse[r]);
        }
      }
    }
  }
}

// Waits for all pieces and combines this part's share; called by all consumers.
template <typename T>
__device__ __forceinline__ void combine(const DecodeArgs& args, const Place& place, int seq,
                                        const Split& split, void* scratch) {
  const int rows = place.end_row - place.first_row;
  const Combination c = {args,
                         *static_cast<CombineScratch*>(scratch),
                         split,
                         seq,
                         place.kv_head,
                         place.first_row,
                         rows,
                         (rows + 15) / 16,
                         partial_slot(place.peer(split.first_part), false),
                         2 * place.groups};
  if (threadIdx.x == 0) {
    uint32_t* counter = args.counters + place.peer(split.first_part);
    while (ptx::acquire_load(counter) < static_cast<uint32_t>(split.pieces)) {
    }
    count(counter, split);
  }
  ptx::named_barrier_sync(kConsumers, kConsumerThreads);

  const int share = place.part - split.first_part;
  if (split.pieces <= 4) {
    combine_units<T, 4, 4>(c, share);
  } else if (split.pieces <= 8) {
    combine_units<T, 2, 8>(c, share);
  } else {
    combine_units<T, 1, 16>(c, share);
  }
}

}  // namespace mla

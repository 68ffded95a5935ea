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

// Writes the unnormalised accumulators of one warpgroup, coalesced: the layout is private.
__device__ __forceinline__ void store_partial(const DecodeArgs& args, int slot, int half, int rows,
                                              const float (&output)[128], const RowPair& max,
                                              const RowPair& sum) {
  const int thread = threadIdx.x % 128, row = 16 * (thread / 32) + thread % 32 / 4;
  if (16 * (thread / 32) >= rows) return;
  float4* dst = args.partial_out + (int64_t{slot} * 2 + half) * 32 * 128 + thread;
#pragma unroll
  for (int i = 0; i < 32; ++i) {
    __stcg(dst + i * 128,
           make_float4(output[4 * i], output[4 * i + 1], output[4 * i + 2], output[4 * i + 3]));
  }
  if (half == 0 && thread % 4 == 0) {
    float2* stats = args.partial_stats + slot * kTileRows + row;
    __stcg(stats, make_float2(max.v[0], sum.v[0]));
    __stcg(stats + 8, make_float2(max.v[1], sum.v[1]));
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

// Scratch of the combination, in the block buffers, which are free by then.
struct CombineScratch {
  float inverse[kTileRows];  // 1 / sum of all pieces' weights
  float4 sums[8][32];
  float2 stats[][kTileRows];  // [pieces]: (max, sum), then (factor, -)
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

// Turns the pieces' statistics into factors for their sums; a quad of threads takes a row.
__device__ __forceinline__ void find_factors(const Combination& c, bool write_lse) {
  const int row = threadIdx.x / 4, member = threadIdx.x % 4;
  if (row < 16 * c.row_groups) {  // whole warps
    float max = kNegativeInfinity, sum = 0.f;
#pragma unroll 4
    for (int s = member; s < c.split.pieces; s += 4) {
      const float2 v = __ldcg(c.args.partial_stats + c.slot_of(s) * kTileRows + row);
      c.scratch.stats[s][row] = v;
      max = fmaxf(max, v.x);
    }
    max = quad_max(max);
    for (int s = member; s < c.split.pieces; s += 4) {
      float2& v = c.scratch.stats[s][row];
      v.x = rescale_factor(v.x, max);
      sum += v.x * v.y;
    }
    sum = quad_sum(sum);
    if (member == 0) {
      c.scratch.inverse[row] = sum == 0.f ? 0.f : 1.f / sum;
      if (write_lse && row < c.rows) {
        c.args.lse[lse_offset(c.args, c.seq, c.kv_head, c.first_row + row)] = log_sum_exp(max, sum);
      }
    }
  }
  ptx::named_barrier_sync(kConsumers, kConsumerThreads);
}

// A unit is one fragment index of one warp of the partial outputs: 32 float4. A warp sums kUnits
// units at a time, kPieces pieces of each, so that 16 loads are under way; with more than 16
// pieces, all warps share one unit. The factors are found while the first loads are.
template <typename T, int kUnits, int kPieces>
__device__ __forceinline__ void combine_units(const Combination& c, int share) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const bool together = c.split.pieces > 16;
  const int units = 64 * c.row_groups;
  const int member = together ? warp : 0, team = together ? 8 : 1;
  const int stride = c.split.helpers * (8 / team);  // to this warp's next unit
  bool factors_known = false;

  for (int base = share; base < units; base += stride * kUnits) {
    const int first_unit = base + (together ? 0 : warp * c.split.helpers);
    float4 sum[kUnits];
    int fragment[kUnits], row[kUnits];
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      const int unit = first_unit + u * stride;
      fragment[u] = unit / c.row_groups;
      const int row_group = unit - fragment[u] * c.row_groups;
      row[u] = unit < units ? 16 * row_group + lane / 4 : kTileRows;
      sum[u] = make_float4(0.f, 0.f, 0.f, 0.f);
    }
    for (int first = member; first < c.split.pieces; first += team * kPieces) {
      float4 v[kUnits][kPieces];
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
#pragma unroll
        for (int i = 0; i < kPieces; ++i) {
          const int s = first + i * team;
          if (s < c.split.pieces && row[u] < kTileRows) {
            v[u][i] = __ldcg(c.args.partial_out + c.slot_of(s) * (64 * 128) + fragment[u] * 128 +
                             row[u] / 16 * 32 + lane);
          }
        }
      }
      if (!factors_known) find_factors(c, share == 0);
      factors_known = true;
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
#pragma unroll
        for (int i = 0; i < kPieces; ++i) {
          const int s = first + i * team;
          if (s < c.split.pieces && row[u] < kTileRows) {
            const float f0 = c.scratch.stats[s][row[u]].x, f1 = c.scratch.stats[s][row[u] + 8].x;
            sum[u].x += v[u][i].x * f0, sum[u].y += v[u][i].y * f0;
            sum[u].z += v[u][i].z * f1, sum[u].w += v[u][i].w * f1;
          }
        }
      }
    }
    if (together) {
      c.scratch.sums[warp][lane] = sum[0];
      ptx::named_barrier_sync(kConsumers, kConsumerThreads);
      if (member == 0) {
#pragma unroll
        for (int i = 1; i < 8; ++i) {
          const float4 v = c.scratch.sums[i][lane];
          sum[0].x += v.x, sum[0].y += v.y, sum[0].z += v.z, sum[0].w += v.w;
        }
      }
      ptx::named_barrier_sync(kConsumers, kConsumerThreads);
      if (member != 0) continue;
    }
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      const int column = fragment[u] * 8 + 2 * (lane % 4);  // fragment 32 h + i: 256 h + 8 i
      const float2 out[2] = {{sum[u].x, sum[u].y}, {sum[u].z, sum[u].w}};
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int r = row[u] + 8 * e;
        if (r >= c.rows) continue;
        T* dst = static_cast<T*>(c.args.out) +
                 out_offset(c.args, c.seq, c.kv_head, c.first_row + r) + column;
        *reinterpret_cast<uint32_t*>(dst) =
            wgmma::Mma<T>::pack(out[e].x * c.scratch.inverse[r], out[e].y * c.scratch.inverse[r]);
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
  if (split.pieces <= 2) {
    combine_units<T, 8, 2>(c, share);
  } else if (split.pieces <= 4) {
    combine_units<T, 4, 4>(c, share);
  } else if (split.pieces <= 8) {
    combine_units<T, 2, 8>(c, share);
  } else {
    combine_units<T, 1, 16>(c, share);
  }
}

}  // namespace mla

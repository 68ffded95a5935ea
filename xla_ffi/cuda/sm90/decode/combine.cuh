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
#include "partial.cuh"
#include "softmax.cuh"

namespace mla {

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
  float4 stats[];  // [rows][pieces | 1]: (max, sum) of both halves, then (factor, -) of both
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
  // An odd stride: neither rows nor pieces share banks.
  __device__ __forceinline__ float4& stats(int row, int s) const {
    return scratch.stats[row * (split.pieces | 1) + s];
  }
};

// Turns the pieces' statistics into factors for their values. All threads share the rows: 16, 8 or
// 4 for each.
__device__ __forceinline__ void find_factors(const Combination& c, bool write_lse) {
  const int team = c.row_groups == 1 ? 16 : c.row_groups == 2 ? 8 : 4;
  const int row = threadIdx.x / team, member = threadIdx.x % team;
  if (row < 16 * c.row_groups) {  // whole warps
    float2 max = {kNegativeInfinity, kNegativeInfinity}, sum = {0.f, 0.f};
#pragma unroll 4
    for (int s = member; s < c.split.pieces; s += team) {
      const float4 v = __ldcg(partial_stats(c.args, c.slot_of(s), row));
      c.stats(row, s) = v;
      max.x = fmaxf(max.x, v.x);
      max.y = fmaxf(max.y, v.z);
    }
    for (int d = 1; d < team; d *= 2) {
      max.x = fmaxf(max.x, __shfl_xor_sync(0xFFFFFFFFu, max.x, d));
      max.y = fmaxf(max.y, __shfl_xor_sync(0xFFFFFFFFu, max.y, d));
    }
    for (int s = member; s < c.split.pieces; s += team) {
      float4& v = c.stats(row, s);
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

// A unit is one chunk of one warp of the partial outputs: 16 rows, and columns in pairs. A warp
// sums kUnits units at a time, kPieces pieces of each, so that 16 loads are under way; with more
// than 16 pieces, all warps share one unit. The factors are found while the first loads are.
template <typename T, typename Partial, int kUnits, int kPieces>
__device__ __forceinline__ void combine_units(const Combination& c, int share) {
  using Format = PartialFormat<Partial>;
  constexpr int kPairs = Format::kPairs;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const bool together = c.split.pieces > 16;
  const int units = 2 * kChunks<Partial> * c.row_groups;
  const int member = together ? warp : 0, team = together ? 8 : 1;
  const int stride = c.split.helpers * (8 / team);  // to this warp's next unit
  bool factors_known = false;

  for (int base = share; base < units; base += stride * kUnits) {
    const int first_unit = base + (together ? 0 : warp * c.split.helpers);
    float2 sum[kUnits][kPairs];
    int chunk[kUnits], row[kUnits];
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      const int unit = first_unit + u * stride;
      chunk[u] = unit / c.row_groups;
      const int row_group = unit - chunk[u] * c.row_groups;
      row[u] = unit < units ? 16 * row_group + lane / 4 : kTileRows;
#pragma unroll
      for (float2& x : sum[u]) x = {0.f, 0.f};
    }
    for (int first = member; first < c.split.pieces; first += team * kPieces) {
      uint4 v[kUnits][kPieces];
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
#pragma unroll
        for (int i = 0; i < kPieces; ++i) {
          const int s = first + i * team;
          if (s < c.split.pieces && row[u] < kTileRows) {
            v[u][i] = __ldcg(partial_chunks<Partial>(c.args, c.slot_of(s)) + chunk[u] * 128 +
                             row[u] / 16 * 32 + lane);
          }
        }
      }
      if (!factors_known) find_factors(c, share == 0);
      factors_known = true;
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
        const int half = chunk[u] >= kChunks<Partial>;
#pragma unroll
        for (int i = 0; i < kPieces; ++i) {
          const int s = first + i * team;
          if (s < c.split.pieces && row[u] < kTileRows) {
            const float factor[2] = {(&c.stats(row[u], s).x)[2 * half],
                                     (&c.stats(row[u] + 8, s).x)[2 * half]};
            const uint32_t packed[4] = {v[u][i].x, v[u][i].y, v[u][i].z, v[u][i].w};
#pragma unroll
            for (int k = 0; k < kPairs; ++k) {
              const float2 x = Format::unpack(packed, k);
              sum[u][k].x += x.x * factor[k % 2];
              sum[u][k].y += x.y * factor[k % 2];
            }
          }
        }
      }
    }
    if (together) {
#pragma unroll
      for (int k = 0; k < kPairs; ++k) {
        c.scratch.sums[warp][2 * k][lane] = sum[0][k].x;
        c.scratch.sums[warp][2 * k + 1][lane] = sum[0][k].y;
      }
      ptx::named_barrier_sync(kConsumers, kConsumerThreads);
      if (member == 0) {
#pragma unroll
        for (int i = 1; i < 8; ++i) {
#pragma unroll
          for (int k = 0; k < kPairs; ++k) {
            sum[0][k].x += c.scratch.sums[i][2 * k][lane];
            sum[0][k].y += c.scratch.sums[i][2 * k + 1][lane];
          }
        }
      }
      ptx::named_barrier_sync(kConsumers, kConsumerThreads);
      if (member != 0) continue;
    }
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      const int column = chunk[u] * (4 * kPairs) + 2 * (lane % 4);
      const float* inverse = c.scratch.inverse[chunk[u] >= kChunks<Partial>];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int r = row[u] + 8 * e;
        if (r >= c.rows) continue;
        T* dst = static_cast<T*>(c.args.out) +
                 out_offset(c.args, c.seq, c.kv_head, c.first_row + r) + column;
#pragma unroll
        for (int k = e; k < kPairs; k += 2) {
          *reinterpret_cast<uint32_t*>(dst + k / 2 * 8) =
              wgmma::Mma<T>::pack(sum[u][k].x * inverse[r], sum[u][k].y * inverse[r]);
        }
      }
    }
  }
}

// Chooses how many units, of how many pieces, 16 loads are.
template <typename T, typename Partial>
__device__ __forceinline__ void combine_in_flight(const Combination& c, int share) {
  if (c.split.pieces <= 4) {
    combine_units<T, Partial, 4, 4>(c, share);
  } else if (c.split.pieces <= 8) {
    combine_units<T, Partial, 2, 8>(c, share);
  } else {
    combine_units<T, Partial, 1, 16>(c, share);
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
  if (rows < kMinHalfRows) {
    combine_in_flight<T, float>(c, share);
  } else {
    combine_in_flight<T, __half>(c, share);
  }
}

}  // namespace mla

// Copyright 2026 The mla-jax Authors
// SPDX-License-Identifier: Apache-2.0
//
// Combining the partial results of a split sequence, inside the decode kernel.
//
// All CTAs that hold a piece of the sequence as the last thing they do wait until every piece is
// written, then each combines a share of the output. The counter of the sequence counts arrivals
// and departures and wraps to zero by itself, ready for the next call. Waiting needs all CTAs to be
// resident: the kernel is launched cooperatively when it splits.

#pragma once

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
    __stcg(dst + i * 128, make_float4(output[4 * i], output[4 * i + 1], output[4 * i + 2],
                                      output[4 * i + 3]));
  }
  if (half == 0 && thread % 4 == 0) {
    float2* stats = args.partial_stats + slot * kTileRows + row;
    __stcg(stats, make_float2(max.v[0], sum.v[0]));
    __stcg(stats + 8, make_float2(max.v[1], sum.v[1]));
  }
}

// Tells the others that this CTA's piece is written; called by all consumers.
__device__ __forceinline__ void announce_partial(uint32_t* counter, int splits) {
  ptx::named_barrier_sync(kConsumers, kConsumerThreads);
  if (threadIdx.x == 0) {
    ptx::fence_gpu();
    ptx::increment_wrap(counter, 2 * splits - 2);  // splits arrivals, splits - 1 departures
  }
}

// Sums of some of a split sequence's pieces for two rows: `out` relative to the maxima.
struct PieceSums {
  RowPair max, sum;
  float4 out;  // two columns of row 0, two of row 1
};

// Takes the sums of other pieces in.
__device__ __forceinline__ void merge(PieceSums& into, const RowPair& max, const RowPair& sum,
                                      const float4& out) {
  float old_factor[2], new_factor[2];
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    const float top = fmaxf(into.max.v[e], max.v[e]);
    old_factor[e] = rescale_factor(into.max.v[e], top);
    new_factor[e] = rescale_factor(max.v[e], top);
    into.max.v[e] = top;
    into.sum.v[e] = into.sum.v[e] * old_factor[e] + sum.v[e] * new_factor[e];
  }
  into.out.x = into.out.x * old_factor[0] + out.x * new_factor[0];
  into.out.y = into.out.y * old_factor[0] + out.y * new_factor[0];
  into.out.z = into.out.z * old_factor[1] + out.z * new_factor[1];
  into.out.w = into.out.w * old_factor[1] + out.w * new_factor[1];
}

// Waits for all pieces and combines share `share` of `splits - 1`; called by all consumers. The
// exchange lies in the block buffers, which are free by then.
template <typename T, int kCtas>
__device__ __forceinline__ void combine_share(const DecodeArgs& args, const Place<kCtas>& place,
                                              const Item& item, int first_part, int splits,
                                              PieceSums (&exchange)[8][32]) {
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int shares = splits - 1, share = place.part - first_part;
  const int first_row = place.first_row(args), kv_head = place.kv_head(args);
  const int rows = min(args.rows - first_row, kTileRows), row_groups = (rows + 15) / 16;
  uint32_t* counter = args.counters + place.peer(args, first_part);
  // Piece s lies in slot `slots + s * slot_stride`, but the first one in its CTA's other slot.
  const int slots = partial_slot(place.peer(args, first_part), false);
  const int slot_stride = 2 * args.groups * kCtas;

  if (thread == 0) {
    while (ptx::acquire_load(counter) < static_cast<uint32_t>(splits)) {
    }
    ptx::increment_wrap(counter, 2 * splits - 2);
  }
  ptx::named_barrier_sync(kConsumers, kConsumerThreads);

  // A unit is one fragment index of one warp: 32 float4. One warp sums a unit's pieces, a batch at
  // a time, or eight warps do when there are many.
  constexpr int kBatch = 8;
  const int team = splits > 2 * kBatch ? 8 : 1, member = team == 1 ? 0 : warp, teams = 8 / team;
  const int units = 2 * 32 * row_groups;
  for (int base = 0; base * shares + share < units; base += teams) {
    const int unit = (base + (team == 1 ? warp : 0)) * shares + share;
    const int fragment = unit / row_groups, row_group = unit - fragment * row_groups;
    const int row = 16 * row_group + lane / 4;
    PieceSums total = {{kNegativeInfinity, kNegativeInfinity}, {0.f, 0.f}, {0.f, 0.f, 0.f, 0.f}};
    if (unit < units) {
      for (int first = member; first < splits; first += team * kBatch) {
        float4 out[kBatch];
        float2 stats[kBatch][2];
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          const int s = first + i * team;
          stats[i][0] = stats[i][1] = make_float2(kNegativeInfinity, 0.f);
          out[i] = make_float4(0.f, 0.f, 0.f, 0.f);
          if (s < splits) {
            const int slot = slots + s * slot_stride + (s == 0);
            stats[i][0] = __ldcg(args.partial_stats + slot * kTileRows + row);
            stats[i][1] = __ldcg(args.partial_stats + slot * kTileRows + row + 8);
            out[i] = __ldcg(args.partial_out + slot * (2 * 32 * 128) + fragment * 128 +
                            row_group * 32 + lane);
          }
        }
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          merge(total, {stats[i][0].x, stats[i][1].x}, {stats[i][0].y, stats[i][1].y}, out[i]);
        }
      }
    }
    if (team > 1) {
      exchange[warp][lane] = total;
      ptx::named_barrier_sync(kConsumers, kConsumerThreads);
      if (member == 0) {
        for (int i = 1; i < 8; ++i) {
          const PieceSums& other = exchange[i][lane];
          merge(total, other.max, other.sum, other.out);
        }
      }
      ptx::named_barrier_sync(kConsumers, kConsumerThreads);
    }
    if (unit < units && member == 0) {
      const float2 out[2] = {{total.out.x, total.out.y}, {total.out.z, total.out.w}};
      const int column = fragment * 8 + 2 * (lane % 4);  // fragment 32 h + i: columns 256 h + 8 i
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int r = first_row + row + 8 * e;
        if (r >= args.rows) continue;
        const float inverse = total.sum.v[e] > 0.f ? 1.f / total.sum.v[e] : 0.f;
        T* dst = static_cast<T*>(args.out) + out_offset(args, item.seq, kv_head, r) + column;
        *reinterpret_cast<uint32_t*>(dst) =
            wgmma::Mma<T>::pack(out[e].x * inverse, out[e].y * inverse);
        if (fragment == 0 && lane % 4 == 0) {
          args.lse[lse_offset(args, item.seq, kv_head, r)] =
              log_sum_exp(total.max.v[e], total.sum.v[e]);
        }
      }
    }
  }
}

}  // namespace mla

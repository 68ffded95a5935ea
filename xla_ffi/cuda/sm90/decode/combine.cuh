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

#include <type_traits>

#include "layout.cuh"
#include "partial.cuh"
#include "softmax.cuh"

namespace mla {

// A split sequence as those who combine it see it.
struct Split {
  int first_part;  // holds the first piece; the others follow
  int pieces;
  int helpers;  // how many parts combine
  int share;    // this part's number among them
};

// The counters hold garbage when the kernel starts. One idle thread of each CTA clears its share
// and tells the CTA when all are clear, long before the first is wanted. It meets the others at the
// barrier that a cooperative launch brings: memory prepared by CUDA, which grid.sync() of
// cooperative_groups would use with all threads of a CTA. The high bit flips when all have arrived.
__device__ __forceinline__ void clear_counters(const DecodeArgs& args, uint64_t* all_clear) {
  uint32_t* barrier = &cooperative_groups::details::get_grid_workspace()->barrier;
  args.counters[blockIdx.x] = args.counters[kMaxParts + blockIdx.x] = 0;
  const uint32_t before =
      ptx::release_add(barrier, blockIdx.x == 0 ? 0x80000000u - (gridDim.x - 1) : 1u);
  while (((ptx::acquire_load(barrier) ^ before) & 0x80000000u) == 0) {
  }
  ptx::mbarrier_arrive(all_clear);
}

// Tells the others that this warp's share of the CTA's piece is written.
__device__ __forceinline__ void announce_partial(uint32_t* counter) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) ptx::release_increment(counter);
}

// Chunks of a unit where each warp has so many: what is found once for each unit and piece then
// costs less. Wide units never span both halves of the columns.
inline constexpr int kWide = 4;

// What a warp brings together of one piece for a unit: some chunks a thread, and what the values of
// the unit's 16 rows are relative to.
template <int kWidth>
struct Gathered {
  uint4 chunks[kWidth][32];
  float2 stats[16];  // (max in log2 units, sum)
};

// Scratch of the combination, in the query and block buffers, which are free by then. Warps that
// share a unit leave their sums here.
struct CombineScratch {
  float2 values[8][4][32];  // [warp][pair][lane]
  float4 stats[8][32];      // [warp][lane]: (max, max, sum, sum) of the thread's two rows
  uint4 gathered[];         // Gathered [unit of this CTA][piece]
};

// What combining threads need to find and place things. A unit is one or kWide neighbouring chunks
// of one warp of the partial outputs: 16 rows, and columns in pairs. A CTA sums neighbouring units.
struct Combination {
  const DecodeArgs& args;
  CombineScratch& scratch;
  int pieces;
  int seq, kv_head, first_row, rows;
  int first_slot, next_slot, slot_stride;  // of pieces 0, 1 and from there on
  int width;                               // chunks of a unit
  int first_unit, units;                   // of this CTA

  __device__ __forceinline__ int slot_of(int s) const {
    return s == 0 ? first_slot : next_slot + (s - 1) * slot_stride;
  }
};

// Pieces that a warp adds at a time: their latencies pass together.
inline constexpr int kBatch = 4;

// The sum over some pieces of a unit, as one thread has it.
template <int kPairs>
struct Sum {
  RowPair max = {kNegativeInfinity, kNegativeInfinity}, sum = {0.f, 0.f};
  RowPair reference = {0.f, 0.f};  // what exponents are relative to: 0 while nothing has been seen
  float2 values[kPairs] = {};      // unnormalised; pair k is of row k % 2

  // Brings all to new maxima.
  __device__ __forceinline__ void follow(const RowPair& fresh) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      reference.v[row] = fresh.v[row] == kNegativeInfinity ? 0.f : fresh.v[row];
      const float own = factor(row, max.v[row]);
      max.v[row] = fresh.v[row];
      sum.v[row] *= own;
#pragma unroll
      for (int k = row; k < kPairs; k += 2) {
        values[k].x *= own;
        values[k].y *= own;
      }
    }
  }
  // The factor of a summand whose values are relative to `other`.
  __device__ __forceinline__ float factor(int row, float other) const {
    return ptx::exp2_approx(other - reference.v[row]);
  }
  __device__ __forceinline__ void add(int pair, const float2& x, float factor) {
    values[pair].x += x.x * factor;
    values[pair].y += x.y * factor;
  }
};

// Writes a sum as output, normalised: groups of 8 columns, 2 columns of each per lane.
template <typename T, int kPairs, int kAllPairs>
__device__ __forceinline__ void store_sum(const Combination& c, int row_group, int first_chunk,
                                          const Sum<kAllPairs>& total) {
  const int lane = threadIdx.x % 32, first_column = first_chunk * 4 * kPairs;
  constexpr int kGroups = kAllPairs / 2;
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    const int row = 16 * row_group + lane / 4 + 8 * e;
    const bool real = row < c.rows;
    const float sum = total.sum.v[e], inverse = sum == 0.f ? 0.f : ptx::reciprocal_approx(sum);
    T* dst = static_cast<T*>(c.args.out) + first_column +
             (real ? out_offset(c.args, c.seq, c.kv_head, c.first_row + row) : 0);
    uint32_t v[kGroups];
#pragma unroll
    for (int k = 0; k < kGroups; ++k) {
      const float2& pair = total.values[2 * k + e];
      v[k] = wgmma::Mma<T>::pack(pair.x * inverse, pair.y * inverse);
    }
    if constexpr (kGroups % 4 == 0) {
#pragma unroll
      for (int k = 0; k < kGroups; k += 4) {
        uint32_t group[4] = {v[k], v[k + 1], v[k + 2], v[k + 3]};
        transpose_quad(group);
        uint4* to = reinterpret_cast<uint4*>(dst + 8 * k) + lane % 4;
        if (real) *to = make_uint4(group[0], group[1], group[2], group[3]);
      }
    } else {
#pragma unroll
      for (int k = 0; k < kGroups; ++k) {
        if (real) *reinterpret_cast<uint32_t*>(dst + 8 * k + 2 * (lane % 4)) = v[k];
      }
    }
    if (real && first_chunk == 0 && lane % 4 == 0) {
      c.args.lse[lse_offset(c.args, c.seq, c.kv_head, c.first_row + row)] =
          log_sum_exp(total.max.v[e], sum);
    }
  }
}

// Sums the CTA's units: each warp copies what it will sum to shared memory, and needs no other warp
// unless they share a unit. `wait` returns when the pieces are there.
template <typename T, typename Partial, int kWidth, typename Wait>
__device__ __forceinline__ void combine_units(const Combination& c, Wait&& wait) {
  using Format = PartialFormat<Partial>;
  constexpr int kPairs = Format::kPairs;                         // of a chunk
  constexpr int kRowGroupChunks = 1 << kRowGroupShift<Partial>;  // of 16 rows
  auto* const all_gathered = reinterpret_cast<Gathered<kWidth>*>(c.scratch.gathered);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, pieces = c.pieces;
  // Warps of a unit.
  const int team = kWidth > 1 || c.units > 4 ? 1 : c.units > 2 ? 2 : c.units > 1 ? 4 : 8;
  const int member = warp % team, step = 8 / team;
  // Of the i-th unit of this CTA: its 16 rows, and its first chunk of theirs.
  const auto row_group_of = [&](int i) {
    return (c.first_unit + i) * kWidth >> kRowGroupShift<Partial>;
  };
  const auto chunk_of = [&](int i) { return (c.first_unit + i) * kWidth & (kRowGroupChunks - 1); };
  // Where a unit's first pieces lie, the first and the second that this thread copies.
  const int stats_member = member + lane / 8 * team, pair = lane % 8;  // of rows
  const uint4 *chunk, *next_chunk;
  const float2 *stats, *next_stats;
  const auto locate = [&](int i) {
    const int row_group = row_group_of(i), chunk_number = chunk_of(i);
    const int row = 16 * row_group + 2 * pair, half = chunk_number / kChunks<Partial>;
    const int offset = (c.first_unit + i) * kWidth * 32 + lane;
    chunk = partial_chunks(c.args, c.slot_of(member)) + offset;
    next_chunk = partial_chunks(c.args, c.slot_of(member + team)) + offset;
    stats = partial_stats(c.args, c.slot_of(stats_member), half, row);
    next_stats = partial_stats(c.args, c.slot_of(stats_member + 4 * team), half, row);
  };
  const int64_t chunk_stride = c.args.slot_chunks * team * c.slot_stride;
  const int64_t stats_stride = int64_t{4} * team * c.slot_stride * 2 * kTileRows;

  int i = warp / team;
  locate(i);  // while others are still writing
  asm volatile("" : "+l"(chunk), "+l"(next_chunk), "+l"(stats), "+l"(next_stats));
  wait();
#pragma unroll 1
  for (; i < c.units; i += step) {
    Gathered<kWidth>* gathered = all_gathered + i * pieces;
    // The statistics of four pieces at a time: a copy costs the same for all lanes as for few.
#pragma unroll 1
    for (int s = stats_member; s < pieces; s += 4 * team) {
      ptx::copy_async_16(&gathered[s].stats[2 * pair], stats);
      stats = s == stats_member ? next_stats : stats + stats_stride;
    }
#pragma unroll 4
    for (int s = member; s < pieces; s += team) {
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        ptx::copy_async_16(&gathered[s].chunks[j][lane], chunk + j * 32);
      }
      chunk = s == member ? next_chunk : chunk + chunk_stride;
    }
    locate(i + step);  // after the last one for nobody, which takes less than a branch
  }
  ptx::copy_async_wait();
  __syncwarp();

  i = warp / team;
#pragma unroll 1
  do {  // once where warps share units, so that all of them meet
    Sum<kPairs * kWidth> total;
    if (i < c.units) {
      const Gathered<kWidth>* gathered = all_gathered + i * pieces;
#pragma unroll 1
      for (int first = member; first < pieces; first += kBatch * team) {
        uint4 chunks[kBatch][kWidth] = {};
        float2 stats[kBatch][2];
#pragma unroll
        for (int j = 0; j < kBatch; ++j) {
          const int s = first + j * team;
          stats[j][0] = stats[j][1] = make_float2(kNegativeInfinity, 0.f);
          if (s >= pieces) continue;
          stats[j][0] = gathered[s].stats[lane / 4];
          stats[j][1] = gathered[s].stats[lane / 4 + 8];
#pragma unroll
          for (int w = 0; w < kWidth; ++w) chunks[j][w] = gathered[s].chunks[w][lane];
        }
        RowPair max = total.max;
#pragma unroll
        for (int j = 0; j < kBatch; ++j) {
          max.v[0] = fmaxf(max.v[0], stats[j][0].x);
          max.v[1] = fmaxf(max.v[1], stats[j][1].x);
        }
        total.follow(max);
#pragma unroll
        for (int j = 0; j < kBatch; ++j) {
          const float factor[2] = {total.factor(0, stats[j][0].x), total.factor(1, stats[j][1].x)};
          total.sum.v[0] += factor[0] * stats[j][0].y;
          total.sum.v[1] += factor[1] * stats[j][1].y;
#pragma unroll
          for (int w = 0; w < kWidth; ++w) {
            const uint4& chunk = chunks[j][w];
            const uint32_t packed[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
#pragma unroll
            for (int k = 0; k < kPairs; ++k) {
              total.add(w * kPairs + k, Format::unpack(packed, k), factor[k % 2]);
            }
          }
        }
      }
    }
    if (kWidth == 1 && team > 1) {
      c.scratch.stats[warp][lane] =
          make_float4(total.max.v[0], total.max.v[1], total.sum.v[0], total.sum.v[1]);
#pragma unroll
      for (int k = 0; k < kPairs; ++k) c.scratch.values[warp][k][lane] = total.values[k];
      ptx::named_barrier_sync(kConsumers, kConsumerThreads);
      if (member > 0) return;
      // Unrolled, so that all loads are on their way at once.
      float4 stats[8];
#pragma unroll
      for (int w = 1; w < 8; ++w) {
        stats[w] = make_float4(kNegativeInfinity, kNegativeInfinity, 0.f, 0.f);
        if (w < team) stats[w] = c.scratch.stats[warp + w][lane];
      }
      RowPair max = total.max;
#pragma unroll
      for (int w = 1; w < 8; ++w) {
        max.v[0] = fmaxf(max.v[0], stats[w].x);
        max.v[1] = fmaxf(max.v[1], stats[w].y);
      }
      total.follow(max);
#pragma unroll
      for (int w = 1; w < 8; ++w) {
        if (w >= team) break;
        const float factor[2] = {total.factor(0, stats[w].x), total.factor(1, stats[w].y)};
        total.sum.v[0] += factor[0] * stats[w].z;
        total.sum.v[1] += factor[1] * stats[w].w;
#pragma unroll
        for (int k = 0; k < kPairs; ++k) {
          total.add(k, c.scratch.values[warp + w][k][lane], factor[k % 2]);
        }
      }
    }
    if (i >= c.units) return;
    store_sum<T, kPairs>(c, row_group_of(i), chunk_of(i), total);
    i += step;
  } while (i < c.units);
}

// There is at most one piece more than shares. Of wide units two pieces that one share combines
// take the most memory.
static_assert(sizeof(CombineScratch) + 2 * (kTileRows / 16 << kRowGroupShift<__half>) / kWide *
                                           sizeof(Gathered<kWide>) <=
              offsetof(Shared, query_full));

// Gives share `share` of `shares` its units.
__device__ __forceinline__ void take_units(Combination& c, bool half, int share, int shares) {
  const int chunks = (c.rows + 15) / 16 << (half ? kRowGroupShift<__half> : kRowGroupShift<float>);
  const int most = Divisor(shares).ceil(chunks);
  c.width = half && most >= 8 * kWide ? kWide : 1;
  const int units = c.width == 1 ? most : (most + kWide - 1) / kWide;
  c.first_unit = share * units;
  c.units = min(units, (c.width == 1 ? chunks : chunks / kWide) - c.first_unit);
}

// Waits for all pieces and combines this part's share; called by all consumers. A rehearsal waits
// for nothing and writes nothing.
template <typename Tile>
__device__ __forceinline__ void combine(const DecodeArgs& args, const Place& place, int seq,
                                        const Split& split, void* scratch, bool rehearses) {
  using T = typename Tile::Element;
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
  const bool half = is_half<Tile, false>(rows);
  take_units(c, half, split.share, split.helpers);
  if (c.units <= 0) return;
  if (rehearses) c.rows = 0;
  const uint32_t expected = split.pieces * partial_tellers(rows);
  const auto wait = [&] {
    if (threadIdx.x == 0 && !rehearses) {
      while (ptx::acquire_load(args.counters + cta) < expected) {
      }
    }
    ptx::named_barrier_sync(kConsumers, kConsumerThreads);
  };
  if (!half) {
    combine_units<T, float, 1>(c, wait);
  } else if constexpr (Tile::kHalfPartials) {
    if (c.width == 1) {
      combine_units<T, __half, 1>(c, wait);
    } else {
      combine_units<T, __half, kWide>(c, wait);
    }
  }
}

// Combines what batch-invariant decode has cut; kFixedShares CTAs for each sequence and tile, each
// of which has up to 8 units.
inline constexpr int kFixedShares = 16;
__host__ constexpr int fixed_combine_bytes(int most_pieces) {
  return sizeof(CombineScratch) + 8 * most_pieces * sizeof(Gathered<1>);
}

template <typename Tile>
__global__ void __launch_bounds__(kConsumerThreads)
    combine_kernel(const __grid_constant__ DecodeArgs args) {
  using Partial = std::conditional_t<Tile::kHalfPartials, __half, float>;
  extern __shared__ __align__(16) uint8_t scratch[];
  ptx::grid_dependency_wait();
  const int tile_of_seq = blockIdx.x / kFixedShares, seq = args.grids[0].groups.floor(tile_of_seq);
  const int group = tile_of_seq - seq * args.grids[0].groups.value;
  const int blocks =
      sequence_blocks(sequence_tokens(args.seqlens, seq, args.max_pages_per_seq * args.page_size));
  const int pieces = Divisor(fixed_piece_blocks(blocks)).ceil(blocks);
  if (pieces == 1) return;
  const Place place = Place::of_group(args, 0, group);
  const int slot = fixed_slot(args, place, seq, 0);
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
  take_units(c, Tile::kHalfPartials, blockIdx.x % kFixedShares, kFixedShares);
  if (c.units > 0) combine_units<typename Tile::Element, Partial, 1>(c, [] {});
}

}  // namespace mla

// Copyright 2026 The mla-jax Authors
// SPDX-License-Identifier: Apache-2.0
//
// What the parts of the decode kernel agree on: arguments, shared memory, tiles, partial results.

#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "../wgmma.cuh"
#include "schedule.cuh"

namespace mla {

inline constexpr int kTileRows = 64;       // packed query rows of one CTA
inline constexpr int kNarrowRows = 16;     // the most of a narrow tile, see narrow.cuh
inline constexpr int kValueColumns = 512;  // d_v; a warpgroup accumulates half of them
inline constexpr int kHalfColumns = 256;
inline constexpr int kMaxPieces = 9;  // of 64 columns; the ninth is RoPE's: K only
inline constexpr int kBoxes = 5;      // copies that bring a block: four of two pieces, RoPE's
inline constexpr int kConsumerThreads = 256;
inline constexpr int kThreads = 384;

// What is needed first comes first: arguments begin at 0x210 of the constant bank, and each further
// line of 256 bytes costs 500 cycles at a kernel's start.
struct DecodeArgs {
  const int32_t* seqlens;
  const int32_t* block_table;
  int b;
  int max_pages_per_seq;
  int page_size, page_shift;  // a power of two, and its log2
  int fixed_pieces;           // batch-invariant: the most of a sequence
  int rows;                   // s_q * G
  KnownDivisor h_kv;
  Grid grids[kTileHeights];
  bool cooperative;  // pieces of a sequence wait for each other
  bool causal;
  int s_q, h_q;
  int query_pieces;           // of the queries' first array: all, or RoPE's are in another
  KnownDivisor heads_per_kv;  // G = h_q / h_kv
  float scale_log2;           // softmax_scale * log2(e)
  // Garbage until counters_clear. [CTAs]: pieces written; from kMaxParts on [parts]: pairs of
  // blocks that CTAs have come to.
  uint32_t* counters;
  uint4* partial_out;  // partial results of split sequences, see partial.cuh
  float2* partial_stats;
  int64_t slot_chunks;  // from one partial result to the next in partial_out
  void* out;
  float* lse;
};
static_assert(offsetof(DecodeArgs, counters) <= 0x300 - 0x210);

// Where a CTA stands in the grid: blockIdx.x = part * groups + group.
struct Place {
  int groups, group, part, kv_head;
  int first_row, end_row;  // of the packed query rows

  __device__ __forceinline__ static Place here(const DecodeArgs& args, int height) {
    const KnownDivisor groups = args.grids[height].groups;
    const int part = groups.floor(blockIdx.x);
    Place place = of_group(args, height, blockIdx.x - part * groups.value);
    place.part = part;
    return place;
  }
  __device__ __forceinline__ static Place of_group(const DecodeArgs& args, int height, int group) {
    const int tile = args.h_kv.floor(group), first_row = tile * tile_height(height);
    return {args.grids[height].groups.value,
            group,
            0,
            group - tile * args.h_kv.value,
            first_row,
            min(first_row + tile_height(height), args.rows)};
  }
  // The CTA that does for `other_part` what this one does for its own.
  __device__ __forceinline__ int peer(int other_part) const {
    return blockIdx.x + (other_part - part) * groups;
  }
};

// Shared memory of a CTA; all pieces are 1024-byte aligned for the swizzle.
struct Shared {
  uint8_t query[kMaxPieces][wgmma::kPieceBytes];
  // Two blocks of 64 tokens. Once the scores of a block are done its RoPE piece is dead, and the
  // block's softmax weights take its place; a narrow tile's lie behind its few queries.
  uint8_t cache[2][kMaxPieces][wgmma::kPieceBytes];
  uint64_t query_full;
  uint64_t query_empty;
  uint64_t cache_full[2][kBoxes];
  uint64_t cache_empty[2][2];  // [buffer][half of the value columns]
  float max[2][kTileRows];     // the running maxima after the last block of [buffer]
  // [item parity][warpgroup]: sums of a wide tile's rows, or of a narrow one's, four warps' of
  // each.
  float4 sum[2][2][kTileRows / 4];
  float4 tops[2][2][kNarrowRows];  // of a narrow tile: [buffer][parity of its use]
  uint64_t counters_clear;         // completes when the grid's counters are zero, and pieces known
  volatile bool copying;           // a hint, in no order: it is too late to prefetch
  Part part;
  Pieces pieces;
  Place place;
};
inline constexpr int kWeightsPiece = 8;
static_assert(kTileRows == 4 * kNarrowRows);

// One map for each height of tiles: of the pieces that are values too, and of the last one.
struct QueryMaps {
  CUtensorMap values[kTileHeights];
  CUtensorMap last[kTileHeights];
};
// Of the cache: boxes of one piece and of two.
struct CacheMaps {
  CUtensorMap one, two;
};
// How queries are copied: rows of a box, a multiple of the swizzle's 8, and its pieces. The tile's
// other rows hold anything and are never stored.
struct QueryBox {
  int rows, pieces;
};
// `stride` rows are from one piece to the next in shared memory. A box that fills them brings all
// pieces of an array, `pieces`, at once; else they are copied one by one.
__host__ __device__ __forceinline__ QueryBox query_box(int rows, int height, int stride,
                                                       int pieces) {
  const int box_rows = min((rows + 7) / 8 * 8, tile_height(height));
  // Where the stride is short, rows past the last cost little.
  return stride <= kNarrowRows || box_rows == stride ? QueryBox{stride, pieces}
                                                     : QueryBox{box_rows, 1};
}

// One sequence (or a piece of it) as one CTA sees it.
struct Item {
  int seq, tokens;
  int begin, end;  // blocks
  bool whole;      // not split: no partial results
  int parity;      // of the item's number within the CTA
};

// What the last CTAs do where they have no work: a rehearsal of what others will do. By the time
// that a kernel of the model's next layer starts, weights have pushed its code out of L2, and each
// miss is a thousand cycles. Who has nothing to wait for gets to the code before the others, so
// that they find it in L2. Nothing of a rehearsal is used.
enum class Rehearsal {
  kNone,
  kBlock,    // a block past the end of all sequences, and what follows it in an item
  kResult,   // a partial result of no blocks, and its combination
  kCombine,  // a combination of no pieces
};
// Two of each kind are enough, and more take from the others: SMs share what brings them code.
inline constexpr int kRehearsers = 6;
__device__ __forceinline__ Rehearsal rehearsal_of(const DecodeArgs& args, const Part& part) {
  const bool idle = args.cooperative && part.begin_seq > part.end_seq;
  if (!idle || blockIdx.x + kRehearsers < gridDim.x) return Rehearsal::kNone;
  return static_cast<Rehearsal>(1 + blockIdx.x % 3);
}

// Calls body(item) for each item of the part, in order, or for the one of a rehearsal. An item is
// what the part has of a sequence, or a fixed piece that begins in that.
template <bool kFixed, typename Body>
__device__ __forceinline__ void for_each_item(const DecodeArgs& args, const Part& part, Body&& body,
                                              Rehearsal rehearsal = Rehearsal::kNone) {
  const int max_tokens = args.max_pages_per_seq * args.page_size;
  const bool one = rehearsal == Rehearsal::kBlock || rehearsal == Rehearsal::kResult;
  const int end_seq = one ? part.begin_seq : part.end_seq;
  int parity = 0;
  for (int seq = part.begin_seq; seq <= end_seq; ++seq) {
    const int tokens =
        seq == part.begin_seq ? part.begin_tokens : sequence_tokens(args.seqlens, seq, max_tokens);
    const int blocks = sequence_blocks(tokens);
    const int begin = seq == part.begin_seq ? part.begin_block : 0;
    const int end = one                   ? begin + (rehearsal == Rehearsal::kBlock)
                    : seq == part.end_seq ? part.end_block
                                          : blocks;
    if constexpr (kFixed) {
      const int size = fixed_piece_blocks(blocks);
#pragma unroll 1
      for (int i = fixed_piece_begin(begin, size); i < end; i += size, parity ^= 1) {
        body(Item{seq, tokens, i, min(i + size, blocks), size >= blocks, parity});
      }
    } else {
      body(Item{seq, tokens, begin, end, begin == 0 && end == blocks, parity});
      parity ^= 1;
    }
  }
}

// Offsets of packed row `row` in out [b, s_q, h_q, d_v] and lse [b, h_q, s_q].
__device__ __forceinline__ int64_t out_offset(const DecodeArgs& args, int seq, int kv_head,
                                              int row) {
  const int64_t first = int64_t{seq} * args.s_q * args.h_q;
  const int group = args.heads_per_kv.value, query = args.heads_per_kv.floor(row);
  return (first + row + query * (args.h_q - group) + kv_head * group) * kValueColumns;
}
__device__ __forceinline__ int64_t lse_offset(const DecodeArgs& args, int seq, int kv_head,
                                              int row) {
  const int group = args.heads_per_kv.value, query = args.heads_per_kv.floor(row);
  const int64_t first = int64_t{seq} * args.h_q + kv_head * group;
  return (first + row - query * group) * args.s_q + query;
}

// log(sum of exp) from the maximum in log2 units and the sum relative to it; a NaN stays one.
__device__ __forceinline__ float log_sum_exp(float max, float sum) {
  return sum == 0.f ? __builtin_huge_valf() : (max + __log2f(sum)) * 0.6931471805599453f;
}

// The warps that follow the consumers.
enum Warp : int {
  kCacheWarp = 8,      // finds the part and copies its blocks
  kQueryWarp = 9,      // copies queries
  kCountersWarp = 10,  // finds the pieces, clears the grid's counters
  kAheadWarp = 11,     // prefetches while the part is not known, then rehearses
};

// Barriers of bar.sync; 0 would be that of __syncthreads.
enum NamedBarrier : int {
  kEvenWeightsReady = 1,  // buffer 0's weights and maxima are in shared memory
  kOddWeightsReady = 2,
  kConsumers = 3,
  kWarpgroup = 4,  // and 5: one warpgroup
  kStart = 6,      // the part is known
  kMbarriersReady = 7,
  kOthers = 8,             // those whom kMbarriersReady does not concern; for racecheck
  kEvenScoresStarted = 9,  // all products of the even scores are queued
  kAheadStart = 10,        // kStart of kAheadWarp
};

}  // namespace mla

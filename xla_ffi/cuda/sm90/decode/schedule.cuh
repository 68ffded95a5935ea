// Copyright 2026 The mla-jax Authors
// SPDX-License-Identifier: Apache-2.0
//
// The split-KV schedule: which blocks of which sequences a CTA works on.
//
// All blocks of all sequences are laid out on one line, and the line is cut into equal parts, one
// for each CTA of a tile, so that all multiprocessors end together. Every CTA finds its own from
// the lengths alone, by one warp, in the kernel's prologue: no table, no second kernel.
//
// Two layouts of the line:
//   aligned: each sequence is padded to a multiple of the part, so that no part spans two sequences
//            and sequences of one length are split alike;
//   packed:  each sequence is preceded by a gap that stands for the fixed cost of starting one.
// Aligned wins unless its padding leaves too many multiprocessors idle.

#pragma once

#include <cstdint>

#include "../ptx.cuh"

namespace mla {

inline constexpr int kBlockTokens = 64;
// The most parts of a schedule: no Hopper GPU has more multiprocessors, and the pieces of a
// sequence that many CTAs can combine are bounded by their shared memory.
inline constexpr int kMaxParts = 132;

// The heights of row tiles to choose from. A low one leaves tensor cores idle, and costs less when
// partial results are combined: for few blocks, when there are multiprocessors to spare.
inline constexpr int kTileHeights = 3;
__host__ __device__ constexpr int tile_height(int i) { return 64 >> i; }

// How the grid is laid out for one height of tiles.
struct Grid {
  int groups;  // CTAs that go through the same blocks: row tiles * h_kv
  int parts;   // cuts of the schedule; parts * groups CTAs have work
};

// A CTA's work: from block `begin_block` of `begin_seq` up to, and excluding, block `end_block`
// of `end_seq`; all blocks of the sequences between. Empty if end_seq < begin_seq.
struct Part {
  int height;  // index of the tiles' height
  int begin_seq, begin_block;
  int end_seq, end_block;
  int begin_seq_first_part;                   // the part that holds block 0 of begin_seq
  int end_seq_first_part, end_seq_last_part;  // the parts that hold end_seq's first and last block
  bool one_sequence;                          // no part spans two sequences
};

// Tokens of sequence i that count. Lengths may be anything; the table bounds them.
__device__ __forceinline__ int sequence_tokens(const int32_t* seqlens, int i, int max_tokens) {
  return min(max(__ldg(seqlens + i), 0), max_tokens);
}

// An empty sequence has one block, all masked, so that its output gets written.
__device__ __forceinline__ int sequence_blocks(int tokens) {
  return max((tokens + kBlockTokens - 1) / kBlockTokens, 1);
}

// Division by one number, for 0 <= a < 2^30 and 0 < b: a few instructions instead of dozens.
class Divisor {
 public:
  __device__ __forceinline__ explicit Divisor(int b) : b_(b), inverse_(ptx::reciprocal_approx(b)) {}

  __device__ __forceinline__ int floor(int a) const {
    // The first quotient may be off by 2^-22 of itself, the second by one.
    int q = __float2int_rd(a * inverse_);
    q += __float2int_rd((a - q * b_) * inverse_);
    const int rest = a - q * b_;
    return q + (rest >= b_) - (rest < 0);
  }
  __device__ __forceinline__ int ceil(int a) const { return floor(a + b_ - 1); }

 private:
  int b_;
  float inverse_;
};

__device__ __forceinline__ int warp_sum(int v) { return __reduce_add_sync(0xFFFFFFFFu, v); }

// Blocks that starting a sequence costs (query load, pipeline fill, epilogue).
inline constexpr int kSequenceOverhead = 3;
// Blocks that combining a tile of 64 rows costs.
inline constexpr int kCombineOverhead = 4;

// Batch-invariant decode cuts a sequence by its own length alone: pieces of 8 blocks or more, 16
// pieces at most. Each is the part of one CTA, and a second kernel combines them.
inline constexpr int kFixedPieces = 16;
__host__ __device__ __forceinline__ int fixed_piece_blocks(int blocks) {
  const int size = (blocks + kFixedPieces - 1) / kFixedPieces;
  return size > 8 ? size : 8;
}
// The most pieces of a sequence of at most `blocks` blocks.
__host__ __device__ __forceinline__ int most_fixed_pieces(int blocks) {
  const int pieces = (blocks + 7) / 8;
  return pieces < kFixedPieces ? pieces : kFixedPieces;
}

// The part that is piece `index % pieces` of sequence `index / pieces`, if there is such a piece.
__device__ inline Part fixed_part(const int32_t* seqlens, int b, int max_tokens, int index,
                                  int pieces) {
  const int seq = index / pieces,
            blocks = sequence_blocks(sequence_tokens(seqlens, seq, max_tokens));
  const int size = fixed_piece_blocks(blocks), begin = (index - seq * pieces) * size;
  if (begin >= blocks) return Part{0, b, 0, -1, 0, 0, 0, 0, true};
  return Part{0, seq, begin, seq, min(begin + size, blocks), 0, 0, 0, true};
}

// Finds the part of the `cta`-th CTA; called by one whole warp, the result is in `*result` (shared
// memory).
__device__ inline void find_part(const int32_t* seqlens, int b, int max_tokens, int cta,
                                 const Grid (&grids)[kTileHeights], Part* result) {
  const int lane = threadIdx.x % 32;
  const auto blocks_of = [&](int i) {
    return i < b ? sequence_blocks(sequence_tokens(seqlens, i, max_tokens)) : 0;
  };

  int total = 0, longest = 0;
  for (int i = lane; i < b; i += 32) {
    const int n = blocks_of(i);
    total += n;
    longest = max(longest, n);
  }
  total = warp_sum(total);
  longest = __reduce_max_sync(0xFFFFFFFFu, longest);

  int height = 0, least = Divisor(grids[0].parts).ceil(total) + kCombineOverhead;
#pragma unroll
  for (int i = 1; i < kTileHeights; ++i) {
    const int cost = Divisor(grids[i].parts).ceil(total) + (kCombineOverhead >> i);
    if (grids[i].groups > grids[0].groups && cost < least) height = i, least = cost;
  }
  const int num_parts = grids[height].parts;
  const int part = Divisor(grids[height].groups).floor(cta);
  const Divisor by_parts(num_parts);

  // Packed, and if that costs little, rounded so that sequences of one length end at a cut.
  int size = by_parts.ceil(total + b * kSequenceOverhead);
  int gap = kSequenceOverhead;
  const int whole = Divisor(longest + gap).ceil(size) * (longest + gap);
  if (whole - size <= 2 + size / 32) size = whole;

  if (b <= num_parts) {
    // The smallest aligned size for which the parts suffice lies in [low, high].
    int low = by_parts.ceil(total);
    int high = b < num_parts ? min(longest, Divisor(num_parts - b).ceil(total)) : longest;
    while (low < high) {
      const int middle = (low + high) / 2;
      const Divisor by_middle(middle);
      int needed = 0;
#pragma unroll 1
      for (int i = lane; i < b; i += 32) needed += by_middle.ceil(blocks_of(i));
      if (warp_sum(needed) <= num_parts) {
        high = middle;
      } else {
        low = middle + 1;
      }
    }
    if (high <= size + 2 + size / 16) {
      size = high;
      gap = 0;
    }
  }

  if (lane == 0) {  // stays empty past the line's end
    *result = Part{height, b, 0, -1, 0, 0, 0, 0, gap == 0};
  }
  __syncwarp();
  if (part >= num_parts) return;
  const Divisor by_size(size);
  const int begin = part * size, end = begin + size;
  const auto cost_of = [&](int n) { return gap > 0 ? n + gap : by_size.ceil(n) * size; };
  int before = 0;  // cost of the sequences before the 32 at hand
  for (int first = 0; first < b && before < end; first += 32) {
    const int i = first + lane;
    int n = blocks_of(i);
    const int cost = i < b ? cost_of(n) : 0;
    int sum = cost;
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
      const int other = __shfl_up_sync(0xFFFFFFFFu, sum, d);
      if (lane >= d) sum += other;
    }
    int start = before + sum - cost;  // where sequence i starts on the line
    if (i < b && start <= begin && begin < start + cost) {
      result->begin_seq = i;
      result->begin_block = max(begin - start - gap, 0);
      result->begin_seq_first_part = by_size.floor(start + gap);
    }
    if (i < b && start < end && (end <= start + cost || i == b - 1)) {
      int seq = i;
      int end_block = min(end - start - gap, n);
      if (end_block <= 0 &&
          i > 0) {  // the cut falls in the gap: the part ends with its predecessor
        seq = i - 1;
        n = blocks_of(seq);
        start -= cost_of(n);
        end_block = n;
      }
      result->end_seq = end_block > 0 ? seq : -1;
      result->end_block = end_block;
      result->end_seq_first_part = by_size.floor(start + gap);
      result->end_seq_last_part = by_size.floor(start + gap + n - 1);
    }
    before += __shfl_sync(0xFFFFFFFFu, sum, 31);
  }
  __syncwarp();
}

}  // namespace mla

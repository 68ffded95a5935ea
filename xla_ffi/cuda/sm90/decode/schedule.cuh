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

#include <algorithm>
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

// Division by a number that the host knows, for 0 <= a < 2^31 and 0 < value: a multiplication and a
// shift (Granlund and Montgomery, "Division by invariant integers using multiplication", 1994).
struct KnownDivisor {
  int value;
  int shift;
  uint32_t multiplier;

  static KnownDivisor of(int value) {
    int shift = 0;
    while ((int64_t{1} << shift) < value) ++shift;
    const uint64_t rest = (uint64_t{1} << shift) - value;
    return {value, shift, static_cast<uint32_t>((rest << 32) / value + 1)};
  }
  __device__ __forceinline__ int floor(int a) const {
    return (__umulhi(multiplier, a) + static_cast<uint32_t>(a)) >> shift;
  }
  __device__ __forceinline__ int ceil(int a) const { return floor(a + value - 1); }
};

// Blocks that combining a tile of 64 rows costs; lower ones, half or a quarter.
inline constexpr int kCombineOverhead = 4;

// Parts of more blocks are long: copies are issued in bursts, and more than two tiles of the same
// blocks keep in step.
inline constexpr int kLongPart = 192;

// How the grid is laid out for one height of tiles.
struct Grid {
  KnownDivisor groups;  // CTAs that go through the same blocks: row tiles * h_kv
  KnownDivisor parts;   // cuts of the schedule; parts * groups CTAs have work
  KnownDivisor spare;   // parts that are left when each sequence has one, at least 1
  int most_blocks;      // for so many, in all sequences, these tiles are better than higher ones
};

// Lays out the grid for all heights of tiles, given the groups of each; the highest ones fit.
inline void lay_out(Grid (&grids)[kTileHeights], const int64_t (&groups)[kTileHeights], int ctas,
                    int b) {
  for (int i = 0; i < kTileHeights; ++i) {
    if (i > 0 && (groups[i] > ctas || groups[i] == groups[i - 1])) {
      grids[i] = grids[i - 1];
      grids[i].most_blocks = 0;
      continue;
    }
    const int parts = static_cast<int>(ctas / groups[i]);
    grids[i] = {KnownDivisor::of(static_cast<int>(groups[i])), KnownDivisor::of(parts),
                KnownDivisor::of(parts > b ? parts - b : 1), 0};
    const auto cost = [&](int height, int blocks) {
      const int of_each = grids[height].parts.value;
      return (blocks + of_each - 1) / of_each + (kCombineOverhead >> height);
    };
    int size = 0;  // blocks of a part: low tiles pay while there are few
    const auto pays = [&](int blocks) {
      for (int j = 0; j < i; ++j) {
        if (cost(i, blocks) >= cost(j, blocks)) return false;
      }
      return i > 0;
    };
    while (size < 2 * kCombineOverhead && pays((size + 1) * parts)) ++size;
    grids[i].most_blocks = size * parts;
  }
}

// Parts of so many blocks of the lowest tiles take no longer than those of higher ones in a kernel
// that knows no others.
inline constexpr int kLowestPart = 5;

// Makes the lowest tiles the choice whatever the lengths, if the table has room for few blocks, and
// if there are tiles so low; returns whether.
inline bool prefer_lowest(Grid (&grids)[kTileHeights], int64_t room) {
  Grid& lowest = grids[kTileHeights - 1];
  const int most = kLowestPart * lowest.parts.value;
  if (lowest.most_blocks == 0 || room > most) return false;
  if (lowest.most_blocks < most) lowest.most_blocks = most;
  return true;
}

// A CTA's work: from block `begin_block` of `begin_seq` up to, and excluding, block `end_block`
// of `end_seq`; all blocks of the sequences between. Empty if end_seq < begin_seq.
struct Part {
  int height;  // index of the tiles' height
  int begin_seq, begin_block;
  int end_seq, end_block;
  int begin_tokens;   // of begin_seq
  bool one_sequence;  // no part spans two sequences
  // For find_pieces: the parts' size, and where on the line begin_seq's first block and end_seq's
  // first and last lie, and the line's end, which may leave the last part unfilled.
  int size, begin_seq_at, end_seq_at, end_seq_last_at, line_end;
  int helper = -1;  // of a part without work: its number among end_seq's helpers, if it is one
};

// Who else has pieces of the sequences that a part cuts: the parts that hold begin_seq's first
// block, end_seq's first and its last, and how many without work help with each sequence.
struct Pieces {
  int begin_seq_first, end_seq_first, end_seq_last;
  int helpers;
};

// Tokens of sequence i that count. Lengths may be anything; the table bounds them.
__device__ __forceinline__ int sequence_tokens(const int32_t* seqlens, int i, int max_tokens) {
  return min(max(__ldg(seqlens + i), 0), max_tokens);
}

// An empty sequence has one block, all masked, so that its output gets written.
__device__ __forceinline__ int sequence_blocks(int tokens) {
  return max((tokens + kBlockTokens - 1) / kBlockTokens, 1);
}

// Division by another number, for 0 <= a < 2^30, 0 < b and quotients below 2^20: a few instructions
// instead of dozens.
class Divisor {
 public:
  __device__ __forceinline__ explicit Divisor(int b) : b_(b), inverse_(ptx::reciprocal_approx(b)) {}

  __device__ __forceinline__ int floor(int a) const {
    const int q = __float2int_rd(a * inverse_);  // off by 2^-22 of itself and by one, at most
    const int rest = a - q * b_;
    return q + (rest >= b_) - (rest < 0);
  }
  __device__ __forceinline__ int ceil(int a) const { return floor(a + b_ - 1); }

 private:
  int b_;
  float inverse_;
};

__device__ __forceinline__ int warp_sum(int v) { return __reduce_add_sync(0xFFFFFFFFu, v); }
__device__ __forceinline__ int warp_max(int v) { return __reduce_max_sync(0xFFFFFFFFu, v); }

// The sum over this lane and those before it.
__device__ __forceinline__ int warp_scan(int v) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    const int other = __shfl_up_sync(0xFFFFFFFFu, v, d);
    if (lane >= d) v += other;
  }
  return v;
}

// Blocks that starting a sequence costs (query load, pipeline fill, epilogue).
inline constexpr int kSequenceOverhead = 3;
// A sequence that would have more pieces is cut into pieces of an even number of blocks.
inline constexpr int kManyPieces = 64;

// Batch-invariant decode cuts a sequence by its own length alone: into up to 16 pieces of 8 to 16
// blocks, or up to 32 of 16 or more. A second kernel combines them.
inline constexpr int kFixedPieces = 32;
__device__ __forceinline__ int fixed_piece_blocks(int blocks) {
  const int size = max((blocks + 15) / 16, 8);
  return size <= 16 ? size : max((blocks + kFixedPieces - 1) / kFixedPieces, 16);
}
// The most pieces of a sequence of at most `blocks` blocks.
inline int most_fixed_pieces(int blocks) {
  return blocks <= 16 * 16 ? std::min((blocks + 7) / 8, 16)
                           : std::min((blocks + 15) / 16, kFixedPieces);
}

// The first block from `block` on with which a piece begins. A part computes the pieces that begin
// in it.
__device__ __forceinline__ int fixed_piece_begin(int block, int size) {
  return Divisor(size).ceil(block) * size;
}

// Parts without work that help to combine each sequence, where no part spans two.
__device__ __forceinline__ int spare_helpers(int num_parts, int used, int b) {
  return Divisor(b).floor(num_parts - used);
}

// The height of tiles, as an index, for so many blocks.
__device__ __forceinline__ int choose_height(const Grid (&grids)[kTileHeights], int blocks) {
  int height = 0;
#pragma unroll
  for (int i = 1; i < kTileHeights; ++i) {
    if (blocks <= grids[i].most_blocks) height = i;
  }
  return height;
}

// An aligned part's size: a block more, for the warpgroup that has less to do, takes less time than
// the statistics of very many pieces.
__device__ __forceinline__ int without_many_pieces(int size, int longest) {
  return longest > kManyPieces * size ? (size + 1) / 2 * 2 : size;
}

// The size of the parts of one sequence.
__device__ __forceinline__ int part_size_of_one(int blocks, const Grid& grid) {
  return without_many_pieces(grid.parts.ceil(blocks), blocks);
}

// How many parts have blocks of it.
__device__ __forceinline__ int pieces_of_one(int tokens, const Grid (&grids)[kTileHeights]) {
  const int blocks = sequence_blocks(tokens);
  const int size = part_size_of_one(blocks, grids[choose_height(grids, blocks)]);
  return Divisor(size).ceil(blocks);
}

// What find_part() finds for one sequence, without the rest's latency: aligned is as good as
// packed.
__device__ inline Part part_of_one(int tokens, int cta, const Grid (&grids)[kTileHeights]) {
  const int blocks = sequence_blocks(tokens), height = choose_height(grids, blocks);
  const Grid grid = grids[height];
  const int num_parts = grid.parts.value, part = grid.groups.floor(cta);
  const int size = part_size_of_one(blocks, grid);
  const int begin = part * size;
  Part found = {height, 1, 0, -1, 0, 0, true, size, 0, 0, 0, blocks, -1};
  if (part >= num_parts) return found;
  found.end_seq = 0;
  found.end_seq_last_at = blocks - 1;
  if (begin < blocks) {
    found.begin_seq = 0;
    found.begin_block = begin;
    found.begin_tokens = tokens;
    found.end_block = min(begin + size, blocks);
  } else {
    found.helper = part - Divisor(size).ceil(blocks);
  }
  return found;
}

// How the line is cut.
struct Cut {
  int size;  // of a part
  int gap;   // before each sequence; none: aligned

  // What a sequence takes of the line.
  __device__ __forceinline__ int cost(int blocks, const Divisor& by_size) const {
    return gap > 0 ? blocks + gap : blocks <= size ? size : by_size.ceil(blocks) * size;
  }
};

// The size of packed parts of `b` sequences with so many blocks.
__device__ __forceinline__ int packed_size(const Grid& grid, int b, int total) {
  return grid.parts.ceil(total + b * kSequenceOverhead);
}
// Aligned parts are better up to this size.
__device__ __forceinline__ int most_aligned_size(int packed) { return packed + 2 + packed / 16; }
// Whether packed parts are rounded up to `whole`, where the longest sequence ends. Of millions of
// sequences that may be too small.
__device__ __forceinline__ bool rounds_up(int packed, int whole) {
  return whole >= packed && whole - packed <= 2 + packed / 32;
}

// Chooses it for `b` sequences, two or more, whose blocks are `total`, the most of one `longest`.
// pieces_by(divisor) is how many pieces they all have in parts of that size.
template <typename Pieces>
__device__ __forceinline__ Cut choose_cut(const Grid& grid, int b, int total, int longest,
                                          Pieces&& pieces_by) {
  const int num_parts = grid.parts.value;
  const int packed = packed_size(grid, b, total), most_aligned = most_aligned_size(packed);
  int aligned = INT32_MAX;  // the smallest size for which the parts suffice, if at most that
  if (b <= num_parts) {
    int low = grid.parts.ceil(total), tried = low;  // for equal lengths that is often it
    aligned = min(b < num_parts ? min(longest, grid.spare.ceil(total)) : longest, most_aligned + 1);
    while (low < aligned) {
      if (pieces_by(Divisor(tried)) <= num_parts) {
        aligned = tried;
      } else {
        low = tried + 1;
      }
      tried = (low + aligned) / 2;
    }
  }
  if (aligned <= most_aligned) return {without_many_pieces(aligned, longest), 0};
  // Packed, and if that costs little, rounded so that sequences of one length end at a cut.
  const int whole =
      Divisor(longest + kSequenceOverhead).ceil(packed) * (longest + kSequenceOverhead);
  return {rounds_up(packed, whole) ? whole : packed, kSequenceOverhead};
}

// Writes where a part ends: at the cut `end` of the line, in a sequence whose first block lies at
// `at`, or before its first block.
__device__ __forceinline__ void write_end(Part* part, int seq, int blocks, int at, int end) {
  part->end_seq = end > at ? seq : -1;
  part->end_block = min(end - at, blocks);
  part->end_seq_at = at;
  part->end_seq_last_at = at + blocks - 1;
}

// What find_part() finds for 2 to 32 * kEach sequences: each lane has kEach neighbours, and some
// lanes write what they know of the result, each other fields.
template <int kEach>
__device__ inline void part_of_some(const int32_t* seqlens, int b, int max_tokens, int cta,
                                    const Grid (&grids)[kTileHeights], Part* result) {
  const int lane = threadIdx.x % 32, first = lane * kEach;
  int tokens[kEach], blocks[kEach], sum = 0, most = 0;
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    const bool real = first + j < b;
    tokens[j] = real ? sequence_tokens(seqlens, first + j, max_tokens) : 0;
    blocks[j] = real ? sequence_blocks(tokens[j]) : 0;
    sum += blocks[j];
    most = max(most, blocks[j]);
  }
  const int total = warp_sum(sum), longest = warp_max(most);
  const int height = choose_height(grids, total);
  const Grid& grid = grids[height];
  const int part = grid.groups.floor(cta);
  const Cut cut = choose_cut(grid, b, total, longest, [&](const Divisor& by_size) {
    int pieces = 0;
#pragma unroll
    for (int n : blocks) pieces += by_size.ceil(n);
    return warp_sum(pieces);
  });

  const Divisor by_size(cut.size);
  int cost[kEach], lane_cost = 0;
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    cost[j] = first + j < b ? cut.cost(blocks[j], by_size) : 0;
    lane_cost += cost[j];
  }
  int stop = warp_scan(lane_cost), start = stop - lane_cost;
  const int line_end = __shfl_sync(0xFFFFFFFFu, stop, 31);
  int blocks_before = __shfl_up_sync(0xFFFFFFFFu, blocks[kEach - 1], 1);
  const int begin = part * cut.size, end = begin + cut.size;
  if (lane == 0) {
    result->height = height;
    result->size = cut.size;
    result->one_sequence = cut.gap == 0;
    result->line_end = line_end;
  }
  if (begin < line_end) {
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      const int seq = first + j, at = start + cut.gap;
      stop = start + cost[j];
      if (start <= begin && begin < stop) {
        result->begin_seq = seq;
        result->begin_block = max(begin - at, 0);
        result->begin_tokens = tokens[j];
        result->begin_seq_at = at;
        result->helper = -1;
      }
      if (start < end && (end <= stop || seq == b - 1)) {
        // A part whose cut falls in the gap ends with the predecessor.
        const bool before = end <= at && seq > 0;
        const int n = before ? blocks_before : blocks[j];
        write_end(result, before ? seq - 1 : seq, n, before ? start - n : at, end);
      }
      start = stop;
      blocks_before = blocks[j];
    }
  } else {
    // It may help.
    const int used = by_size.floor(line_end), idle = part - used;
    const int helpers = cut.gap == 0 ? spare_helpers(grid.parts.value, used, b) : 0;
    const bool helps = idle < helpers * b;
    const int helped = helps ? Divisor(helpers).floor(idle) : 0;
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      if (first + j == helped) {
        result->begin_seq = b;
        result->begin_block = result->begin_tokens = result->begin_seq_at = result->end_block = 0;
        result->end_seq = helps ? helped : -1;
        result->end_seq_at = start;
        result->end_seq_last_at = start + blocks[j] - 1;
        result->helper = helps ? idle - helped * helpers : -1;
      }
      start += cost[j];
    }
  }
  __syncwarp();
}

// What find_part() finds for more sequences. A lane's are neighbours: one scan of the lanes' sums
// says where all of them lie.
__device__ inline void part_of_many(const int32_t* seqlens, int b, int max_tokens, int cta,
                                    const Grid (&grids)[kTileHeights], Part* result) {
  const int lane = threadIdx.x % 32, each = (b + 31) / 32;
  const int first = min(lane * each, b), last = min(first + each, b);
  const auto blocks_of = [&](int i) {
    return sequence_blocks(sequence_tokens(seqlens, i, max_tokens));
  };
  const auto sum_of = [&](auto&& cost_of) {
    int sum = 0;
#pragma unroll 4  // loads in flight
    for (int i = first; i < last; ++i) sum += cost_of(blocks_of(i));
    return sum;
  };

  int longest = 0;
  const int total = warp_sum(sum_of([&](int n) {
    longest = max(longest, n);
    return n;
  }));
  longest = warp_max(longest);

  const int height = choose_height(grids, total);
  const Grid& grid = grids[height];
  const int num_parts = grid.parts.value, part = grid.groups.floor(cta);
  const Cut cut = choose_cut(grid, b, total, longest, [&](const Divisor& by_size) {
    return warp_sum(sum_of([&](int n) { return by_size.ceil(n); }));
  });
  const int size = cut.size, gap = cut.gap;

  if (lane == 0) {  // stays empty past the line's end
    *result = Part{height, b, 0, -1, 0, 0, gap == 0, size, 0, 0, 0, 0, -1};
  }
  __syncwarp();
  if (part >= num_parts) return;
  const Divisor by_size(size);
  const int begin = part * size, end = begin + size;
  const auto cost_of = [&](int n) { return cut.cost(n, by_size); };
  const int sum = sum_of(cost_of), stop = warp_scan(sum);
  if (lane == 31) result->line_end = stop;
  int start = stop - sum;  // where the lane's first sequence starts on the line
#pragma unroll 1
  for (int i = first; i < last && start < end; ++i) {
    const int n = blocks_of(i), cost = cost_of(n);
    if (start <= begin && begin < start + cost) {
      result->begin_seq = i;
      result->begin_tokens = sequence_tokens(seqlens, i, max_tokens);
      result->begin_block = max(begin - start - gap, 0);
      result->begin_seq_at = start + gap;
    }
    if (end <= start + cost || i == b - 1) {
      int seq = i, blocks = n, at = start + gap;
      if (end <= at && i > 0) {  // the cut falls in the gap: the part ends with its predecessor
        seq = i - 1;
        blocks = blocks_of(seq);
        at = start - blocks;
      }
      write_end(result, seq, blocks, at, end);
    }
    start += cost;
  }
  __syncwarp();
  if (gap > 0 || begin < result->line_end) return;

  // No work, so it helps: past the line all lanes have gone through their sequences.
  const int used = by_size.floor(result->line_end), helpers = spare_helpers(num_parts, used, b);
  if (part - used >= helpers * b) return;
  const int seq = Divisor(helpers).floor(part - used);
  if (first <= seq && seq < last) {
    start = stop - sum;
#pragma unroll 1
    for (int i = first; i < seq; ++i) start += cost_of(blocks_of(i));
    result->end_seq = seq;
    result->end_seq_at = start;
    result->end_seq_last_at = start + blocks_of(seq) - 1;
    result->helper = part - used - seq * helpers;
  }
  __syncwarp();
}

// Finds the part of the `cta`-th CTA; called by one whole warp, the result is in `*result` (shared
// memory). The kernel's first load waits for it.
__device__ inline void find_part(const int32_t* seqlens, int b, int max_tokens, int cta,
                                 const Grid (&grids)[kTileHeights], Part* result) {
  if (b == 1) {
    const Part found = part_of_one(sequence_tokens(seqlens, 0, max_tokens), cta, grids);
    if (threadIdx.x % 32 == 0) *result = found;
    __syncwarp();
  } else if (b <= 32) {
    part_of_some<1>(seqlens, b, max_tokens, cta, grids, result);
  } else if (b <= 128) {
    part_of_some<4>(seqlens, b, max_tokens, cta, grids, result);
  } else {
    part_of_many(seqlens, b, max_tokens, cta, grids, result);
  }
}

// Where a part begins, and the index of its tiles' height.
struct Begin {
  int seq, block, height;
};
inline constexpr int kForeseenSequences = 128;

// Where the part of the `cta`-th CTA begins, if 2 to kForeseenSequences sequences have equally many
// blocks and the cuts fall alike in all: what find_part() will find, with little to do. Else, and
// where there is no work, seq is -1. (The part of one sequence is known as soon.) Called by one
// whole warp.
__device__ __forceinline__ Begin foresee_begin(const int32_t* seqlens, int b, int max_tokens,
                                               int cta, const Grid (&grids)[kTileHeights]) {
  if (b == 1 || b > kForeseenSequences) return {-1, 0, 0};
  const int lane = threadIdx.x % 32;
  int fewest = INT32_MAX, most = 0;
#pragma unroll
  for (int first = 0; first < kForeseenSequences; first += 32) {
    const int n = sequence_blocks(sequence_tokens(seqlens, min(first + lane, b - 1), max_tokens));
    fewest = min(fewest, n);
    most = max(most, n);
  }
  const int blocks = __shfl_sync(0xFFFFFFFFu, most, 0), total = b * blocks;
  if (!__all_sync(0xFFFFFFFFu, fewest == blocks && most == blocks)) return {-1, 0, 0};
  const int height = choose_height(grids, total);
  const Grid& grid = grids[height];
  const int part = grid.groups.floor(cta), packed = packed_size(grid, b, total);
  Begin begin;
  bool alike;
  if (b <= grid.parts.value) {
    const int aligned = Divisor(Divisor(b).floor(grid.parts.value)).ceil(blocks);
    const int size = without_many_pieces(aligned, blocks), pieces = Divisor(size).ceil(blocks);
    const int seq = Divisor(pieces).floor(part);
    begin = {seq, (part - seq * pieces) * size, height};
    alike = aligned <= most_aligned_size(packed);
  } else {
    const int seqs_of_each = grid.parts.ceil(b);
    begin = {part * seqs_of_each, 0, height};
    alike = rounds_up(packed, seqs_of_each * (blocks + kSequenceOverhead));
  }
  if (!alike || begin.seq >= b || begin.block >= blocks) begin.seq = -1;
  return begin;
}

// Called by one thread.
__device__ __forceinline__ Pieces find_pieces(const Part& part, int num_parts, int b) {
  const Divisor by_size(part.size);
  return {by_size.floor(part.begin_seq_at), by_size.floor(part.end_seq_at),
          by_size.floor(part.end_seq_last_at),
          part.one_sequence ? spare_helpers(num_parts, by_size.ceil(part.line_end), b) : 0};
}

}  // namespace mla

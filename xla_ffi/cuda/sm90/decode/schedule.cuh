// Copyright 2026 The mla-jax Authors
// SPDX-License-Identifier: Apache-2.0
//
// The split-KV schedule: which blocks of which sequences a cluster works on.
//
// All blocks of all sequences are laid out on one line, and the line is cut into equal parts, one
// per cluster, so that all multiprocessors end together. Every cluster finds its own part from the
// lengths alone, by one warp, in the kernel's prologue: no table, no second kernel.
//
// Two layouts of the line:
//   aligned: each sequence is padded to a multiple of the part, so that no part spans two sequences
//            and sequences of one length are split alike;
//   packed:  each sequence is preceded by a gap that stands for the fixed cost of starting one.
// Aligned wins unless its padding leaves too many multiprocessors idle.

#pragma once

#include <cstdint>

namespace mla {

inline constexpr int kBlockTokens = 64;

// A cluster's work: from block `begin_block` of `begin_seq` up to, and excluding, block `end_block`
// of `end_seq`; all blocks of the sequences between. Empty if end_seq < begin_seq.
struct Part {
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

__device__ __forceinline__ int ceil_div(int a, int b) { return (a + b - 1) / b; }

__device__ __forceinline__ int warp_sum(int v) { return __reduce_add_sync(0xFFFFFFFFu, v); }

// Blocks that starting a sequence costs (query load, pipeline fill, epilogue).
inline constexpr int kSequenceOverhead = 3;

// Finds `part` of `num_parts`; called by one whole warp, the result is in `*result` (shared
// memory).
__device__ inline void find_part(const int32_t* seqlens, int b, int max_tokens, int part,
                                 int num_parts, Part* result) {
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

  // Packed, and if that costs little, rounded so that sequences of one length end at a cut.
  int size = ceil_div(total + b * kSequenceOverhead, num_parts);
  int gap = kSequenceOverhead;
  const int whole = ceil_div(size, longest + gap) * (longest + gap);
  if (whole - size <= 2 + size / 32) size = whole;

  if (b <= num_parts) {
    // The smallest aligned size for which the parts suffice lies in [low, high].
    int low = ceil_div(total, num_parts);
    int high = b < num_parts ? min(longest, ceil_div(total, num_parts - b)) : longest;
    while (low < high) {
      const int middle = (low + high) / 2;
      int needed = 0;
      for (int i = lane; i < b; i += 32) needed += ceil_div(blocks_of(i), middle);
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

  if (lane == 0) *result = Part{b, 0, -1, 0, 0, 0, 0, gap == 0};  // stays empty past the line's end
  __syncwarp();
  const int begin = part * size, end = begin + size;
  const auto cost_of = [&](int n) { return gap > 0 ? n + gap : ceil_div(n, size) * size; };
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
      result->begin_seq_first_part = (start + gap) / size;
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
      result->end_seq_first_part = (start + gap) / size;
      result->end_seq_last_part = (start + gap + n - 1) / size;
    }
    before += __shfl_sync(0xFFFFFFFFu, sum, 31);
  }
  __syncwarp();
}

}  // namespace mla

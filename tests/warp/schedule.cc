// Copyright 2026 The mla-jax Authors
// SPDX-License-Identifier: Apache-2.0
//
// The schedule of the Hopper kernel, compiled for the host: what each CTA finds as its part.

// The GPU's reciprocal, which may be off by one unit in the last place: so is this one.
#define reciprocal_approx reciprocal_approx_of_the_gpu
#include "../../xla_ffi/cuda/sm90/ptx.cuh"
#undef reciprocal_approx

namespace mla::ptx {
inline int reciprocal_error;  // -1, 0 or 1 units in the last place
inline float reciprocal_approx(float x) {
  const float y = 1.f / x;
  return __builtin_bit_cast(float, __builtin_bit_cast(int, y) + reciprocal_error);
}
}  // namespace mla::ptx

#include "../../xla_ffi/cuda/sm90/decode/schedule.cuh"

// What CTAs find, `num_ctas` of them, given the groups of each height of tiles and a table with room
// for `max_tokens` of each sequence; of those heights too the groups and parts of the grid; and what
// CTAs foresee. Lanes take their turns in order, or the other way round.
extern "C" void find_parts(const int32_t* seqlens, int b, int max_tokens, const int64_t* groups,
                           int num_ctas, int reciprocal_error, bool reversed, mla::Part* parts,
                           mla::Pieces* pieces, int* grid_groups, int* grid_parts,
                           mla::Begin* begins) {
  warp::reversed = reversed;
  mla::ptx::reciprocal_error = reciprocal_error;
  mla::Grid grids[mla::kTileHeights];
  mla::lay_out(grids, {groups[0], groups[1], groups[2]}, num_ctas, b);
  mla::prefer_lowest(grids, int64_t{b} * mla::sequence_blocks(max_tokens));
  for (int i = 0; i < mla::kTileHeights; ++i) {
    grid_groups[i] = grids[i].groups.value;
    grid_parts[i] = grids[i].parts.value;
  }
  for (int cta = 0; cta < num_ctas; ++cta) {
    warp::run([&] { mla::find_part(seqlens, b, max_tokens, cta, grids, &parts[cta]); });
    warp::run([&] {
      const mla::Begin begin = mla::foresee_begin(seqlens, b, max_tokens, cta, grids);
      if (threadIdx.x == 0) begins[cta] = begin;
    });
    pieces[cta] = mla::find_pieces(parts[cta], grid_parts[parts[cta].height], b);
  }
}

// The blocks beyond which parts are long.
extern "C" int long_part() { return mla::kLongPart; }

// Whether the lowest tiles are made the choice for `room` blocks, and then the parts that they have;
// -1 if another height is chosen for some number of blocks all the same.
extern "C" int prefer_lowest(const int64_t* groups, int num_ctas, int b, int64_t room) {
  mla::Grid grids[mla::kTileHeights];
  mla::lay_out(grids, {groups[0], groups[1], groups[2]}, num_ctas, b);
  if (!mla::prefer_lowest(grids, room)) return 0;
  const int lowest = mla::kTileHeights - 1;
  for (int blocks = 1; blocks <= room; ++blocks) {
    if (mla::choose_height(grids, blocks) != lowest) return -1;
  }
  return grids[lowest].parts.value;
}

// Blocks of a piece of a sequence in batch-invariant decode, the most pieces of one that is no
// longer, and the first block from `block` on with which a piece begins.
extern "C" int fixed_piece_blocks(int blocks) { return mla::fixed_piece_blocks(blocks); }
extern "C" int most_fixed_pieces(int blocks) { return mla::most_fixed_pieces(blocks); }
extern "C" int fixed_piece_begin(int block, int size, int reciprocal_error) {
  mla::ptx::reciprocal_error = reciprocal_error;
  return mla::fixed_piece_begin(block, size);
}

// Copyright 2026 The mla-jax Authors
// SPDX-License-Identifier: Apache-2.0
//
// Paged MLA decode on Hopper.
//
// A CTA holds up to 64 packed query rows and walks through blocks of 64 tokens: scores = Q K^T,
// weights = softmax, output += weights V, where V is the first 512 columns of K. Three warpgroups:
//
//   even (0)   scores and weights of blocks 0, 2, ..; columns   0..255 of the output, every block
//   odd  (1)   scores and weights of blocks 1, 3, ..; columns 256..511 of the output, every block
//   copies     two threads: the queries, and the blocks into two buffers, by TMA
//
// The output of 64 x 512 floats fits in registers only when halved, so each warpgroup needs the
// other's weights; they pass through shared memory, and the running maxima with them. While one
// warpgroup does a softmax, the tensor cores work for the other:
//
//   even:  scores 0 | softmax 0 | out 0 (left)            | out 1 (left)  | scores 2 ...
//   odd:              scores 1  | out 0 (right), softmax 1 | out 1 (right) |          scores 3 ...

#pragma once

#include "combine.cuh"
#include "layout.cuh"
#include "schedule.cuh"
#include "softmax.cuh"

namespace mla {

// What the kernel is launched as.
enum class Form {
  kOp,     // the whole op
  kFixed,  // the same, batch-invariant, but for the combination
  kChain,  // in a chain of kernels, of one sequence with one query, see chain.h
};

// Tile is what a warpgroup does with its rows: WideTile<T>, or NarrowTile<T> for at most 16.
template <typename Tile, int kPieces, Form kForm>
struct Decode {
  using T = typename Tile::Element;
  using State = typename Tile::State;
  using HeldQueries = typename Tile::HeldQueries;
  static constexpr bool kInChain = kForm == Form::kChain;
  static constexpr bool kFixed = kForm == Form::kFixed;
  // Of a thread; the copiers of other forms need more of what is there at launch.
  static constexpr int kLaunchRegisters = 65536 / kThreads / 8 * 8;
  static constexpr int kConsumerRegisters = kForm == Form::kOp ? 232 : 224;
  static constexpr int kCopierRegisters = 3 * kLaunchRegisters - 2 * kConsumerRegisters;
  static constexpr int kBlockShift = 6;                // log2 of the tokens of a block
  static constexpr int kMaxPages = kBlockTokens / 16;  // of a block, with the smallest pages

  // ---- Copies ----

  // Copies the queries of the part's items; run by one thread.
  __device__ static void produce_queries(const DecodeArgs& args, const QueryMaps& maps,
                                         Shared& shared, Place place) {
    constexpr int kValuePieces = kValueColumns / 64;
    if constexpr (kInChain) ptx::grid_dependency_wait();  // by every CTA
    const int height = shared.part.height;
    const QueryBox box = query_box(args.rows, height, Tile::kQueryStride, args.query_pieces);
    for_each_item<kFixed>(args, shared.part, [&](const Item& item) {
      ptx::mbarrier_wait(&shared.query_empty, item.parity ^ 1);
      ptx::mbarrier_arrive_expect_tx(&shared.query_full, kPieces * box.rows * 128);
#pragma unroll 1
      for (int piece = 0; piece < kPieces; piece += box.pieces) {
        const bool last = piece == kValuePieces;
        ptx::tma_load(shared.query[0] + piece * Tile::kQueryStride * 128,
                      last ? &maps.last[height] : &maps.values[height], &shared.query_full, 0,
                      place.first_row, last ? 0 : piece, place.kv_head, item.seq);
      }
    });
  }

  // The i-th box of a buffer to be copied and multiplied. Each warpgroup has its own block's
  // weights first, so it gives its half of the value columns back first.
  __device__ __forceinline__ static constexpr int box_in_order(int buffer, int i) {
    return i == kBoxes - 1 ? i : i ^ (buffer << 1);
  }

  // Copies one block into a buffer: each half as soon as it is free if `early`, else both when both
  // are. `pages` are the block's; past the end none: zeros.
  template <int kBuffer, int kPages>
  __device__ __forceinline__ static void copy_block(const DecodeArgs& args, const CacheMaps& maps,
                                                    Shared& shared, int kv_head, int block,
                                                    const int (&pages)[kPages], uint32_t& uses,
                                                    uint64_t policy, bool early) {
    const int row = block * kBlockTokens & (args.page_size - 1);
    const bool used = uses > 0;  // before, so that it must have been given back
    const uint32_t parity = (uses - 1) & 1;
    ++uses;
#pragma unroll
    for (int i = 0; i < kBoxes; ++i) {
      const int box = box_in_order(kBuffer, i), first = 2 * box;
      if (first >= kPieces) break;
      // The weights, in the RoPE piece, are last read for the other half.
      const int half = i < 2 ? kBuffer : 1 - kBuffer;
      if (used && (i == 0 || i == 2)) {
        ptx::mbarrier_wait(&shared.cache_empty[kBuffer][half], parity);
        if (i == 0 && !early) ptx::mbarrier_wait(&shared.cache_empty[kBuffer][1 - half], parity);
      }
      uint64_t* full = &shared.cache_full[kBuffer][box];
      const int end = min(first + 2, kPieces);
      ptx::mbarrier_arrive_expect_tx(full, (end - first) * wgmma::kPieceBytes);
      if constexpr (kPages == 1) {
        ptx::tma_load(shared.cache[kBuffer][first], box == kBoxes - 1 ? &maps.one : &maps.two, full,
                      0, row, first, kv_head, pages[0], policy);
      } else {
        // A page's tokens are not all of a piece: one copy for each page and piece.
#pragma unroll 1
        for (int piece = first; piece < end; ++piece) {
#pragma unroll
          for (int c = 0; c < kPages; ++c) {
            if (c << args.page_shift >= kBlockTokens) break;
            ptx::tma_load(shared.cache[kBuffer][piece] + (c << args.page_shift) * 128, &maps.one,
                          full, 0, 0, piece, kv_head, pages[c], policy);
          }
        }
      }
    }
  }

  // Brings the queries of one sequence to L2 while no part is known; run by one thread. Parts that
  // suffice take all sequences, whoever will need them; else each the one that it likely begins
  // with, for more at once would delay what is needed first.
  __device__ __forceinline__ static void prefetch_queries(const DecodeArgs& args,
                                                          const QueryMaps& maps) {
    constexpr int kHeight = Tile::kQueryStride == kNarrowRows ? kTileHeights - 1 : 0;
    const Place place = Place::here(args, kHeight);
    const KnownDivisor parts = args.grids[kHeight].parts;
    const int seq = args.b <= parts.value ? place.part : place.part * parts.ceil(args.b);
    if (seq >= args.b) return;
    const QueryBox box = query_box(args.rows, kHeight, Tile::kQueryStride, args.query_pieces);
#pragma unroll 1
    for (int piece = 0; piece < args.query_pieces; piece += box.pieces) {
      ptx::tma_prefetch(&maps.values[kHeight], place.first_row, piece, place.kv_head, seq);
    }
  }

  // Brings the first boxes of the part's first block to L2 while the part is not known yet, where
  // it can be foreseen; run by a warp. More boxes of a CTA would delay the first ones of others.
  __device__ static void prefetch_ahead(const DecodeArgs& args, const CacheMaps& maps,
                                        Shared& shared) {
    constexpr int kPrefetched = 3;  // boxes
    if (args.page_size < kBlockTokens) return;
    const int max_tokens = args.max_pages_per_seq * args.page_size;
    if (max_tokens == 0) return;  // else even an empty sequence's first entry can be read
    const Begin begin = foresee_begin(args.seqlens, args.b, max_tokens, blockIdx.x, args.grids);
    if (begin.seq < 0 || !ptx::elect_one()) return;
    const KnownDivisor groups = args.grids[begin.height].groups;
    const int group = blockIdx.x - groups.floor(blockIdx.x) * groups.value;
    const int kv_head = group - args.h_kv.floor(group) * args.h_kv.value;
    const int token = begin.block * kBlockTokens;
    const int page = __ldg(args.block_table + int64_t{begin.seq} * args.max_pages_per_seq +
                           (token >> args.page_shift));
    if (shared.copying) return;
    // Tiles of one block share its boxes; many take all.
    const int tile = args.h_kv.floor(group), tiles = args.h_kv.floor(groups.value);
    const int boxes = max(kPrefetched, min(tiles, (kPieces + 1) / 2));
#pragma unroll 1
    for (int box = tile; box < boxes; box += tiles) {
      ptx::tma_prefetch(&maps.two, token & (args.page_size - 1), 2 * box, kv_head, page);
    }
  }

  // Waits until all CTAs that go through the same blocks have come to the same pair of them, so
  // that what one brings to L2 serves all. A CTA comes here while its buffers are in use.
  __device__ __forceinline__ static void keep_in_step(Shared& shared, uint32_t* counter,
                                                      uint32_t expected) {
    ptx::mbarrier_wait(&shared.counters_clear, 0);
    ptx::relaxed_increment(counter);
    while (ptx::relaxed_load(counter) < expected) {
    }
  }

  // Copies all blocks of the part, each of at most `kPages` pages; run by one thread. Its pace
  // bounds the kernel's: what a copy needs is known before.
  template <int kPages>
  __device__ static void produce_cache(const DecodeArgs& args, const CacheMaps& maps,
                                       Shared& shared) {
    const Part part = shared.part;  // one wait for all of it
    const Place& place = shared.place;
    const int kv_head = place.kv_head;
    const int shift = kPages == 1 ? kBlockShift : args.page_shift;  // log2 of a copy's tokens
    // With more than two tiles to a block, half of the lines stay for those that come late.
    const uint64_t policy =
        place.groups > 2 ? ptx::l2_evict_first_policy(0.5f) : ptx::l2_evict_first_policy(1.f);
    // Where arithmetic binds, scores that start early only take tensor cores from what gives the
    // rest back: with many tiles to a block, and in long parts, where power does. There two CTAs
    // that copy at once keep in step, and L2 is asked once for both.
    const bool early = place.groups <= 2 && part.size <= kLongPart;
    // More of them drift apart even so.
    const bool in_step = place.groups > 2 && part.size > kLongPart && args.cooperative;
    uint32_t come = 0;          // CTAs, to all pairs so far
    uint32_t uses[2] = {0, 0};  // of each buffer

    for_each_item<kFixed>(args, part, [&](const Item& item) {
      const int32_t* table = args.block_table + int64_t{item.seq} * args.max_pages_per_seq;
      const auto find_pages = [&](int block, int(&pages)[kPages]) {
#pragma unroll
        for (int c = 0; c < kPages; ++c) {
          const int token = block * kBlockTokens + (c << shift);
          pages[c] = (c << shift) < kBlockTokens && token < item.tokens
                         ? __ldg(table + (token >> args.page_shift))
                         : -1;
        }
      };
      // The kernel before writes a token of the last block; blocks are copied in order.
      const int last_block = sequence_blocks(item.tokens) - 1;
      const auto wait_for = [&](int block) {
        if (kInChain && block == last_block) ptx::grid_dependency_wait();
      };
      // Pages of the next two blocks, or of the next one where they are many: for registers' sake.
      constexpr int kAhead = kPages == 1 ? 2 : 1;
      int pages[kAhead][kPages];
      int(&even)[kPages] = pages[0], (&odd)[kPages] = pages[kAhead - 1];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) find_pages(item.begin + i, pages[i]);
#pragma unroll 1
      for (int block = item.begin; block < item.end; block += 2) {
        wait_for(block);
        copy_block<0>(args, maps, shared, kv_head, block, even, uses[0], policy, early);
        find_pages(block + kAhead, even);
        if (block + 1 == item.end) break;
        wait_for(block + 1);
        copy_block<1>(args, maps, shared, kv_head, block + 1, odd, uses[1], policy, early);
        find_pages(block + 1 + kAhead, odd);
        if (in_step) {
          keep_in_step(shared, args.counters + kMaxParts + place.part, come += place.groups);
        }
      }
    });
  }

  // ---- Scores, weights, output ----

  // This thread's rows of scores within an item.
  struct Rows {
    int first;               // see Tile::row
    int limit[Tile::kRows];  // tokens that each sees
  };

  __device__ __forceinline__ static Rows rows_of(const DecodeArgs& args, const Place& place,
                                                 const Item& item) {
    Rows rows;
    rows.first = Tile::first_row();
#pragma unroll
    for (int& limit : rows.limit) limit = item.tokens;
    if (args.causal && args.s_q > 1) {
#pragma unroll
      for (int k = 0; k < Tile::kRows; ++k) {
        const int query = args.heads_per_kv.floor(place.first_row + Tile::row(rows.first, k));
        rows.limit[k] = min(item.tokens - args.s_q + query + 1, item.tokens);
      }
    }
    return rows;
  }

  // Starts scores = Q K^T, piece by piece as they arrive.
  template <int kBuffer>
  __device__ __forceinline__ static void start_scores(Shared& shared, uint32_t parity,
                                                      const HeldQueries& held,
                                                      float (&scores)[Tile::kScores]) {
    const uint64_t queries = wgmma::row_major_descriptor(shared.query[0]);
    const uint64_t keys = wgmma::row_major_descriptor(shared.cache[kBuffer][0]);
    wgmma::pin(scores);
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const int box = box_in_order(kBuffer, i / 2), piece = 2 * box + i % 2;
      if (i % 2 == 0) ptx::mbarrier_wait(&shared.cache_full[kBuffer][box], parity);
      wgmma::fence();
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int step = k * wgmma::kRowMajorStep;
        const uint64_t key = keys + piece * (wgmma::kPieceBytes >> 4) + step;
        if constexpr (Tile::kHoldsQueries) {
          if (piece == kPieces - 1) {
            Tile::multiply_scores(scores, held[k], key, i + k > 0);
            continue;
          }
        }
        Tile::multiply_scores(scores, queries + piece * (Tile::kQueryStride * 128 >> 4) + step, key,
                              i + k > 0);
      }
    }
    wgmma::commit();
  }

  // Zeroes the value rows past the sequence's end: their weights are 0, but 0 * NaN is NaN.
  template <int kBuffer, int kHalf>
  __device__ __forceinline__ static void clear_past_end(Shared& shared, int block, int tokens) {
    const int valid = max(tokens - block * kBlockTokens, 0);
    if (__builtin_expect(valid >= kBlockTokens, 1)) return;
#pragma unroll 1
    for (int i = threadIdx.x % 128; i < (kBlockTokens - valid) * 32; i += 128) {
      uint8_t* row = shared.cache[kBuffer][4 * kHalf + i / 8 % 4] + (valid + i / 32) * 128;
      *reinterpret_cast<uint4*>(row + i % 8 * 16) = make_uint4(0, 0, 0, 0);
    }
    ptx::fence_proxy_async();
    ptx::named_barrier_sync(kWarpgroup + kHalf, 128);
  }

  // Waits for a block's scores, hides those that a row does not see and finds the largest of each.
  template <int kBuffer>
  __device__ __forceinline__ static typename Tile::Tops finish_scores(
      const DecodeArgs& args, Shared& shared, uint32_t parity, const Item& item, const Rows& rows,
      int block, float (&scores)[Tile::kScores]) {
    wgmma::wait<0>();
    wgmma::pin(scores);
    const int past = (block + 1) * kBlockTokens - item.tokens;  // tokens past the end
    if (past > (args.causal ? -(args.s_q - 1) : 0)) {
      Tile::hide(scores, block * kBlockTokens, rows.limit);
    }
    return Tile::template find_tops<kBuffer>(shared, parity, scores);
  }

  // Softmax of the block whose scores this warpgroup has; publishes weights and maxima.
  template <int kBuffer>
  __device__ __forceinline__ static void weigh(const DecodeArgs& args, Shared& shared,
                                               const Rows& rows, float (&scores)[Tile::kScores],
                                               const typename Tile::Tops& tops, State& state,
                                               typename Tile::Weights& weights) {
    Tile::template weigh<kBuffer>(shared, rows.first, scores, tops, args.scale_log2, state,
                                  weights);
  }

  // Waits for the other warpgroup's weights and follows its maxima.
  template <int kBuffer>
  __device__ __forceinline__ static void follow(Shared& shared, const Rows& rows, State& state) {
    if (ptx::kRacecheck && kBuffer == 0) ptx::named_barrier_sync(kWarpgroup + 1, 128);
    ptx::named_barrier_sync(kBuffer == 0 ? kEvenWeightsReady : kOddWeightsReady, kConsumerThreads);
    Tile::template follow<kBuffer>(shared, rows.first, state);
  }

  // Waits for the output's products, then gives half of a buffer back.
  __device__ __forceinline__ static void finish(float (&output)[Tile::kOutputs], uint64_t* empty) {
    Tile::finish_output(output);
    if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(empty);
  }

  // Accumulates the even warpgroup's half of the output over the blocks of an item.
  __device__ __forceinline__ static void consume_even(const DecodeArgs& args, Shared& shared,
                                                      const Item& item, const Rows& rows,
                                                      const HeldQueries& held, uint32_t& uses,
                                                      float (&output)[Tile::kOutputs],
                                                      State& state) {
    typename Tile::Weights weights;
    float scores[Tile::kScores];
    int block = item.begin;
    for (; block + 1 < item.end; block += 2) {
      const uint32_t parity = uses++ & 1;
      start_scores<0>(shared, parity, held, scores);
      ptx::named_barrier_arrive(kEvenScoresStarted, kConsumerThreads);
      const auto tops = finish_scores<0>(args, shared, parity, item, rows, block, scores);
      weigh<0>(args, shared, rows, scores, tops, state, weights);
      rescale(output, state.factor);
      Tile::template start_own_output<0>(shared, weights, output);

      finish(output, &shared.cache_empty[0][0]);
      follow<1>(shared, rows, state);
      clear_past_end<1, 0>(shared, block + 1, item.tokens);
      rescale(output, state.factor);
      Tile::template start_output<1, 0>(shared, output);
      finish(output, &shared.cache_empty[1][0]);
    }
    if (block < item.end) {
      const uint32_t parity = uses++ & 1;
      start_scores<0>(shared, parity, held, scores);
      const auto tops = finish_scores<0>(args, shared, parity, item, rows, block, scores);
      weigh<0>(args, shared, rows, scores, tops, state, weights);
      clear_past_end<0, 0>(shared, block, item.tokens);
      rescale(output, state.factor);
      Tile::template start_own_output<0>(shared, weights, output);
      Tile::share_sums(shared.sum[item.parity], 0, state);  // while the products run
      finish(output, &shared.cache_empty[0][0]);
    } else {
      Tile::share_sums(shared.sum[item.parity], 0, state);
    }
  }

  // The odd warpgroup's half.
  __device__ __forceinline__ static void consume_odd(const DecodeArgs& args, Shared& shared,
                                                     const Item& item, const Rows& rows,
                                                     const HeldQueries& held, uint32_t& uses,
                                                     float (&output)[Tile::kOutputs],
                                                     State& state) {
    typename Tile::Weights weights;
    float scores[Tile::kScores];
    int block = item.begin;
    for (; block + 1 < item.end; block += 2) {
      // Side by side the even scores would be done later, with no products left to hide their
      // softmax.
      ptx::named_barrier_sync(kEvenScoresStarted, kConsumerThreads);
      const uint32_t parity = uses++ & 1;
      start_scores<1>(shared, parity, held, scores);
      // The largest scores while the even weights are not there yet.
      const auto tops = finish_scores<1>(args, shared, parity, item, rows, block + 1, scores);
      follow<0>(shared, rows, state);
      rescale(output, state.factor);
      Tile::template start_output<0, 1>(shared, output);

      weigh<1>(args, shared, rows, scores, tops, state, weights);
      finish(output, &shared.cache_empty[0][1]);
      clear_past_end<1, 1>(shared, block + 1, item.tokens);
      rescale(output, state.factor);
      Tile::template start_own_output<1>(shared, weights, output);
      finish(output, &shared.cache_empty[1][1]);
    }
    if (block < item.end) {
      if (ptx::kRacecheck && Tile::kMeetsTwice) ptx::named_barrier_sync(kWarpgroup + 1, 128);
      follow<0>(shared, rows, state);
      clear_past_end<0, 1>(shared, block, item.tokens);
      rescale(output, state.factor);
      Tile::template start_output<0, 1>(shared, output);
      Tile::share_sums(shared.sum[item.parity], 1, state);
      finish(output, &shared.cache_empty[0][1]);
    } else {
      Tile::share_sums(shared.sum[item.parity], 1, state);
    }
  }

  // Writes the normalised output of an unsplit item, 16 bytes a lane.
  __device__ __forceinline__ static void store_output(const DecodeArgs& args, const Place& place,
                                                      const Item& item, int half,
                                                      const float (&output)[Tile::kOutputs],
                                                      const RowPair& max, const RowPair& sum) {
    const int pair = threadIdx.x % 4;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int row = place.first_row + Tile::result_row() + 8 * e;
      const bool real = row < place.end_row;
      const float inverse = sum.v[e] == 0.f ? 0.f : 1.f / sum.v[e];
      T* dst = static_cast<T*>(args.out) +
               (real ? out_offset(args, item.seq, place.kv_head, row) : 0) + half * kHalfColumns +
               Tile::first_column() + 8 * pair;
#pragma unroll
      for (int i = 0; i < Tile::kGroups; i += 4) {
        uint32_t v[4];
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          v[k] = Tile::Mma::pack(output[4 * (i + k) + 2 * e] * inverse,
                                 output[4 * (i + k) + 2 * e + 1] * inverse);
        }
        transpose_quad(v);
        if (real) *reinterpret_cast<uint4*>(dst + 8 * i) = make_uint4(v[0], v[1], v[2], v[3]);
      }
      if (real && half == 0 && Tile::has_first_columns() && pair == 0) {
        args.lse[lse_offset(args, item.seq, place.kv_head, row)] = log_sum_exp(max.v[e], sum.v[e]);
      }
    }
  }

  // Adds up what both warpgroups have shared of the row sums. What all threads of the CTA have
  // written before is there then, too.
  __device__ __forceinline__ static RowPair add_sums(Shared& shared, const Item& item) {
    ptx::named_barrier_sync(kConsumers, kConsumerThreads);
    return Tile::add_sums(shared.sum[item.parity]);
  }

  // Writes a piece for the kernel that follows: the unnormalised output, [part, head, column] of
  // floats, and the statistics, [part, head].
  __device__ __forceinline__ static void store_piece(const DecodeArgs& args, const Place& place,
                                                     int half,
                                                     const float (&output)[Tile::kOutputs],
                                                     const RowPair& max, const RowPair& sum) {
    const int pair = threadIdx.x % 4;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int row = place.first_row + Tile::result_row() + 8 * e;
      if (row >= place.end_row) continue;
      const int64_t at = int64_t{place.part} * args.rows + row;
      float* dst = reinterpret_cast<float*>(args.partial_out) + at * kValueColumns +
                   half * kHalfColumns + Tile::first_column() + 2 * pair;
#pragma unroll
      for (int i = 0; i < Tile::kGroups; ++i) {
        __stcg(reinterpret_cast<float2*>(dst + 8 * i),
               make_float2(output[4 * i + 2 * e], output[4 * i + 2 * e + 1]));
      }
      if (half == 0 && Tile::has_first_columns() && pair == 0) {
        __stcg(args.partial_stats + at, make_float2(max.v[e], sum.v[e]));
      }
    }
  }

  // Where the item's partial result goes.
  __device__ __forceinline__ static int slot_of(const DecodeArgs& args, const Place& place,
                                                const Item& item, bool first) {
    if constexpr (kFixed) {
      const int size = fixed_piece_blocks(sequence_blocks(item.tokens));
      return fixed_slot(args, place, item.seq, Divisor(size).floor(item.begin));
    }
    return partial_slot(blockIdx.x, first);
  }

  // Accumulates and writes a warpgroup's half of all items' output; only the walk over the blocks
  // differs between the two. Returns the last item's split.
  __device__ __forceinline__ static Split attend(const DecodeArgs& args, Shared& shared,
                                                 const Place& place, int half) {
    uint32_t uses = 0;  // of this warpgroup's block buffer
    const Part& part = shared.part;
    const Rehearsal rehearsal = rehearsal_of(args, part);
    Split split = {};  // of the item at hand
    const auto body = [&](const Item& item) {
      const auto rows = rows_of(args, place, item);
      State state;
      float output[Tile::kOutputs];
#pragma unroll
      for (float& v : output) v = 0.f;
      HeldQueries held;
      if (item.begin < item.end) {  // always, but where a result is rehearsed
        ptx::mbarrier_wait(&shared.query_full, item.parity);
        if constexpr (Tile::kHoldsQueries) Tile::hold_queries(shared.query[kPieces - 1], held);
      }
      if (half == 0) {
        consume_even(args, shared, item, rows, held, uses, output, state);
      } else {
        consume_odd(args, shared, item, rows, held, uses, output, state);
      }
      if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(&shared.query_empty);
      const RowPair max = Tile::result_max(state);
      if constexpr (kInChain) {
        // Not earlier: the weights that the next kernels ask for would come before blocks.
        if (threadIdx.x == 0) ptx::launch_dependents();
        const RowPair sum = add_sums(shared, item);
        ptx::grid_dependency_wait();  // before anything is written; over long since
        store_piece(args, place, half, output, max, sum);
        return;
      }

      // What a partial result consists of needs no other warp, but the sums of its rows.
      const bool whole = item.whole && rehearsal == Rehearsal::kNone;
      const bool first = item.begin == 0 || rehearsal != Rehearsal::kNone;
      const int slot = slot_of(args, place, item, first);
      const int tile_rows = place.end_row - place.first_row;
      const bool writes = !whole && Tile::writes(tile_rows);
      Exponents exponents = {};
      if (writes) {
        if constexpr (Tile::kHalfPartials) {
          exponents = is_half<Tile, kFixed>(tile_rows)
                          ? store_values<__half, Tile>(args, slot, half, output)
                          : store_values<float, Tile>(args, slot, half, output);
        } else {
          store_values<float, Tile>(args, slot, half, output);
        }
      }

      // Who else has pieces of the sequence, found while the values are on their way.
      // Batch-invariant pieces are combined by another kernel, a rehearsal's by nobody.
      const bool combined = !kFixed && !whole && rehearsal == Rehearsal::kNone;
      split.helpers = 0;
      if (combined) {
        ptx::mbarrier_wait(&shared.counters_clear, 0);
        const Pieces& pieces = shared.pieces;
        const bool last = item.seq == part.end_seq;
        split.first_part = last ? pieces.end_seq_first : pieces.begin_seq_first;
        split.pieces = (last ? pieces.end_seq_last : place.part) - split.first_part + 1;
        split.helpers = part.one_sequence ? split.pieces + pieces.helpers : split.pieces - 1;
        split.share = place.part - split.first_part;
      }

      const RowPair sum = add_sums(shared, item);
      if (whole) store_output(args, place, item, half, output, max, sum);
      // Of warps with the same rows one writes what their values are relative to, and tells.
      if (writes && Tile::has_first_columns()) {
        store_stats<Tile>(args, slot, half, max, sum, exponents);
        if (combined) announce_partial(args.counters + place.peer(split.first_part));
      }
    };
    for_each_item<kFixed>(args, part, body, rehearsal);
    return split;
  }

  // What the consumer warpgroups do.
  __device__ __forceinline__ static void consume(const DecodeArgs& args, Shared& shared,
                                                 const Place& place, int half) {
    Split split = attend(args, shared, place, half);
    if constexpr (kForm != Form::kOp) return;
    const Part& part = shared.part;
    const Rehearsal rehearsal = rehearsal_of(args, part);

    // As many shares as sequences of one length would have.
    bool rehearses = rehearsal > Rehearsal::kBlock;
    if (rehearses) {
      const int shares = Divisor(args.b).floor(args.grids[part.height].parts.value);
      split = {place.part, rehearsal == Rehearsal::kResult, max(shares, 1), 0};
    }
#pragma unroll 1
    for (;; rehearses = false) {
      if (!rehearses && part.helper >= 0) {
        ptx::mbarrier_wait(&shared.counters_clear, 0);
        const Pieces& pieces = shared.pieces;
        split.first_part = pieces.end_seq_first;
        split.pieces = pieces.end_seq_last - pieces.end_seq_first + 1;
        split.helpers = split.pieces > 1 ? split.pieces + pieces.helpers : 0;
        split.share = split.pieces + part.helper;
      }
      // Whoever goes on to another sequence holds nobody up: only the last item is waited for.
      if (split.share < split.helpers) {
        combine<Tile>(args, place, part.end_seq, split, shared.query, rehearses);
      }
      if (!rehearses) break;
      split.helpers = 0;
    }
  }
};

// By one thread, before any other uses them.
__device__ __forceinline__ void init_mbarriers(Shared& shared) {
  ptx::mbarrier_init(&shared.query_full, 1);
  ptx::mbarrier_init(&shared.query_empty, 8);
  ptx::mbarrier_init(&shared.counters_clear, 1);
  for (int buffer = 0; buffer < 2; ++buffer) {
    for (uint64_t& full : shared.cache_full[buffer]) ptx::mbarrier_init(&full, 1);
    for (uint64_t& empty : shared.cache_empty[buffer]) ptx::mbarrier_init(&empty, 4);
  }
  ptx::mbarrier_init_fence();
}

template <typename Tile, int kPieces, Form kForm>
__global__ void __launch_bounds__(kThreads, 1)
    decode_kernel(const __grid_constant__ DecodeArgs args,
                  const __grid_constant__ QueryMaps query_maps,
                  const __grid_constant__ CacheMaps cache_maps) {
  using Kernel = Decode<Tile, kPieces, kForm>;
  extern __shared__ uint8_t raw_shared[];
  auto& shared =
      *reinterpret_cast<Shared*>(raw_shared + (1024 - ptx::smem_address(raw_shared) % 1024) % 1024);
  const int warpgroup = threadIdx.x / 128, warp = threadIdx.x / 32;

  if (warp == kCacheWarp) {
    const int max_tokens = args.max_pages_per_seq * args.page_size;
    if constexpr (kForm == Form::kChain) {
      const int tokens = sequence_tokens(args.seqlens, 0, max_tokens);
      const Part found = part_of_one(tokens, blockIdx.x, args.grids);
      if (threadIdx.x % 32 == 0) shared.part = found;
    } else {
      find_part(args.seqlens, args.b, max_tokens, blockIdx.x, args.grids, &shared.part);
    }
    if (threadIdx.x % 32 == 0) shared.place = Place::here(args, shared.part.height);
    // The others wait for what this warp has found; it starts to copy at once.
    ptx::named_barrier_sync(kMbarriersReady, 64);
    ptx::named_barrier_arrive(kStart, kThreads - 32);
    ptx::named_barrier_arrive(kAheadStart, 64);
    if (!ptx::kRacecheck) shared.copying = true;
  } else {
    if (warp == 0) {
      if (threadIdx.x == 0) init_mbarriers(shared);
      __syncwarp();
      ptx::named_barrier_arrive(kMbarriersReady, 64);
    } else if (ptx::kRacecheck) {
      ptx::named_barrier_sync(kOthers, kThreads - 64);
    }
    // Not by the warp that looks for the part: the maps' address lies in another line of constants.
    if (threadIdx.x == 32 * kQueryWarp) {
      ptx::prefetch_tensor_map(&query_maps.values[0]);
      ptx::prefetch_tensor_map(&cache_maps.two);
      ptx::prefetch_tensor_map(&cache_maps.one);
      if (kForm != Form::kChain) Kernel::prefetch_queries(args, query_maps);
    }
    const int64_t entry = int64_t{threadIdx.x} * 32;
    const int64_t entries = int64_t{args.b} * args.max_pages_per_seq;
    // The block table is wanted as soon as the part is known; a small one gets here meanwhile.
    if (threadIdx.x < kConsumerThreads && entry < entries) {
      ptx::prefetch_l2(args.block_table + entry);
    }
    if (warp == kAheadWarp) {
      if (!ptx::kRacecheck) shared.copying = false;
    } else {
      ptx::named_barrier_sync(kStart, kThreads - 32);
    }
  }

  if (warpgroup == 2) {
    ptx::registers_shrink<Kernel::kCopierRegisters>();
    if (warp == kCacheWarp && ptx::elect_one()) {
      if (args.page_size < kBlockTokens) {
        Kernel::template produce_cache<Kernel::kMaxPages>(args, cache_maps, shared);
      } else {
        Kernel::template produce_cache<1>(args, cache_maps, shared);
      }
    } else if (warp == kQueryWarp && ptx::elect_one()) {
      Kernel::produce_queries(args, query_maps, shared, shared.place);
    } else if (kForm == Form::kOp && threadIdx.x == 32 * kCountersWarp && args.cooperative) {
      shared.pieces = find_pieces(shared.part, args.grids[shared.part.height].parts.value, args.b);
      clear_counters(args, &shared.counters_clear);
    } else if (warp == kAheadWarp) {
      if (kForm == Form::kOp && !ptx::kRacecheck) {
        Kernel::prefetch_ahead(args, cache_maps, shared);
        __syncwarp();
      }
      ptx::named_barrier_sync(kAheadStart, 64);
      if (kForm == Form::kOp && threadIdx.x % 32 == 0 &&
          rehearsal_of(args, shared.part) == Rehearsal::kBlock) {
        // Whatever is there is the block.
        ptx::mbarrier_arrive(&shared.query_full);
        for (uint64_t& full : shared.cache_full[0]) ptx::mbarrier_arrive(&full);
      }
    }
    __syncwarp();
  } else {
    ptx::registers_grow<Kernel::kConsumerRegisters>();
    // The combination has no more to wait for than the end of this kernel.
    if (kForm == Form::kFixed && threadIdx.x == 0) ptx::launch_dependents();
    Kernel::consume(args, shared, shared.place, warpgroup);
  }
}

}  // namespace mla

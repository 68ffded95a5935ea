// Copyright 2026 The mla-jax Authors
// SPDX-License-Identifier: Apache-2.0
//
// Paged MLA decode on Hopper.
//
// A CTA holds 64 packed query rows and walks through blocks of 64 tokens: scores = Q K^T, weights =
// softmax, output += weights V, where V is the first 512 columns of K. Four warpgroups:
//
//   outputs 0, 1   columns 0..255 and 256..511 of the output, of every block: 64 x 512 floats fit
//                  in registers only when halved
//   weights 0, 1   blocks 0, 2, .. and 1, 3, ..: each owns one block buffer, has it filled by TMA,
//                  makes scores and weights and leaves the weights in the block's dead RoPE piece
//
// So scores of one block, softmax of the other and products of both overlap without anyone's
// program order in the way. A buffer's life: its owner copies a block in, piece by piece; scores
// start with the first piece; the weights are handed to both outputs; each gives its half of the
// buffer back.
//
// Two CTAs with different rows of the same sequence form a cluster: each copies half of every block
// and multicasts it to both, so the cache crosses from L2 once.

#pragma once

#include "combine.cuh"
#include "layout.cuh"
#include "schedule.cuh"
#include "softmax.cuh"

namespace mla {

template <typename T, int kPieces, int kCtas>
struct Decode {
  using Mma = wgmma::Mma<T>;
  using Here = Place<kCtas>;
  static constexpr int kBoxTokens = kBlockTokens / kCtas;  // of each block, copied by this CTA
  static constexpr int kBoxShift = kCtas == 1 ? 6 : 5;     // its log2
  static constexpr int kMaxCopies = kBoxTokens / 16;       // with the smallest pages

  // Rows and limits of this thread within an item.
  struct Rows {
    int local;     // row of the tile; the thread holds it and local + 8
    int limit[2];  // tokens that the two rows see
  };

  __device__ __forceinline__ static Rows rows_of(const DecodeArgs& args, const Here& place,
                                                 const Item& item) {
    Rows rows;
    rows.local = 16 * (threadIdx.x % 128 / 32) + threadIdx.x % 32 / 4;
    rows.limit[0] = rows.limit[1] = item.tokens;
    if (args.causal && args.s_q > 1) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int query = (place.first_row(args) + rows.local + 8 * e) / args.heads_per_kv;
        rows.limit[e] = min(item.tokens - args.s_q + query + 1, item.tokens);
      }
    }
    return rows;
  }

  // ---- Weights ----

  // Copies the queries of an item; run by one thread.
  __device__ __forceinline__ static void copy_queries(const DecodeArgs& args,
                                                      const CUtensorMap& map, Shared& shared,
                                                      const Here& place, const Item& item) {
    ptx::mbarrier_wait(&shared.query_empty, item.parity ^ 1);
#pragma unroll 1
    for (int piece = 0; piece < kPieces; ++piece) {
      uint64_t* full = &shared.query_full[piece];
      ptx::mbarrier_arrive_expect_tx(full, args.query_box_rows * 128);
      ptx::tma_load(shared.query[piece], &map, full, piece * 64, place.first_row(args),
                    place.kv_head(args), item.seq);
    }
  }

  // Copies blocks' halves into a buffer by one thread: pieces 0..3, or 4 and up. What a copy needs
  // is known before the buffer is free.
  template <int kBuffer>
  struct Copier {
    const DecodeArgs& args;
    const CUtensorMap& map;
    const Here& place;
    int half;
    uint64_t policy;
    int box_shift, copies;  // log2 of the tokens of one copy; copies in this CTA's share
    int pages[kMaxCopies];  // of the next block; past the end none: zeros

    __device__ __forceinline__ Copier(const DecodeArgs& args, const CUtensorMap& map,
                                      const Here& place, int half)
        : args(args),
          map(map),
          place(place),
          half(half),
          policy(ptx::l2_evict_first_policy()),
          box_shift(min(args.page_shift, kBoxShift)),
          copies(kBoxTokens >> box_shift) {}

    __device__ __forceinline__ int token_of(int block, int copy) const {  // its first
      return block * kBlockTokens + place.rank * kBoxTokens + (copy << box_shift);
    }

    __device__ __forceinline__ void find_pages(const Item& item, int block) {
      const int32_t* table = args.block_table + int64_t{item.seq} * args.max_pages_per_seq;
#pragma unroll
      for (int c = 0; c < kMaxCopies; ++c) {
        const int token = token_of(block, c);
        pages[c] =
            c < copies && token < item.tokens ? __ldg(table + (token >> args.page_shift)) : -1;
      }
    }

    __device__ __forceinline__ void copy(Shared& shared, int block, uint32_t parity) const {
      ptx::mbarrier_wait(&shared.cache_empty[kBuffer][half], parity);
#pragma unroll
      for (int i = 0; i < kPieces - 4; ++i) {
        if (half == 0 && i == 4) break;
        const int piece = 4 * half + i;
        // The weights, in this piece, are read for both halves of the output.
        if (piece == kWeightsPiece) ptx::mbarrier_wait(&shared.cache_empty[kBuffer][0], parity);
        uint64_t* full = &shared.cache_full[kBuffer][piece];
        ptx::mbarrier_arrive_expect_tx(full, wgmma::kPieceBytes);
#pragma unroll
        for (int c = 0; c < kMaxCopies; ++c) {
          if (c > 0 && c >= copies) break;
          const int row = token_of(block, c) & (args.page_size - 1);
          uint8_t* dst =
              shared.cache[kBuffer][piece] + (place.rank * kBoxTokens + (c << box_shift)) * 128;
          if constexpr (kCtas == 1) {
            ptx::tma_load(dst, &map, full, piece * 64, row, place.kv_head(args), pages[c], policy);
          } else {
            ptx::tma_load_multicast(dst, &map, full, piece * 64, row, place.kv_head(args), pages[c],
                                    policy, (1 << kCtas) - 1);
          }
        }
      }
    }
  };

  // scores = Q K^T, piece by piece as they arrive.
  template <int kBuffer>  // a constant: the descriptors then live in uniform registers
  __device__ __forceinline__ static void make_scores(Shared& shared, uint32_t parity,
                                                     bool first_of_item, int item_parity,
                                                     float (&scores)[32]) {
    const uint64_t a = wgmma::row_major_descriptor(shared.query[0]);
    const uint64_t b = wgmma::row_major_descriptor(shared.cache[kBuffer][0]);
    wgmma::pin(scores);
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
      if (first_of_item) ptx::mbarrier_wait(&shared.query_full[piece], item_parity);
      ptx::mbarrier_wait(&shared.cache_full[kBuffer][piece], parity);
      wgmma::fence();
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int offset = piece * (wgmma::kPieceBytes >> 4) + k * wgmma::kRowMajorStep;
        Mma::rows_64x64(scores, a + offset, b + offset, piece + k > 0);
      }
    }
    wgmma::commit();
    wgmma::wait<0>();
    wgmma::pin(scores);
  }

  // Makes the weights of the blocks that go through a buffer: every second one of each item.
  template <int kBuffer>
  __device__ static void make_weights(const DecodeArgs& args, const CUtensorMap& query_map,
                                      const CUtensorMap& cache_map, Shared& shared,
                                      const Here& place) {
    const int warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
    Copier<kBuffer> copier(args, cache_map, place, warp);
    const bool copies = warp < 2 && lane == 0;
    uint32_t parity = 0;  // of the kBuffer's use

    for_each_item(args, shared.part, [&](const Item& item) {
      const Rows rows = rows_of(args, place, item);
      const int first = item.begin + kBuffer;
      RowPair max = {kNegativeInfinity, kNegativeInfinity}, sum = {0.f, 0.f};
      if (copies && first < item.end) copier.find_pages(item, first);
      if (kBuffer == 0 && warp == 2 && lane == 0) {
        copy_queries(args, query_map, shared, place, item);
      }

      for (int block = first; block < item.end; block += 2, parity ^= 1) {
        if (copies) {
          copier.copy(shared, block, parity ^ 1);
          if (block + 2 < item.end) copier.find_pages(item, block + 2);
        }
        __syncwarp();
        float scores[32];
        make_scores<kBuffer>(shared, parity, block == first, item.parity, scores);

        const int past = (block + 1) * kBlockTokens - item.tokens;  // tokens past the end
        if (past > (args.causal ? -(args.s_q - 1) : 0)) {
          mask_scores(scores, block * kBlockTokens + 2 * (lane % 4), rows.limit);
        }
        const RowPair top = row_maxima(scores, args.scale_log2);
        // Also: all four warps are done with the scores, so weights may overwrite the RoPE piece.
        if (block > item.begin) {
          ptx::named_barrier_sync(kMaxReady + 1 - kBuffer, 256);
        } else {
          ptx::named_barrier_sync(kFirstBlock, 128);
        }
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int row = rows.local + 8 * e;
          const float before =
              block > item.begin ? shared.max[1 - kBuffer][row] : kNegativeInfinity;
          const float fresh = next_max(before, top.v[e]);
          sum.v[e] *= rescale_factor(max.v[e], fresh);
          max.v[e] = fresh;
          if (lane % 4 == 0) shared.max[kBuffer][row] = fresh;
        }
        if (block + 1 < item.end) ptx::named_barrier_arrive(kMaxReady + kBuffer, 256);

        uint32_t weights[4][4];
        weights_of<T>(scores, args.scale_log2, max, sum, weights);
        store_weights(shared.cache[kBuffer][kWeightsPiece], weights);
        ptx::fence_proxy_async();
        __syncwarp();
        if (lane == 0) ptx::mbarrier_arrive(&shared.weights_full[kBuffer]);
      }

#pragma unroll
      for (int e = 0; e < 2; ++e) {
        sum.v[e] = quad_sum(sum.v[e]);
        if (lane % 4 == 0) {
          shared.totals[item.parity][kBuffer][rows.local + 8 * e] = make_float2(max.v[e], sum.v[e]);
        }
      }
      __syncwarp();
      if (lane == 0) {
        ptx::mbarrier_arrive(&shared.totals_full[item.parity]);
        ptx::mbarrier_arrive(&shared.query_empty);
      }
      ptx::named_barrier_sync(kWeights, 256);  // neither gets an item ahead of the other
    });
  }

  // ---- Outputs ----

  // Gives half of a block buffer back to its owners in all CTAs of the cluster.
  __device__ __forceinline__ static void release(uint64_t* empty) {
    const int lane = threadIdx.x % 32;
    if constexpr (kCtas == 1) {
      if (lane == 0) ptx::mbarrier_arrive(empty);
    } else {
      if (lane < kCtas) ptx::mbarrier_arrive_remote(empty, lane);
    }
  }

  // Zeroes the value rows past the sequence's end: their weights are 0, but 0 * NaN is NaN.
  __device__ __forceinline__ static void clear_past_end(Shared& shared, int buffer, int half,
                                                        int block, int tokens) {
    const int valid = max(tokens - block * kBlockTokens, 0);
    if (valid >= kBlockTokens) return;
    for (int i = threadIdx.x % 128; i < (kBlockTokens - valid) * 32; i += 128) {
      uint8_t* row = shared.cache[buffer][4 * half + i / 8 % 4] + (valid + i / 32) * 128;
      *reinterpret_cast<uint4*>(row + i % 8 * 16) = make_uint4(0, 0, 0, 0);
    }
    ptx::fence_proxy_async();
    ptx::named_barrier_sync(kWarpgroup + half, 128);
  }

  // output += weights V over the block in `buffer`.
  __device__ __forceinline__ static void add_block(Shared& shared, int buffer, int half,
                                                   float (&output)[128]) {
    const uint64_t a = wgmma::row_major_descriptor(shared.cache[buffer][kWeightsPiece]);
    const uint64_t b = wgmma::column_major_descriptor(shared.cache[buffer][4 * half]);
    wgmma::pin(output);
    wgmma::fence();
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const uint64_t weights = a + k * wgmma::kRowMajorStep;
      const uint64_t values = b + k * wgmma::kColumnMajorStep;
      Mma::template columns_64x128<0>(output, weights, values);
      Mma::template columns_64x128<128>(output, weights, values + (2 * wgmma::kPieceBytes >> 4));
    }
    wgmma::commit();
    wgmma::wait<0>();
    wgmma::pin(output);
  }

  // Writes the normalised output of an unsplit item, 16 bytes a lane.
  __device__ __forceinline__ static void store_output(const DecodeArgs& args, const Here& place,
                                                      const Item& item, const Rows& rows, int half,
                                                      const float (&output)[128],
                                                      const RowPair& max, const RowPair& sum) {
    const int lane = threadIdx.x % 4;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int row = place.first_row(args) + rows.local + 8 * e;
      const bool real = row < args.rows;
      const float inverse = sum.v[e] > 0.f ? 1.f / sum.v[e] : 0.f;
      T* dst = static_cast<T*>(args.out) +
               (real ? out_offset(args, item.seq, place.kv_head(args), row) : 0) +
               half * kHalfColumns + 8 * lane;
#pragma unroll
      for (int i = 0; i < 32; i += 4) {
        // The quad holds 4 groups of 8 columns, 2 columns of each per lane; transposed, each lane
        // holds one whole group.
        uint32_t v[4];
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          v[k] = Mma::pack(output[4 * (i + k) + 2 * e] * inverse,
                           output[4 * (i + k) + 2 * e + 1] * inverse);
        }
        exchange(v[0], v[1], 1);
        exchange(v[2], v[3], 1);
        exchange(v[0], v[2], 2);
        exchange(v[1], v[3], 2);
        if (real) *reinterpret_cast<uint4*>(dst + 8 * i) = make_uint4(v[0], v[1], v[2], v[3]);
      }
      if (real && half == 0 && lane == 0) {
        args.lse[lse_offset(args, item.seq, place.kv_head(args), row)] =
            log_sum_exp(max.v[e], sum.v[e]);
      }
    }
  }

  // Swaps `high` of the lane whose bit is clear with `low` of the lane whose bit is set.
  __device__ __forceinline__ static void exchange(uint32_t& low, uint32_t& high, int bit) {
    const bool set = threadIdx.x & bit;
    const uint32_t received = __shfl_xor_sync(0xFFFFFFFFu, set ? low : high, bit);
    (set ? low : high) = received;
  }

  // Accumulates and writes half of the output columns of all items.
  __device__ static void make_output(const DecodeArgs& args, Shared& shared, const Here& place,
                                     int half) {
    const Part& part = shared.part;
    uint32_t parities = 0;    // bit b: of buffer b's use; bit 2 + p: of totals p's
    Split split = {0, 0, 0};  // of the item at hand
    for_each_item(args, part, [&](const Item& item) {
      const Rows rows = rows_of(args, place, item);
      RowPair max = {kNegativeInfinity, kNegativeInfinity}, sum;
      float output[128];
#pragma unroll
      for (float& v : output) v = 0.f;

      for (int block = item.begin; block < item.end; ++block) {
        const int buffer = (block - item.begin) & 1;
        ptx::mbarrier_wait(&shared.weights_full[buffer], parities >> buffer & 1);
        parities ^= 1 << buffer;
        RowPair factor;
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float fresh = shared.max[buffer][rows.local + 8 * e];
          factor.v[e] = rescale_factor(max.v[e], fresh);
          max.v[e] = fresh;
        }
        clear_past_end(shared, buffer, half, block, item.tokens);
        rescale(output, factor);
        add_block(shared, buffer, half, output);
        release(&shared.cache_empty[buffer][half]);
      }

      ptx::mbarrier_wait(&shared.totals_full[item.parity], parities >> (2 + item.parity) & 1);
      parities ^= 4 << item.parity;
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float2 even = shared.totals[item.parity][0][rows.local + 8 * e];
        const float2 odd = shared.totals[item.parity][1][rows.local + 8 * e];
        sum.v[e] =
            even.y * rescale_factor(even.x, max.v[e]) + odd.y * rescale_factor(odd.x, max.v[e]);
      }

      split.helpers = 0;
      if (item.whole) {
        split.first_part = 0;
        store_output(args, place, item, rows, half, output, max, sum);
        return;
      }
      if (args.rows <= place.first_row(args)) return;  // a tile of no rows has nobody to tell
      const bool last = item.seq == part.end_seq;
      split.first_part = last ? part.end_seq_first_part : part.begin_seq_first_part;
      split.pieces = (last ? part.end_seq_last_part : place.part) - split.first_part + 1;
      split.helpers = split.pieces - !part.one_sequence;
      store_partial(args, partial_slot(blockIdx.x, item.begin == 0), half,
                    args.rows - place.first_row(args), output, max, sum);
      announce_partial(args.counters + place.peer(args, split.first_part), split);
    });
    // Whoever goes on to another sequence holds nobody up: only the last item is waited for.
    if (place.part < split.first_part + split.helpers) {
      combine<T, kCtas>(args, place, part.end_seq, split, shared.cache);
    }
  }
};

template <typename T, int kPieces, int kCtas>
__global__ void __launch_bounds__(kThreads, 1)
    decode_kernel(const __grid_constant__ DecodeArgs args,
                  const __grid_constant__ CUtensorMap query_map,
                  const __grid_constant__ CUtensorMap cache_map) {
  using Kernel = Decode<T, kPieces, kCtas>;
  extern __shared__ uint8_t raw_shared[];
  auto& shared =
      *reinterpret_cast<Shared*>(raw_shared + (1024 - ptx::smem_address(raw_shared) % 1024) % 1024);
  const auto place = Place<kCtas>::here(args);
  const int warpgroup = threadIdx.x / 128, warp = threadIdx.x / 32;

  if (warp == 8) {
    if (threadIdx.x % 32 == 0) {
      ptx::prefetch_tensor_map(&query_map);
      ptx::prefetch_tensor_map(&cache_map);
    }
    find_part(args.seqlens, args.b, args.max_pages_per_seq * args.page_size, place.part, args.parts,
              &shared.part);
  } else if (threadIdx.x == 0) {
    for (int piece = 0; piece < kMaxPieces; ++piece) {
      ptx::mbarrier_init(&shared.query_full[piece], 1);
      ptx::mbarrier_init(&shared.cache_full[0][piece], 1);
      ptx::mbarrier_init(&shared.cache_full[1][piece], 1);
    }
    ptx::mbarrier_init(&shared.query_empty, 8);
    for (int i = 0; i < 4; ++i) ptx::mbarrier_init(&shared.cache_empty[i / 2][i % 2], 4 * kCtas);
    for (int i = 0; i < 2; ++i) {
      ptx::mbarrier_init(&shared.weights_full[i], 4);
      ptx::mbarrier_init(&shared.totals_full[i], 8);
    }
    ptx::mbarrier_init_fence();
  } else if (threadIdx.x < kOutputThreads) {
    // The block table is wanted as soon as the part is known; a small one gets here meanwhile.
    const int64_t entry = int64_t{threadIdx.x - 1} * 32;
    const int64_t entries = int64_t{args.b} * args.max_pages_per_seq;
    if (entry < entries) ptx::prefetch_l2(args.block_table + entry);
  }
  __syncthreads();
  if constexpr (kCtas > 1) ptx::cluster_sync();

  // 128 registers a thread at launch; the output needs more than the weights.
  if (warpgroup < 2) {
    ptx::registers_grow<160>();
    Kernel::make_output(args, shared, place, warpgroup);
  } else {
    ptx::registers_shrink<96>();
    if (warpgroup == 2) {
      Kernel::template make_weights<0>(args, query_map, cache_map, shared, place);
    } else {
      Kernel::template make_weights<1>(args, query_map, cache_map, shared, place);
    }
  }
  // Nobody leaves while the other may still write to its shared memory or arrive on its barriers.
  if constexpr (kCtas > 1) ptx::cluster_sync();
}

}  // namespace mla

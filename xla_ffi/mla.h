// Copyright 2026 The mla-jax Authors
// SPDX-License-Identifier: Apache-2.0
//
// The ops as the launchers see them: plain structs, no XLA, no framework.

#ifndef MLA_JAX_MLA_H_
#define MLA_JAX_MLA_H_

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef enum MlaDtype { MLA_BF16 = 0, MLA_F16 = 1, MLA_F32 = 2 } MlaDtype;

// One call of paged MLA decode. Pointers are of the device that runs it; shapes are row-major.
//
// With G = h_q / h_kv, packed query row r = j * G + g stands for query j in [0, s_q) of head
// kv_head * G + g. The limits of single fields are those of the CUDA kernel; the CPU takes any
// positive sizes, all three dtypes, and needs neither workspace nor counters.
typedef struct MlaDecodeParams {
  const void* q;  // CPU: [b, s_q, h_q, d_k]. CUDA: [b, s_q * G, h_kv, d_k], the same if h_kv == 1
  // CUDA: null, or the channels [d_v, d_k) of q, [b, h_q, d_k - d_v], with s_q and h_kv 1; then q
  // has the others alone, heads first, as a product with each head's matrix gives them: [h_q, b,
  // d_v].
  const void* q_pe;
  const void* k_cache;           // [num_pages, page_size, h_kv, d_k]
  const int32_t* block_table;    // [b, max_pages_per_seq]; ids outside the pool read as zeros
  const int32_t* cache_seqlens;  // [b], clamped to [0, max_pages_per_seq * page_size]
  void* out;                     // [b, s_q, h_q, d_v]
  float* lse;                    // [b, h_q, s_q], natural log; +inf where nothing is attended to
  void* workspace;               // mla_sm90_decode_workspace_bytes() bytes, 16-byte aligned
  uint32_t* counters;            // [MLA_SM90_COUNTERS], anything

  int32_t b, s_q, h_q, h_kv;
  int32_t d_k;  // 576 or 512
  int32_t d_v;  // 512
  int32_t num_pages;
  int32_t page_size;  // 16, 32, 64 or 128
  int32_t max_pages_per_seq;
  float softmax_scale;      // > 0
  int32_t causal;           // query j sees the first seqlen - s_q + j + 1 tokens
  MlaDtype dtype;           // of q, k_cache and out
  int32_t batch_invariant;  // a row's bits depend on its own query, tokens and length only
} MlaDecodeParams;

enum { MLA_SM90_COUNTERS = 264 };
// max_pages_per_seq * page_size of one sequence and of all: the kernel counts in 32 bits.
#define MLA_SM90_MAX_SEQUENCE_TOKENS (INT64_C(1) << 30)
#define MLA_SM90_MAX_BATCH_TOKENS (INT64_C(1) << 34)

// Whether the kernels take pages of so many tokens.
static inline int mla_sm90_takes_page_size(int64_t tokens) {
  return tokens == 16 || tokens == 32 || tokens == 64 || tokens == 128;
}

// Bytes of workspace for partial results on a device of at most `num_sms` multiprocessors; of
// `params` only the sizes and `batch_invariant` count.
size_t mla_sm90_decode_workspace_bytes(const MlaDecodeParams* params, int num_sms);

// Enqueues the decode on `stream` of the current device. Allocates nothing, never synchronises.
// Returns a cudaError_t: cudaSuccess (0), or why nothing was launched.
int mla_sm90_decode(const MlaDecodeParams* params, void* stream);

// One call that finishes the latents of new tokens and writes them into the pages in place:
// channels [0, c) become x / sqrt(mean(x^2) + epsilon) * scale, channels [c, c + r) are rotated.
//
// Column j of sequence i is token seqlens[i] - t + j, and new if it is among the last num_new[i];
// all others are dropped, as is a layer or a page id that the pool does not have. `pages` is all of
// the pool or one device's part of it. The CUDA kernel takes c = 512, r = 64 and 16-bit latents.
typedef struct MlaAppendParams {
  void* pages;                 // [num_rows, num_slots, c + r]
  const void* latents;         // [b, t, c + r]
  const void* scale;           // [c] of scale_dtype
  const float* cos;            // [b, t, r / 2]
  const float* sin;            // like cos
  const int32_t* block_table;  // [b, max_pages_per_seq], page ids of one layer
  const int32_t* seqlens;      // [b], the new tokens included
  const int32_t* num_new;      // [b]
  const int32_t* place;        // [3]: layer; the pool's row and slot where `pages` begins

  int32_t b, t, c, r;
  int32_t num_rows, num_slots;               // of `pages`
  int32_t num_layers, num_pages, page_size;  // of the pool: it has num_layers * num_pages rows
  int32_t max_pages_per_seq;
  float epsilon;
  int32_t interleaved;   // rotated pairs are neighbours; otherwise halves of the channels
  MlaDtype dtype;        // of latents and pages
  MlaDtype scale_dtype;  // that or MLA_F32
} MlaAppendParams;

// Enqueues the append, as mla_sm90_decode does; returns what that returns.
int mla_sm90_append(const MlaAppendParams* params, void* stream);

// One attention layer of one new token of one sequence, whose queries have no latent of their own:
//
//   z = x / sqrt(mean(x^2) + norm_epsilon) * norm, or x if norm is null
//   q = z w_q, of each head n channels without and r with position; latent = z w_kv
//   the append of the latent, and of the rotated rest, to the sequence's pages (MlaAppendParams)
//   o = paged decode of (q w_uk, rotated q)
//   y = (o w_uv) w_o, plus x if norm is not null
//
// Everything is of `dtype`, 16 bits, and row-major; sums are of float and stay so between the
// steps, but for q and o as the decode takes and gives them. The kernels take the widths that
// mla_sm90_layer checks.
typedef struct MlaLayerParams {
  const void* x;               // [d]
  const void* norm;            // [d], or null
  const void* w_q;             // [d, h * (n + r)]
  const void* w_kv;            // [d, c + r]
  const void* kv_norm;         // [c]
  const void* w_uk;            // [h, c, n]
  const void* w_uv;            // [h, c, v]
  const void* w_o;             // [h * v, d]
  const float* cos;            // [r / 2], of the new token
  const float* sin;            // like cos
  const int32_t* block_table;  // [max_pages], page ids of one layer
  const int32_t* seqlen;       // [1], the new token included
  const int32_t* num_new;      // [1]; 0: nothing is appended
  void* pages;                 // [num_layers * num_pages, page_size, c + r]
  void* y;                     // [d]
  void* workspace;             // mla_sm90_layer_workspace_bytes() bytes, 128-byte aligned

  int32_t d, h, n, r, c, v;
  int32_t layer, num_layers, num_pages, page_size, max_pages;
  float norm_epsilon, kv_norm_epsilon;
  float softmax_scale;  // > 0
  int32_t interleaved;  // rotated pairs are neighbours; otherwise halves of the channels
  MlaDtype dtype;
} MlaLayerParams;

// The widest that the kernels take: heads, and channels of the residual stream, in steps of 512.
enum { MLA_SM90_LAYER_MAX_HEADS = 128, MLA_SM90_LAYER_MAX_WIDTH = 8192 };

// Bytes of workspace of a layer of `h` heads.
size_t mla_sm90_layer_workspace_bytes(int32_t h);

// Enqueues the layer, as mla_sm90_decode does its op; returns what that returns.
int mla_sm90_layer(const MlaLayerParams* params, void* stream);

// Appends on the calling thread.
void mla_cpu_append(const MlaAppendParams* params);

// Threads that the CPU's decode may use besides the caller's.
typedef struct MlaThreads {
  void* pool;  // first argument of `schedule`
  int32_t count;
  // Runs `task(data)` once, at any later time, on any thread.
  void (*schedule)(void* pool, void (*task)(void* data), void* data);
} MlaThreads;

// Decodes on the calling thread and on those of `threads` that come free meanwhile; returns when
// all is written. Never waits for a task that has not started: XLA's pool may be waiting for us.
//
// A row's arithmetic depends on its own query, tokens and length only, so its bits are the same in
// any batch, slot, pages and number of threads. Returns 0, or 1 if memory ran out.
int mla_cpu_decode(const MlaDecodeParams* params, const MlaThreads* threads);

// The instruction set that mla_cpu_decode uses here: "baseline", "avx2", "avx512", "avx512bf16" or
// "amx". The environment variable MLA_JAX_CPU_ISA, read once, names the widest that may be used;
// "avx512bf16", which only some processors are faster with, is used on others if it names that.
const char* mla_cpu_isa(void);

#ifdef __cplusplus
}
#endif

#endif  // MLA_JAX_MLA_H_

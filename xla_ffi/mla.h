// Copyright 2026 The mla-jax Authors
// SPDX-License-Identifier: Apache-2.0
//
// The decode op as the launchers see it: plain structs, no XLA, no framework.

#ifndef MLA_JAX_MLA_H_
#define MLA_JAX_MLA_H_

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef enum MlaDtype { MLA_BF16 = 0, MLA_F16 = 1 } MlaDtype;

// One call of paged MLA decode. Pointers are device pointers; shapes are row-major.
//
// With G = h_q / h_kv, packed query row r = j * G + g stands for query j in [0, s_q) of head
// kv_head * G + g.
typedef struct MlaDecodeParams {
  const void* q;                 // [b, s_q * G, h_kv, d_k]; [b, s_q, h_q, d_k] when h_kv == 1
  const void* k_cache;           // [num_pages, page_size, h_kv, d_k]
  const int32_t* block_table;    // [b, max_pages_per_seq]; ids outside the pool read as zeros
  const int32_t* cache_seqlens;  // [b], clamped to [0, max_pages_per_seq * page_size]
  void* out;                     // [b, s_q, h_q, d_v]
  float* lse;                    // [b, h_q, s_q], natural log; +inf where nothing is attended to
  void* workspace;               // mla_sm90_decode_workspace_bytes() bytes, 16-byte aligned
  uint32_t* counters;            // [MLA_SM90_MAX_CTAS], all zero; all zero again after the call

  int32_t b, s_q, h_q, h_kv;
  int32_t d_k;  // 576 or 512
  int32_t d_v;  // 512
  int32_t num_pages;
  int32_t page_size;  // 16, 32, 64 or 128
  int32_t max_pages_per_seq;
  float softmax_scale;  // > 0
  int32_t causal;       // query j sees the first seqlen - s_q + j + 1 tokens
  MlaDtype dtype;       // of q, k_cache and out
} MlaDecodeParams;

enum { MLA_SM90_MAX_CTAS = 264 };

// Bytes of workspace for partial results on a device of `num_sms` multiprocessors.
size_t mla_sm90_decode_workspace_bytes(int num_sms);

// Enqueues the decode on `stream` of the current device. Allocates nothing, never synchronises.
// Returns a cudaError_t: cudaSuccess (0), or why nothing was launched.
int mla_sm90_decode(const MlaDecodeParams* params, void* stream);

#ifdef __cplusplus
}
#endif

#endif  // MLA_JAX_MLA_H_

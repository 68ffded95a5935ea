// Copyright 2026 The mla-jax Authors
// SPDX-License-Identifier: Apache-2.0
//
// Where a new token goes, the same on every device.

#ifndef MLA_JAX_APPEND_H_
#define MLA_JAX_APPEND_H_

#include "mla.h"

#ifdef __CUDACC__
#define MLA_HOST_DEVICE __host__ __device__
#else
#define MLA_HOST_DEVICE
#endif

namespace mla {

// Returns which token of `pages` column `column` of sequence `seq` becomes, or -1 for none.
MLA_HOST_DEVICE inline int64_t Destination(const MlaAppendParams& p, uint32_t seq,
                                           uint32_t column) {
  const int32_t layer = p.place[0];
  const int64_t position = int64_t{p.seqlens[seq]} - p.t + column;
  if (column < int64_t{p.t} - p.num_new[seq] || position < 0) return -1;
  if (layer < 0 || layer >= p.num_layers) return -1;
  // A position is less than the length, so 32 bits hold it: their divisions are short on a GPU.
  const uint32_t last = p.max_pages_per_seq - 1, page_size = p.page_size;
  const uint32_t nth = static_cast<uint32_t>(position) / page_size;
  const int32_t page =
      p.block_table[int64_t{seq} * p.max_pages_per_seq + (nth < last ? nth : last)];
  if (page < 0 || page >= p.num_pages) return -1;
  const int64_t row = int64_t{layer} * p.num_pages + page - p.place[1];
  const int64_t slot = int64_t{static_cast<uint32_t>(position) % page_size} - p.place[2];
  if (row < 0 || row >= p.num_rows || slot < 0 || slot >= p.num_slots) return -1;
  return row * p.num_slots + slot;
}

}  // namespace mla

#endif  // MLA_JAX_APPEND_H_

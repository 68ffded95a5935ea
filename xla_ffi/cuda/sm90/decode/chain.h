// Copyright 2026 The mla-jax Authors
// SPDX-License-Identifier: Apache-2.0
//
// The decode of one new token as a link of a chain of kernels.
//
// Its kernel may start before the one before it has ended, of which it needs queries and the last
// block alone, and leaves the pieces of the sequence to the one after it. So no CTA ever waits for
// another: the launch need not be cooperative, which would keep the links from overlapping.

#ifndef MLA_JAX_DECODE_CHAIN_H_
#define MLA_JAX_DECODE_CHAIN_H_

#include <cuda_runtime.h>

#include <cstddef>

#include "../../../mla.h"
#include "schedule.cuh"

namespace mla {

// The pieces of a sequence as the next kernel finds them.
struct ChainPieces {
  const float* values;  // [part, head, 512]: output that is not normalised
  const float2* stats;  // [part, head]: (max in log2 units, sum of the weights)
  const int32_t* seqlens;
  int max_tokens;
  Grid grids[kTileHeights];

  // How many there are, from part 0 on.
  __device__ __forceinline__ int count() const {
    return pieces_of_one(sequence_tokens(seqlens, 0, max_tokens), grids);
  }
};

size_t chain_workspace_bytes(int heads);

// Enqueues the decode of `p`: b, s_q and h_kv 1, d_k 576, q in two parts; its other limits are
// checked. It writes to p.workspace alone, and tells in `pieces` what is there.
cudaError_t decode_in_chain(const MlaDecodeParams& p, ChainPieces* pieces, cudaStream_t stream);

}  // namespace mla

#endif  // MLA_JAX_DECODE_CHAIN_H_

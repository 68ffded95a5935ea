// Copyright 2026 The mla-jax Authors
// SPDX-License-Identifier: Apache-2.0
//
// Stands for CUDA's header of this name where code for one warp is compiled for the host: each of
// 32 lanes is a context of its own, and they take turns from one collective to the next.

#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <vector>

#define __host__
#define __device__
#define __forceinline__ inline

using std::max;
using std::min;

namespace warp {

inline constexpr int kLanes = 32;

struct Lane {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(1 << 16);
  int phase = 0;  // collectives gone through
  bool done = false;
};

inline Lane lanes[kLanes];
inline ucontext_t scheduler;
inline int64_t slots[2][kLanes];  // what the lanes bring to a collective, by its phase's parity
inline int current;
inline bool reversed;  // whose turn it is first: of two lanes that write alike, the last would win
inline std::function<void()> body;

inline void enter() {
  body();
  lanes[current].done = true;
  swapcontext(&lanes[current].context, &scheduler);
}

// Runs `f` as all lanes of a warp.
inline void run(std::function<void()> f) {
  body = std::move(f);
  for (Lane& lane : lanes) {
    getcontext(&lane.context);
    lane.context.uc_stack = {lane.stack.data(), 0, lane.stack.size()};
    lane.done = false;
    lane.phase = 0;
    makecontext(&lane.context, enter, 0);
  }
  for (bool any = true; any;) {
    any = false;
    for (int i = 0; i < kLanes; ++i) {
      current = reversed ? kLanes - 1 - i : i;
      if (lanes[current].done) continue;
      swapcontext(&scheduler, &lanes[current].context);
      any |= !lanes[current].done;
    }
  }
}

// Brings a value, and returns what all lanes brought.
inline const int64_t* meet(int64_t value) {
  const int lane = current, parity = lanes[lane].phase++ % 2;
  slots[parity][lane] = value;
  swapcontext(&lanes[lane].context, &scheduler);
  return slots[parity];
}

struct Index {
  operator unsigned() const { return current; }
};

}  // namespace warp

inline struct {
  warp::Index x;
} threadIdx;

inline int __reduce_add_sync(unsigned, int v) {
  const int64_t* all = warp::meet(v);
  int64_t sum = 0;
  for (int i = 0; i < warp::kLanes; ++i) sum += all[i];
  return static_cast<int>(sum);
}
inline int __reduce_max_sync(unsigned, int v) {
  const int64_t* all = warp::meet(v);
  return static_cast<int>(*std::max_element(all, all + warp::kLanes));
}
inline int __shfl_up_sync(unsigned, int v, int delta) {
  const int64_t* all = warp::meet(v);
  return static_cast<int>(all[warp::current >= delta ? warp::current - delta : warp::current]);
}
inline int __shfl_sync(unsigned, int v, int lane) { return static_cast<int>(warp::meet(v)[lane]); }
inline bool __all_sync(unsigned, bool v) {
  const int64_t* all = warp::meet(v);
  return std::all_of(all, all + warp::kLanes, [](int64_t x) { return x != 0; });
}
inline void __syncwarp() { warp::meet(0); }

inline int32_t __ldg(const int32_t* p) { return *p; }
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return uint64_t{a} * b >> 32; }
inline int __float2int_rd(float v) { return static_cast<int>(__builtin_floorf(v)); }
inline size_t __cvta_generic_to_shared(const void*) { return 0; }

// Copyright 2026 The mla-jax Authors
// SPDX-License-Identifier: Apache-2.0
//
// How long a GPU takes to read the pages of a decode call, and do nothing with them: what bounds
// the calls that memory binds. Pages of 64 tokens of 576 16-bit numbers, in random order, read in
// three ways: by one CTA on each multiprocessor, which copies a page after the other to shared
// memory, three at a time; by a CTA for each page; by a CTA for each eighth of a page.
//
//   nvcc -O3 -std=c++17 -gencode arch=compute_90a,code=sm_90a -o page_reads tests/page_reads.cu
//   ./page_reads
//
// Printed are microseconds a launch, median of 9 replays of a CUDA graph of 4 to 512 launches,
// each of pages that L2 no longer has, after pauses that leave the clock high.

#include <cuda_runtime.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <numeric>
#include <random>
#include <thread>
#include <vector>

#include "../xla_ffi/cuda/sm90/ptx.cuh"

namespace ptx = mla::ptx;

#define CHECK(call)                                                               \
  do {                                                                            \
    if (const cudaError_t error = (call); error != cudaSuccess) {                 \
      std::fprintf(stderr, "line %d: %s\n", __LINE__, cudaGetErrorString(error)); \
      std::exit(1);                                                               \
    }                                                                             \
  } while (false)

constexpr int kPageBytes = 64 * 576 * 2;
constexpr int kParts = 8;  // of a page, for copies and for small CTAs
constexpr int kPartBytes = kPageBytes / kParts;
constexpr int kStages = 3;
constexpr int kThreads = 192;  // of which each reads 16 bytes three times, of a part
constexpr int kPool = 128 * 256;
// Of the calls of `mla-jax bench op`.
constexpr int kCounts[] = {16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, kPool};

// Copies contiguous bytes, a multiple of 16, to shared memory.
__device__ __forceinline__ void bulk_load(void* dst, const void* src, uint64_t* bar, int bytes) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1], %2, [%3];" ::"r"(ptx::smem_address(dst)),
      "l"(src), "r"(bytes), "r"(ptx::smem_address(bar))
      : "memory");
}

__global__ void __launch_bounds__(1) copy_pages(const char* pool, const int* table, int pages) {
  extern __shared__ __align__(128) char buffers[];
  __shared__ uint64_t arrived[kStages];
  for (uint64_t& barrier : arrived) ptx::mbarrier_init(&barrier, 1);
  ptx::mbarrier_init_fence();
  const auto cut = [&](int64_t cta) { return static_cast<int>(pages * cta / gridDim.x); };
  const int begin = cut(blockIdx.x), end = cut(blockIdx.x + 1);
  const auto copy = [&](int i) {
    const int stage = (i - begin) % kStages;
    char* to = buffers + stage * kPageBytes;
    const char* from = pool + static_cast<int64_t>(table[i]) * kPageBytes;
    ptx::mbarrier_arrive_expect_tx(&arrived[stage], kPageBytes);
    for (int at = 0; at < kPageBytes; at += kPartBytes) {
      bulk_load(to + at, from + at, &arrived[stage], kPartBytes);
    }
  };
  for (int i = begin; i < min(begin + kStages, end); ++i) copy(i);
  for (int i = begin; i < end; ++i) {
    ptx::mbarrier_wait(&arrived[(i - begin) % kStages], (i - begin) / kStages % 2);
    if (i + kStages < end) copy(i + kStages);
  }
}

// Each CTA reads as many parts of a page as it takes to read all with this grid.
__global__ void read_parts(const char* pool, const int* table, int parts_of_each, int* never) {
  const int part = blockIdx.x * parts_of_each;
  const char* from =
      pool + static_cast<int64_t>(table[part / kParts]) * kPageBytes + part % kParts * kPartBytes;
  const auto* words = reinterpret_cast<const uint4*>(from) + threadIdx.x;
  uint32_t sum = 0;
#pragma unroll 24  // loads in flight
  for (int i = 0; i < parts_of_each * kPartBytes / 16 / kThreads; ++i) {
    const uint4 v = __ldg(words + i * kThreads);
    sum ^= v.x ^ v.y ^ v.z ^ v.w;
  }
  if (sum == 0x12345678) *never = 1;  // so that the loads are not left out
}

int main() {
  cudaDeviceProp properties;
  CHECK(cudaGetDeviceProperties(&properties, 0));
  char* pool;
  int *table, *never;
  CHECK(cudaMalloc(&pool, int64_t{kPool} * kPageBytes));
  CHECK(cudaMemset(pool, 1, int64_t{kPool} * kPageBytes));
  CHECK(cudaMalloc(&table, kPool * sizeof(int)));
  CHECK(cudaMalloc(&never, sizeof(int)));
  std::vector<int> order(kPool);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), std::mt19937(0));
  CHECK(cudaMemcpy(table, order.data(), kPool * sizeof(int), cudaMemcpyHostToDevice));
  CHECK(cudaFuncSetAttribute(copy_pages, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             kStages * kPageBytes));
  cudaStream_t stream;
  cudaEvent_t start, stop;
  CHECK(cudaStreamCreate(&stream));
  CHECK(cudaEventCreate(&start));
  CHECK(cudaEventCreate(&stop));

  std::printf("%s\n%8s %8s %10s %10s %10s %10s\n", properties.name, "pages", "MB", "copies",
              "a page", "an eighth", "GB/s, best");
  for (const int pages : kCounts) {
    const int sets = kPool / pages;
    const int launches = std::clamp(8192 / pages, 4, 512);  // of 600 MB together, or more
    const std::function<void(const int*)> ways[] = {
        [&](const int* pages_of_call) {
          copy_pages<<<std::min(properties.multiProcessorCount, pages), 1, kStages * kPageBytes,
                       stream>>>(pool, pages_of_call, pages);
        },
        [&](const int* pages_of_call) {
          read_parts<<<pages, kThreads, 0, stream>>>(pool, pages_of_call, kParts, never);
        },
        [&](const int* pages_of_call) {
          read_parts<<<pages * kParts, kThreads, 0, stream>>>(pool, pages_of_call, 1, never);
        }};
    double best = 1e30;
    std::printf("%8d %8.1f", pages, 1e-6 * pages * kPageBytes);
    for (const auto& read : ways) {
      cudaGraph_t graph;
      cudaGraphExec_t replay;
      CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
      for (int i = 0; i < launches; ++i) read(table + i % sets * pages);
      CHECK(cudaGetLastError());
      CHECK(cudaStreamEndCapture(stream, &graph));
      CHECK(cudaGraphInstantiate(&replay, graph, 0));
      std::vector<float> times;
      for (int round = 0; round < 9; ++round) {
        std::this_thread::sleep_for(std::chrono::milliseconds(20));
        CHECK(cudaGraphLaunch(replay, stream));  // so that the next need not wait for the host
        CHECK(cudaEventRecord(start, stream));
        CHECK(cudaGraphLaunch(replay, stream));
        CHECK(cudaEventRecord(stop, stream));
        CHECK(cudaEventSynchronize(stop));
        CHECK(cudaEventElapsedTime(&times.emplace_back(), start, stop));
      }
      CHECK(cudaGraphExecDestroy(replay));
      CHECK(cudaGraphDestroy(graph));
      std::nth_element(times.begin(), times.begin() + 4, times.end());
      const double us = 1e3 * times[4] / launches;
      best = std::min(best, us);
      std::printf(" %10.2f", us);
    }
    std::printf(" %10.0f\n", pages * double{kPageBytes} / best / 1e3);
  }
}

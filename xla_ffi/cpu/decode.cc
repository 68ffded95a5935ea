// Copyright 2026 The mla-jax Authors
// SPDX-License-Identifier: Apache-2.0
//
// The decode op on a CPU: cuts it into tiles, shares them among threads, combines the parts.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <mutex>
#include <new>
#include <vector>

#include "cpu/attend.h"
#include "cpu/convert.h"
#include "mla.h"

#ifdef MLA_HAS_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace mla {
namespace {

struct Isa {
  const char* name;
  AttendFn attend;
  int32_t most_rows = kTileRows;  // of a tile
};

#ifdef MLA_HAS_AMX
// Whether the processor multiplies matrices of bfloat16 and Linux lets this process do it.
bool HasAmx() {
  unsigned eax, ebx, ecx, edx;
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;
  if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0 || (~edx & (kBf16 | kTile)) != 0) {
    return false;
  }
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // <asm/prctl.h>, of Linux 5.16
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

// The best instruction set of this processor, or of those up to the one that MLA_JAX_CPU_ISA names.
// A name that is none allows the first alone.
Isa ChooseIsa() {
#if defined(__x86_64__)
  enum { kBaseline, kAvx2, kAvx512, kAvx512Bf16, kAmx };
  const char* cap = std::getenv("MLA_JAX_CPU_ISA");
  const bool named = cap != nullptr && *cap != '\0';
  int widest = named ? kBaseline : kAmx;
  if (named && std::strcmp(cap, "avx2") == 0) widest = kAvx2;
  if (named && std::strcmp(cap, "avx512") == 0) widest = kAvx512;
  if (named && std::strcmp(cap, "avx512bf16") == 0) widest = kAvx512Bf16;
  if (named && std::strcmp(cap, "amx") == 0) widest = kAmx;

  __builtin_cpu_init();
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#ifdef MLA_HAS_AMX
  if (widest >= kAmx && has_avx512 && __builtin_cpu_supports("avx512bf16") && HasAmx()) {
    return {"amx", amx::Attend, kMaxTileRows};
  }
#endif
#ifdef MLA_HAS_AVX512_BF16
  // On Intel's processors its products take four times as long as those of float32, for twice as
  // many elements (Emerald Rapids): only where it is asked for.
  if (widest >= kAvx512Bf16 && has_avx512 && __builtin_cpu_supports("avx512bf16") &&
      (named || __builtin_cpu_is("amd"))) {
    return {"avx512bf16", avx512bf16::Attend};
  }
#endif
  if (widest >= kAvx512 && has_avx512) return {"avx512", avx512::Attend};
  if (widest >= kAvx2 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    return {"avx2", avx2::Attend};
  }
#endif
  return {"baseline", baseline::Attend};
}

// Chosen once per process.
const Isa& ChosenIsa() {
  static const Isa isa = ChooseIsa();
  return isa;
}

// Items [0, count) that threads claim one by one. Helpers hold it by shared pointers: one that
// starts after the caller has returned finds nothing left to claim and touches nothing else.
class Work {
 public:
  using Body = std::function<void(int64_t item, Scratch& scratch)>;

  Work(const MlaDecodeParams& params, int32_t tile_rows, int64_t count, Body body)
      : params_(params), tile_rows_(tile_rows), count_(count), body_(std::move(body)) {}

  // Runs all items with the caller's thread and `threads`; returns whether memory sufficed.
  static bool Run(const MlaDecodeParams& params, int32_t tile_rows, const MlaThreads& threads,
                  int64_t count, Body body) {
    auto work = std::make_shared<Work>(params, tile_rows, count, std::move(body));
    const int64_t helpers = std::min<int64_t>(threads.count, count - 1);
    for (int64_t i = 0; i < helpers; ++i) {
      auto* data = new (std::nothrow) std::shared_ptr<Work>(work);
      if (data == nullptr) break;  // throwing would free what the helpers of before still use
      threads.schedule(
          threads.pool,
          [](void* data) {
            std::unique_ptr<std::shared_ptr<Work>> work(static_cast<std::shared_ptr<Work>*>(data));
            (*work)->Claim();
          },
          data);
    }
    work->Claim();
    // Whatever is left was claimed by threads that run: waiting for them cannot deadlock.
    std::unique_lock<std::mutex> lock(work->mutex_);
    work->all_done_.wait(lock, [&] { return work->done_ == work->count_; });
    return !work->failed_;
  }

 private:
  void Claim() {
    std::unique_ptr<Scratch> scratch;
    int64_t claimed = 0;
    for (int64_t item; (item = next_.fetch_add(1)) < count_; ++claimed) {
      if (failed_) continue;
      try {
        if (scratch == nullptr) scratch = std::make_unique<Scratch>(params_, tile_rows_);
        body_(item, *scratch);
      } catch (const std::bad_alloc&) {
        failed_ = true;
      }
    }
    if (claimed == 0) return;
    std::lock_guard<std::mutex> lock(mutex_);
    done_ += claimed;
    if (done_ == count_) all_done_.notify_all();
  }

  const MlaDecodeParams params_;
  const int32_t tile_rows_;
  const int64_t count_;
  const Body body_;
  std::atomic<int64_t> next_{0};
  std::atomic<bool> failed_{false};
  std::mutex mutex_;
  std::condition_variable all_done_;
  int64_t done_ = 0;  // guarded by mutex_
};

// Where the parts of a tile's rows leave acc, top and total until they are combined.
struct Partial {
  std::vector<float> acc, top, total;  // [rows, d_v], [rows], [rows]
};

// Writes out and lse of row `r` of a tile.
void WriteRow(const MlaDecodeParams& p, const Tile& tile, int32_t r, const float* acc, float top,
              float total) {
  const int64_t group = p.h_q / p.h_kv;
  const int64_t j = (tile.row0 + r) / group;
  const int64_t head = tile.kv_head * group + (tile.row0 + r) % group;
  const int64_t at = ((int64_t{tile.seq} * p.s_q + j) * p.h_q + head) * p.d_v;
  const bool seen = total != 0;  // true of NaN
  const float factor = seen ? 1 / total : 0;
  for (int64_t i = 0; i < p.d_v; ++i) {
    const float x = seen ? acc[i] * factor : 0;
    if (p.dtype == MLA_F32) {
      static_cast<float*>(p.out)[at + i] = x;
    } else {
      static_cast<uint16_t*>(p.out)[at + i] = p.dtype == MLA_BF16 ? ToBf16(x) : ToF16(x);
    }
  }
  p.lse[(int64_t{tile.seq} * p.h_q + head) * p.s_q + j] =
      seen ? top + std::log(total) : std::numeric_limits<float>::infinity();
}

// Combines the parts of row `r` in their order, which is always the same.
void CombineRow(const MlaDecodeParams& p, const Tile& tile, int32_t r, const Partial* parts,
                int64_t num_parts, float* acc) {
  float top = -std::numeric_limits<float>::infinity();
  for (int64_t i = 0; i < num_parts; ++i) top = std::max(top, parts[i].top[r]);
  const float base = std::isinf(top) && top < 0 ? 0 : top;
  float total = 0;
  std::fill_n(acc, p.d_v, 0.0f);
  for (int64_t i = 0; i < num_parts; ++i) {
    const float factor = std::exp(parts[i].top[r] - base);
    total += factor * parts[i].total[r];
    const float* from = parts[i].acc.data() + int64_t{r} * p.d_v;
    for (int64_t c = 0; c < p.d_v; ++c) acc[c] += factor * from[c];
  }
  WriteRow(p, tile, r, acc, top, total);
}

// Rows that are written together: their tile, whole, and the parts that its tokens are cut into.
struct Job {
  Tile tile;
  int64_t num_parts;  // at least 1
  int64_t first;      // its first item, and the place of its first part among the partials
};

int64_t NumParts(int64_t length) {
  return std::max<int64_t>(1, (length + kPartTokens - 1) / kPartTokens);
}

// The height of tiles: what this processor likes, or less to give every thread two items. A row's
// bits do not depend on it.
int32_t ChooseTileRows(const MlaDecodeParams& p, int64_t num_rows, int64_t num_threads) {
  int64_t parts = 0;
  for (int32_t seq = 0; seq < p.b; ++seq) parts += NumParts(ClampedLength(p, seq));
  int32_t rows = ChosenIsa().most_rows;
  while (rows > kTileRows && parts * p.h_kv * ((num_rows + rows - 1) / rows) < 2 * num_threads) {
    rows /= 2;
  }
  return rows;
}

bool Decode(const MlaDecodeParams& p, const MlaThreads& threads) {
  const int32_t num_rows = p.s_q * (p.h_q / p.h_kv);
  const int32_t tile_rows = ChooseTileRows(p, num_rows, int64_t{threads.count} + 1);
  std::vector<Job> jobs;
  std::vector<int64_t> job_of_item;
  for (int32_t seq = 0; seq < p.b; ++seq) {
    const int64_t length = ClampedLength(p, seq);
    const int64_t num_parts = NumParts(length);
    for (int32_t kv_head = 0; kv_head < p.h_kv; ++kv_head) {
      for (int32_t row0 = 0; row0 < num_rows; row0 += tile_rows) {
        const int32_t rows = std::min(tile_rows, num_rows - row0);
        jobs.push_back({{seq, kv_head, row0, rows, 0, length},
                        num_parts,
                        static_cast<int64_t>(job_of_item.size())});
        job_of_item.insert(job_of_item.end(), num_parts, static_cast<int64_t>(jobs.size()) - 1);
      }
    }
  }
  const int64_t num_items = static_cast<int64_t>(job_of_item.size());
  std::vector<Partial> partials(num_items);

  bool enough = Work::Run(p, tile_rows, threads, num_items, [&](int64_t item, Scratch& s) {
    const Job& job = jobs[job_of_item[item]];
    Tile tile = job.tile;
    tile.token0 = (item - job.first) * kPartTokens;
    tile.token1 = std::min(tile.token0 + kPartTokens, job.tile.token1);
    ChosenIsa().attend(p, tile, s);
    if (job.num_parts == 1) {
      for (int32_t r = 0; r < tile.rows; ++r) {
        WriteRow(p, tile, r, s.acc + r * s.value_stride, s.top[r], s.total[r]);
      }
      return;
    }
    Partial& partial = partials[item];
    partial.acc.reserve(int64_t{tile.rows} * p.d_v);
    for (int32_t r = 0; r < tile.rows; ++r) {
      const float* row = s.acc + r * s.value_stride;
      partial.acc.insert(partial.acc.end(), row, row + p.d_v);
    }
    partial.top.assign(s.top, s.top + tile.rows);
    partial.total.assign(s.total, s.total + tile.rows);
  });

  jobs.erase(
      std::remove_if(jobs.begin(), jobs.end(), [](const Job& j) { return j.num_parts == 1; }),
      jobs.end());
  if (!enough || jobs.empty()) return enough;
  return Work::Run(p, tile_rows, threads, jobs.size(), [&](int64_t item, Scratch& s) {
    const Job& job = jobs[item];
    for (int32_t r = 0; r < job.tile.rows; ++r) {
      CombineRow(p, job.tile, r, &partials[job.first], job.num_parts, s.acc);
    }
  });
}

}  // namespace
}  // namespace mla

extern "C" int mla_cpu_decode(const MlaDecodeParams* params, const MlaThreads* threads) {
  try {
    if (params->b == 0) return 0;
    return mla::Decode(*params, *threads) ? 0 : 1;
  } catch (const std::bad_alloc&) {
    return 1;
  }
}

extern "C" const char* mla_cpu_isa() { return mla::ChosenIsa().name; }

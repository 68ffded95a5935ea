// Emulates the synchronisation of the roles kernel with threads for warps; tags check every hand-over.
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <mutex>
#include <random>
#include <thread>
#include <vector>
#include <chrono>
using namespace std;
static atomic<int> failures{0};
#define CHECK(c, ...) do { if (!(c)) { if (failures++ < 5) { printf("FAIL %s: ", #c); printf(__VA_ARGS__); puts(""); fflush(stdout);} } } while (0)
thread_local mt19937 rng;
void jitter() { int r = rng() % 40; if (r == 0) this_thread::sleep_for(chrono::microseconds(rng() % 50)); else if (r < 8) this_thread::yield(); }
struct MBar { mutex m; int count, pending; long tx = 0; atomic<int> phase{0};
  void init(int c) { count = pending = c; }
  void settle() { if (pending == 0 && tx == 0) { phase++; pending = count; } }
  void arrive() { jitter(); lock_guard<mutex> l(m); CHECK(pending > 0, "arrive overrun"); pending--; settle(); }
  void arrive_tx(int b) { lock_guard<mutex> l(m); CHECK(pending > 0, "arrive overrun"); tx += b; pending--; settle(); }
  void complete(int b) { lock_guard<mutex> l(m); tx -= b; settle(); }
  void wait(int parity) { jitter(); auto t = chrono::steady_clock::now(); while ((phase & 1) == parity) { this_thread::yield(); if (chrono::steady_clock::now() - t > chrono::seconds(20)) { printf("DEADLOCK mbarrier\n"); fflush(stdout); _exit(1);} } jitter(); } };
struct Named { mutex m; int arrived = 0; atomic<int> gen{0};
  void add(int expect) { arrived += 32; CHECK(arrived <= expect, "named overrun"); if (arrived == expect) { arrived = 0; gen++; } }
  void arrive(int expect) { jitter(); lock_guard<mutex> l(m); add(expect); }
  void sync(int expect) { jitter(); int g; { lock_guard<mutex> l(m); g = gen; add(expect); } auto t = chrono::steady_clock::now(); while (gen == g) { this_thread::yield(); if (chrono::steady_clock::now() - t > chrono::seconds(20)) { printf("DEADLOCK named\n"); fflush(stdout); _exit(1);} } jitter(); } };
struct It { int begin, end; };
struct Cta { MBar qf, qe, full[2][9], empty[2][2], weights[2], totals[2]; Named nb[8];
  atomic<long> cache[2][9], q, maxtag[2][4], tot[2][2][4]; atomic<int> reading[2][9]; };
int CT;
struct Tma { vector<thread> t; };
int main() {
  mt19937 seedr(7);
  for (int trial = 0; trial < 3000; trial++) {
    CT = 1 + seedr() % 2;
    int n = 1 + seedr() % 6; vector<It> items; for (int i = 0; i < n; i++) { int b = seedr() % 3; items.push_back({b, b + 1 + int(seedr() % 5)}); }
    vector<Cta> C(CT);
    for (auto& c : C) { c.qf.init(1); c.qe.init(8); for (int b = 0; b < 2; b++) { for (auto& f : c.full[b]) f.init(1); for (auto& e : c.empty[b]) e.init(4 * CT); c.weights[b].init(4); c.totals[b].init(8); for (int p = 0; p < 9; p++) { c.cache[b][p] = -1; c.reading[b][p] = 0; } } c.q = -1; }
    vector<thread> th; mutex tm; vector<thread> tmas;
    auto tag = [](int it, int b) { return long(it) * 1000 + b; };
    auto tma = [&](function<void()> f) { lock_guard<mutex> l(tm); unsigned s = rng(); tmas.emplace_back([f, s] { rng.seed(s); jitter(); jitter(); f(); }); };
    for (int r = 0; r < CT; r++) for (int w = 0; w < 16; w++) th.emplace_back([&, r, w, sd = seedr()] {
      rng.seed(sd + w * 77 + r); Cta& c = C[r]; int wg = w / 4, ww = w % 4;
      if (wg >= 2) { int B = wg - 2; int parity = 0;
        for (int i = 0; i < n; i++) { It it = items[i]; int first = it.begin + B;
          if (B == 0 && ww == 2) { c.qe.wait((i & 1) ^ 1); c.qf.arrive_tx(1); int ii = i; tma([&c, ii] { c.q = ii; c.qf.complete(1); }); }
          for (int b = first; b < it.end; b += 2, parity ^= 1) {
            if (ww < 2) { c.empty[B][ww].wait(parity ^ 1);
              for (int p = 4 * ww; p < (ww ? 9 : 4); p++) { if (p == 8) c.empty[B][0].wait(parity ^ 1);
                c.full[B][p].arrive_tx(CT); long tg = tag(i, b);
                for (int d = 0; d < CT; d++) { Cta* dc = &C[d]; tma([dc, B, p, tg, r] { CHECK(dc->reading[B][p] == 0, "tma over readers"); dc->cache[B][p] = tg; dc->full[B][p].complete(1); }); } } }
            if (b == first) { c.qf.wait(i & 1); }
            CHECK(c.q == i, "q tag");
            for (int p = 0; p < 9; p++) { c.full[B][p].wait(parity); c.reading[B][p]++; CHECK(c.cache[B][p] == tag(i, b), "scores piece %d has %ld want %ld", p, (long)c.cache[B][p], tag(i, b)); }
            jitter(); CHECK(c.q == i, "q tag after");
            for (int p = 0; p < 9; p++) { CHECK(c.cache[B][p] == tag(i, b), "scores after"); c.reading[B][p]--; }
            if (b > it.begin) { c.nb[1 + 1 - B].sync(256); CHECK(c.maxtag[1 - B][ww] == tag(i, b - 1), "max tag %ld want %ld", (long)c.maxtag[1 - B][ww], tag(i, b - 1)); }
            else c.nb[7].sync(128);
            c.maxtag[B][ww] = tag(i, b);
            if (b + 1 < it.end) c.nb[1 + B].arrive(256);
            jitter(); CHECK(c.cache[B][8] == tag(i, b) || c.cache[B][8] == -2 - tag(i, b), "weights into a live piece"); c.cache[B][8] = -2 - tag(i, b);
            c.weights[B].arrive(); }
          c.tot[i & 1][B][ww] = i; c.totals[i & 1].arrive(); c.qe.arrive(); c.nb[6].sync(256); }
      } else { int par = 0;
        for (int i = 0; i < n; i++) { It it = items[i];
          for (int b = it.begin; b < it.end; b++) { int u = (b - it.begin) & 1; c.weights[u].wait(par >> u & 1); par ^= 1 << u;
            for (int x = 0; x < 4; x++) CHECK(c.maxtag[u][x] == tag(i, b), "out max");
            CHECK(c.cache[u][8] == -2 - tag(i, b), "weights tag"); for (int p = 4 * wg; p < 4 * wg + 4; p++) { c.reading[u][p]++; CHECK(c.cache[u][p] == tag(i, b), "values tag"); } c.reading[u][8]++;
            jitter();
            for (int p = 4 * wg; p < 4 * wg + 4; p++) { CHECK(c.cache[u][p] == tag(i, b), "values tag after"); c.reading[u][p]--; } CHECK(c.cache[u][8] == -2 - tag(i, b), "weights after"); c.reading[u][8]--;
            for (int x = 0; x < 4; x++) CHECK(c.maxtag[u][x] == tag(i, b), "out max after");
            for (int d = 0; d < CT; d++) C[d].empty[u][wg].arrive(); }
          c.totals[i & 1].wait(par >> (2 + (i & 1)) & 1); par ^= 4 << (i & 1);
          for (int x = 0; x < 4; x++) for (int B = 0; B < 2; B++) CHECK(c.tot[i & 1][B][x] == i, "totals tag"); jitter();
          for (int x = 0; x < 4; x++) for (int B = 0; B < 2; B++) CHECK(c.tot[i & 1][B][x] == i, "totals tag after"); }
      } });
    for (auto& t : th) t.join();
    for (auto& t : tmas) t.join();
  }
  printf("failures %d\n", (int)failures);
}

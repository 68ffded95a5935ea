"""Private harness: correctness against float64 and benchmark against the peers."""
import ctypes, sys, os, time, random, statistics, json
import torch

class P(ctypes.Structure):
    _fields_ = [(n, ctypes.c_void_p) for n in
                "q k_cache block_table cache_seqlens out lse workspace counters".split()] + \
               [(n, ctypes.c_int32) for n in
                "b s_q h_q h_kv d_k d_v num_pages page_size max_pages_per_seq".split()] + \
               [("softmax_scale", ctypes.c_float), ("causal", ctypes.c_int32), ("dtype", ctypes.c_int32)]

class Lib:
    def __init__(self, path):
        self.l = ctypes.CDLL(path)
        self.l.mla_sm90_decode_workspace_bytes.restype = ctypes.c_size_t
        n = self.l.mla_sm90_decode_workspace_bytes(torch.cuda.get_device_properties(0).multi_processor_count)
        self.ws = torch.full((n // 4,), float("nan"), device="cuda")
        self.counters = torch.zeros(264, dtype=torch.int32, device="cuda")
    def __call__(self, q, k, table, lens, causal=False, scale=None, out=None, lse=None):
        """q [b, s_q, h_q, d]; k [pages, page, h_kv, d]."""
        b, s_q, h_q, d = q.shape
        h_kv = k.shape[2]
        if out is None:
            out = torch.full((b, s_q, h_q, 512), float("nan"), device="cuda", dtype=q.dtype)
            lse = torch.full((b, h_q, s_q), float("nan"), device="cuda")
        if h_kv > 1:
            q = q.view(b, s_q, h_kv, h_q // h_kv, d).transpose(2, 3).contiguous()
        p = P(q.data_ptr(), k.data_ptr(), table.data_ptr(), lens.data_ptr(), out.data_ptr(), lse.data_ptr(),
              self.ws.data_ptr(), self.counters.data_ptr(), b, s_q, h_q, h_kv, d, 512, k.shape[0], k.shape[1],
              table.shape[1], scale or d ** -0.5, int(causal), 0 if q.dtype == torch.bfloat16 else 1)
        e = self.l.mla_sm90_decode(ctypes.byref(p), ctypes.c_void_p(torch.cuda.current_stream().cuda_stream))
        if e: raise RuntimeError(f"launch error {e}")
        self.keep = q
        return out, lse

def make(b, s_q, lens, h_q, h_kv, d, page, dtype, poison=True, seed=0, extra=3):
    g = torch.Generator(device="cuda").manual_seed(seed)
    maxp = max(1, max((l + page - 1) // page for l in lens)) + 2
    need = [(l + page - 1) // page for l in lens]
    n = sum(need) + extra
    perm = torch.randperm(n, generator=g, device="cuda").cpu().tolist()
    k = torch.randn(n, page, h_kv, d, generator=g, device="cuda", dtype=torch.float32).to(dtype)
    used = torch.zeros(n, page, dtype=torch.bool)
    table = torch.full((b, maxp), 2147480000, dtype=torch.int32)
    it = 0
    for i, l in enumerate(lens):
        for j in range(need[i]):
            pg = perm[it]; it += 1
            table[i, j] = pg
            used[pg, : min(page, l - j * page)] = True
    if poison:
        k[~used.cuda()] = float("nan")
    q = torch.randn(b, s_q, h_q, d, generator=g, device="cuda", dtype=torch.float32).to(dtype)
    return q, k, table.cuda(), torch.tensor(lens, dtype=torch.int32, device="cuda")

def reference(q, k, table, lens, causal, scale=None):
    b, s_q, h_q, d = q.shape
    page, h_kv = k.shape[1], k.shape[2]
    G = h_q // h_kv
    out = torch.zeros(b, s_q, h_q, 512, dtype=torch.float64, device="cuda")
    lse = torch.full((b, h_q, s_q), float("inf"), dtype=torch.float64, device="cuda")
    for i in range(b):
        l = int(lens[i])
        if l <= 0: continue
        npg = (l + page - 1) // page
        pages = table[i, :npg].long()
        kk = k[pages.clamp(0, k.shape[0] - 1)].double()
        bad = (pages < 0) | (pages >= k.shape[0])
        kk[bad] = 0
        kk = kk.reshape(npg * page, h_kv, d)[:l]
        for j in range(s_q):
            see = l - s_q + j + 1 if causal else l
            if see <= 0: continue
            for h in range(h_kv):
                kh = kk[:see, h]
                s = q[i, j, h * G:(h + 1) * G].double() @ kh.T * (scale or d ** -0.5)
                out[i, j, h * G:(h + 1) * G] = torch.softmax(s, -1) @ kh[:, :512]
                lse[i, h * G:(h + 1) * G, j] = torch.logsumexp(s, -1)
    return out, lse

def check(lib, name, b, s_q, lens, h_q, h_kv=1, d=576, page=64, dtype=torch.bfloat16, causal=False, seed=0, scale=None, rep=2):
    q, k, t, l = make(b, s_q, lens, h_q, h_kv, d, page, dtype, seed=seed)
    ro, rl = reference(q, k, t, l, causal, scale)
    worst = ""
    ok = True
    first = None
    for r in range(rep):
        o, s = lib(q, k, t, l, causal, scale)
        torch.cuda.synchronize()
        if first is None: first = (o, s)
        same = torch.equal(first[0].view(torch.int16), o.view(torch.int16)) and torch.equal(first[1], s)
        od = o.double()
        err = ((od - ro).norm() / ro.norm().clamp_min(1e-30)).item()
        rowerr = ((od - ro).norm(dim=-1) / ro.norm(dim=-1).clamp_min(1e-3)).max().item()
        fin = torch.isfinite(rl)
        lerr = (s.double()[fin] - rl[fin]).abs().max().item() if fin.any() else 0.
        infok = bool((s[~fin] == float("inf")).all()) and bool((od[~fin.transpose(1, 2)] == 0).all())
        good = err < 4e-3 and rowerr < 2e-2 and lerr < 1e-3 and infok and same and int(lib.counters.abs().sum()) == 0
        ok &= good
    print(f"{'ok  ' if ok else 'FAIL'} {name}: err {err:.2e} row {rowerr:.2e} lse {lerr:.1e} inf {infok} same {same} ctr {int(lib.counters.abs().sum())}", flush=True)
    return ok

def bad_pages(lib):
    """Page ids outside the pool inside the used part read as zeros; random garbage never faults."""
    ok = True
    for h, s_q in ((16, 1), (128, 2)):
        q, k, t, l = make(3, s_q, [700, 300, 4100], h, 1, 576, 64, torch.bfloat16, seed=5)
        t[0, 2], t[1, 0], t[2, 40], t[2, 63] = -1, k.shape[0], 2147483647, -2147483648
        ro, rl = reference(q, k, t, l, s_q > 1)
        o, s = lib(q, k, t, l, s_q > 1)
        torch.cuda.synchronize()
        err = ((o.double() - ro).norm() / ro.norm()).item()
        ok &= err < 4e-3
        print("bad pages", h, f"{err:.2e}", flush=True)
    for seed in range(20):
        g = torch.Generator(device="cuda").manual_seed(seed)
        t = torch.randint(-2**31, 2**31 - 1, (7, 33), generator=g, device="cuda", dtype=torch.int64).int()
        l = torch.randint(-2**31, 2**31 - 1, (7,), generator=g, device="cuda", dtype=torch.int64).int()
        lib(q[:1].expand(7, -1, -1, -1).contiguous(), k, t, l, True)
    torch.cuda.synchronize()
    ok &= int(lib.counters.abs().sum()) == 0
    print("garbage", ok, flush=True)
    return ok

def correctness(lib, full):
    R = random.Random(1)
    ok = True
    c = lambda *a, **k: check(lib, *a, **k)
    ok &= c("1 block", 1, 1, [64], 64)
    ok &= c("1 ragged", 1, 1, [37], 64)
    ok &= c("h16 2blk", 2, 1, [128, 100], 16)
    ok &= c("many", 140, 1, [R.randint(0, 300) for _ in range(140)], 16)
    ok &= c("whole long", 132, 1, [640] * 132, 64)
    ok &= c("split b1", 1, 1, [1024], 16)
    ok &= c("split b1 h64", 1, 1, [1000], 64)
    ok &= c("split b3", 3, 1, [9000, 17, 3001], 16)
    ok &= c("split b1 long", 1, 1, [65536], 16)
    ok &= c("h128 1 block", 1, 1, [64], 128)
    ok &= c("h128", 3, 1, [200, 65, 1], 128)
    ok &= c("h128 split", 2, 1, [5000, 2111], 128)
    ok &= c("h128 many", 90, 1, [R.randint(0, 900) for _ in range(90)], 128)
    ok &= c("h128 2c", 3, 2, [1, 64, 777], 128, causal=True)
    ok &= c("h16 4c", 4, 4, [3, 64, 777, 0], 16, causal=True)
    ok &= c("h9 7c", 5, 7, [3, 64, 777, 0, 130], 9, causal=True)
    ok &= c("h126", 3, 1, [3, 64, 777], 126)
    ok &= c("h3 big scale", 2, 1, [300, 2000], 3, scale=1.0)
    ok &= bad_pages(lib)
    if full:
        for page in (16, 32, 128):
            ok &= c(f"page {page}", 5, 1, [3, 64, 777, 0, 4130], 16, page=page)
            ok &= c(f"page {page} h128 2c", 5, 2, [3, 64, 777, 0, 4130], 128, page=page, causal=True)
        ok &= c("fp16", 5, 1, [3, 64, 777, 0, 4130], 64, dtype=torch.float16)
        ok &= c("fp16 h128", 5, 1, [3, 64, 777, 0, 4130], 128, dtype=torch.float16)
        ok &= c("d512", 5, 1, [3, 64, 777, 0, 4130], 64, d=512)
        ok &= c("d512 h128", 5, 1, [3, 64, 777, 0, 4130], 128, d=512)
        ok &= c("d512 h128 f16 2c", 5, 2, [3, 64, 777, 0, 4130], 128, d=512, dtype=torch.float16, causal=True)
        ok &= c("h_kv 2", 3, 2, [64, 777, 4130], 16, h_kv=2, causal=True)
        ok &= c("h_kv 4 h512", 3, 1, [64, 777, 130], 512, h_kv=4)
        ok &= c("300 rows", 3, 3, [64, 777, 130], 100, causal=True)
        ok &= c("b 400", 400, 1, [R.randint(0, 200) for _ in range(400)], 128)
        ok &= c("b 600 varlen", 600, 1, [R.randint(0, 400) for _ in range(600)], 16)
    print("ALL OK" if ok else "SOME FAILED", flush=True)

ROWS = [(128, s, k, 128) for s in (1, 2) for k in (1024, 4096, 16384)] + \
       [(128, 1, k, h) for h in (16, 32, 64) for k in (1024, 4096, 16384)] + [(16, 4, 8192, 16), (64, 4, 4096, 32)] + \
       [(1, 1, k, h) for k in (1024, 8192, 65536) for h in (16, 128)] + \
       [(4, 1, k, h) for k in (1024, 8192, 65536) for h in (16, 128)] + \
       [(16, 1, k, h) for k in (1024, 8192, 65536) for h in (16, 128)]

READ, MMA = 3.052e12, 781e12
def floor_us(b, s, k, h):
    fl = 2 * b * s * h * k * 1088
    by = k * b * 1152 + b * s * h * 1088 * 2
    return max(fl / MMA, by / READ) * 1e6

def graph_of(fn, n):
    s = torch.cuda.Stream()
    s.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(s):
        for i in range(min(n, 2)): fn(i)
    torch.cuda.current_stream().wait_stream(s)
    torch.cuda.synchronize()
    g = torch.cuda.CUDAGraph()
    with torch.cuda.graph(g):
        for i in range(n): fn(i)
    return g

def bench(libs, rows, peers=True, rounds=7, lens_of=None, out=None):
    res = []
    if peers:
        import flash_mla
        from flash_mla import flash_mla_with_kvcache, get_mla_metadata
        import fa3_fwd_interface as fa3
    for (b, s, k, h) in rows:
        kvb = b * k * 1152
        nset = max(1, min(32, -(-150_000_000 // kvb)))
        ncall = max(nset, 2 if kvb > 1e8 else 16)
        causal = s > 1
        page = 64
        sets = []
        for i in range(nset):
            npg = b * k // page
            kv = torch.randn(npg, page, 1, 576, device="cuda", dtype=torch.bfloat16)
            t = torch.randperm(npg, device="cuda").view(b, k // page).int()
            q = torch.randn(b, s, h, 576, device="cuda", dtype=torch.bfloat16)
            sets.append((q, kv, t))
        lens = torch.full((b,), k, dtype=torch.int32, device="cuda")
        o = torch.empty(b, s, h, 512, device="cuda", dtype=torch.bfloat16)
        ls = torch.empty(b, h, s, device="cuda")
        fns = {}
        for name, lib in libs.items():
            fns[name] = lambda i, lib=lib: lib(*sets[i % nset], lens, causal, out=o, lse=ls)
        if peers:
            meta = get_mla_metadata()[0]
            def fm(i, meta=meta):
                q, kv, t = sets[i % nset]
                flash_mla_with_kvcache(q, kv, t, lens, 512, meta, causal=causal, use_legacy=True, is_fp8_kvcache=False)
            fm(0)
            fns["FlashMLA"] = fm
            def f3(i):
                q, kv, t = sets[i % nset]
                kvv = kv.view(b, k, 1, 576)
                fa3.flash_attn_with_kvcache(q[..., 512:], kvv[..., 512:], kvv[..., :512], qv=q[..., :512], softmax_scale=576 ** -0.5, causal=causal)
            fns["FA3"] = f3
        graphs = {}
        for n, f in fns.items():
            try: graphs[n] = graph_of(f, ncall)
            except Exception as e: print("graph failed", n, repr(e)[:300], flush=True)
        times = {n: [] for n in graphs}
        for r in range(rounds + 1):
            order = list(graphs)
            random.shuffle(order)
            for n in order:
                time.sleep(0.002)
                a, z = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                graphs[n].replay() if kvb < 2e8 else None
                a.record(); graphs[n].replay(); z.record(); torch.cuda.synchronize()
                if r: times[n].append(a.elapsed_time(z) * 1e3 / ncall)
        fl = floor_us(b, s, k, h)
        med = {n: statistics.median(t) for n, t in times.items()}
        spread = {n: (min(t), max(t)) for n, t in times.items()}
        line = f"b{b} s{s} k{k} h{h}: floor {fl:.1f} " + " ".join(f"{n} {m:.1f} ({fl / m:.2f})" for n, m in med.items())
        if peers:
            best = min(med["FlashMLA"], med["FA3"])
            for n in libs: 
                if n in med: line += f" | {n} {best / med[n]:.3f}x"
        print(line, flush=True)
        res.append(dict(row=(b, s, k, h), floor=fl, med=med, spread=spread))
        del graphs, sets
    if peers:
        import math
        for n in libs:
            x = [min(r["med"]["FlashMLA"], r["med"]["FA3"]) / r["med"][n] for r in res if n in r["med"]]
            sm = [min(r["med"]["FlashMLA"], r["med"]["FA3"]) / r["med"][n] for r in res if n in r["med"] and r["row"][0] <= 16]
            print(n, "geomean", round(math.exp(sum(map(math.log, x)) / len(x)), 3), "worst", round(min(x), 3), "small geomean", round(math.exp(sum(map(math.log, sm)) / max(1, len(sm))), 3) if sm else "")
    if out: json.dump(res, open(out, "w"))

if __name__ == "__main__":
    torch.manual_seed(0)
    mode = sys.argv[1]
    print(torch.cuda.get_device_name(), flush=True)
    if mode == "check":
        correctness(Lib(sys.argv[2]), len(sys.argv) > 3 and sys.argv[3] == "full")
    elif mode == "bench":
        libs = {os.path.basename(p).removesuffix(".so"): Lib(p) for p in sys.argv[2].split(",")}
        sel = ROWS if len(sys.argv) < 5 else [ROWS[int(i)] for i in sys.argv[4].split(",")]
        bench(libs, sel, peers=sys.argv[3] == "peers", out=os.environ.get("JSON"))

import sys, ctypes, torch, numpy as np
path = sys.argv[1]
sys.argv = ["x"]
import harness as H
lib = H.Lib(path)
lib.l.mla_stamps.argtypes = [ctypes.c_void_p]
def go(b, s, k, h, ctas=(0, 5)):
    lens = torch.full((b,), k, dtype=torch.int32, device="cuda")
    npg = b * k // 64
    sets = []
    for _ in range(3 if b * k < 1e6 else 1):
        kv = torch.randn(npg, 64, 1, 576, device="cuda", dtype=torch.bfloat16)
        t = torch.randperm(npg, device="cuda").view(b, k // 64).int()
        sets.append((torch.randn(b, s, h, 576, device="cuda", dtype=torch.bfloat16), kv, t))
    for i in range(4):
        q, kv, t = sets[i % len(sets)]
        lib(q, kv, t, lens, s > 1)
        torch.cuda.synchronize()
    a = np.zeros((132, 4, 60), np.int64)
    lib.l.mla_stamps(a.ctypes.data)
    print("==", path, b, s, k, h)
    for cta in ctas:
        t0 = a[cta, :, 0].min()
        f = lambda w, r, z: [int(a[cta, w, i] - z) if a[cta, w, i] >= t0 else None for i in r]
        print(cta, "phases", [f(w, range(6), t0) for w in range(4)])
        base = a[cta, 2, 12]
        if base > t0:
            for d in range(4):
                w = 2 + d % 2
                print("   block", d, "weights [start, copied, scores, max, maxed, done]", f(w, range(12 + 10 * d, 18 + 10 * d), base), "arrive 0,4,8", f(w, range(18 + 10 * d, 21 + 10 * d), base),
                      "out0 [idle, got, go, done]", f(0, range(12 + 10 * d, 16 + 10 * d), base), "out1", f(1, range(12 + 10 * d, 16 + 10 * d), base))
go(1, 1, 1024, 16); go(1, 1, 1024, 128); go(128, 1, 4096, 64); go(128, 1, 4096, 128); go(128, 2, 4096, 128)

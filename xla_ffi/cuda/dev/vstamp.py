D='@DIR@/cuda/sm90/decode/'
p=D+'kernel.cuh'
s=open(p).read()
def rep(old,new,n=1):
    global s
    assert s.count(old)>=1, old
    s=s.replace(old,new) if n==0 else s.replace(old,new,n)
rep('namespace mla {\n','''namespace mla {
__device__ long long g_stamps[132][3][40];
#define STAMPW(w, i) g_stamps[blockIdx.x][w][i] = clock64()
#define STAMP(i) do { if (threadIdx.x % 128 == 0) STAMPW(threadIdx.x / 128, i); } while (0)
#define STAMPP(i) do { if (block == item.begin + 8 || block == item.begin + 9) STAMP(10 + i); else if (block < item.begin + 2) STAMP(20 + i); } while (0)
''')
a=s.index('consume_even('); b=s.index('consume_odd('); c=s.index('// Writes the normalised output')
e=s[a:b]; o=s[b:c]; pre=s[:a]; rest=s[c:]
e=e.replace('      start_scores<0>','      STAMPP(0);\n      start_scores<0>').replace('      weigh<0>','      STAMPP(1);\n      weigh<0>').replace('      rescale(output, factor);\n      start_output<0, 0>','      STAMPP(2);\n      rescale(output, factor);\n      start_output<0, 0>')
e=e.replace('      finish(output, &shared.cache_empty[0][0]);','      finish(output, &shared.cache_empty[0][0]);\n      STAMPP(3);').replace('      clear_past_end<1, 0>','      STAMPP(4);\n      clear_past_end<1, 0>').replace('      finish(output, &shared.cache_empty[1][0]);','      finish(output, &shared.cache_empty[1][0]);\n      STAMPP(5);')
o=o.replace('      start_scores<1>','      STAMPP(0);\n      start_scores<1>').replace('      follow<0>','      STAMPP(1);\n      follow<0>').replace('      rescale(output, factor);\n      start_output<0, 1>','      STAMPP(2);\n      rescale(output, factor);\n      start_output<0, 1>').replace('      weigh<1>','      STAMPP(3);\n      weigh<1>').replace('      finish(output, &shared.cache_empty[0][1]);\n      clear','      STAMPP(4);\n      finish(output, &shared.cache_empty[0][1]);\n      STAMPP(5);\n      clear').replace('      finish(output, &shared.cache_empty[1][1]);','      finish(output, &shared.cache_empty[1][1]);\n      STAMPP(6);')
pre=pre.replace('      ptx::mbarrier_wait(&shared.cache_full[kBuffer][piece], parity);','      ptx::mbarrier_wait(&shared.cache_full[kBuffer][piece], parity);\n      if (kBuffer == 1 && block == item.begin + 9 && threadIdx.x % 128 == 0) STAMPW(1, 30 + piece);\n      if (kBuffer == 0 && block == item.begin + 8 && threadIdx.x % 128 == 0) STAMPW(0, 30 + piece);')
pre=pre.replace('''        ptx::mbarrier_wait(&shared.cache_empty[buffer][kHalf], parity);
''','''        ptx::mbarrier_wait(&shared.cache_empty[buffer][kHalf], parity);
        if (block == item.begin + 8 || block == item.begin + 9) STAMPW(2, 10 + 10 * kHalf + 2 * (block - item.begin - 8));
''').replace('        if (block + 1 < item.end) find_pages','        if (block == item.begin) STAMPW(2, 4 + kHalf);\n        if (block == item.begin + 8 || block == item.begin + 9) STAMPW(2, 11 + 10 * kHalf + 2 * (block - item.begin - 8));\n        if (block + 1 < item.end) find_pages')
pre=pre.replace('      find_pages(item.begin);\n','      STAMPW(2, 2 + kHalf);\n      find_pages(item.begin);\n')
s=pre+e+o+rest
rep('  if (warp == 8) {\n    if (threadIdx.x % 32 == 0) {','  STAMP(0);\n  if (warp == 8) {\n    if (threadIdx.x % 32 == 0) {')
rep('  // 168 registers a thread','  STAMP(1);\n  // 168 registers a thread')
rep('      if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(&shared.query_empty);','      STAMP(2);\n      if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(&shared.query_empty);')
rep('      announce_partial(','      STAMP(3);\n      announce_partial(')
rep('      combine<T, kCtas>(args','      STAMP(4);\n      combine<T, kCtas>(args')
rep('  // Nobody leaves while','  STAMP(9);\n  // Nobody leaves while')
open(p,'w').write(s)
p=D+'combine.cuh'
c=open(p).read()
c=c.replace('namespace mla {\n','namespace mla {\n__device__ long long g_cstamps[132][3][40];\n#define CST(i) do { if (threadIdx.x % 128 == 0) g_cstamps[blockIdx.x][threadIdx.x / 128][i] = clock64(); } while (0)\n',1)
assert '  find_factors(c, share == 0);\n' in c
c=c.replace('  find_factors(c, share == 0);\n','  CST(5);\n  find_factors(c, share == 0);\n  CST(6);\n')
open(p,'w').write(c)
p=D+'launch.cu'
l=open(p).read()
l+='''
extern "C" void mla_stamps(long long* a, long long* b) { cudaMemcpyFromSymbol(a, mla::g_stamps, sizeof(mla::g_stamps)); cudaMemcpyFromSymbol(b, mla::g_cstamps, sizeof(mla::g_cstamps)); }
'''
open(p,'w').write(l)

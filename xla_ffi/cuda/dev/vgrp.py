p='@DIR@/cuda/sm90/decode/kernel.cuh'; s=open(p).read()
old=s[s.index("      if (block < item.begin + 2) ptx::mbarrier_wait(&shared.query_full[piece]"):s.index("      wgmma::fence();\n#pragma unroll\n      for (int k = 0; k < 4; ++k) {\n        const int offset")]
s=s.replace(old,'''      if (piece == 0 || piece == 4) {
        for (int i = piece; i < (piece == 0 ? 4 : kPieces); ++i) {
          if (block < item.begin + 2) ptx::mbarrier_wait(&shared.query_full[i], item.parity);
          ptx::mbarrier_wait(&shared.cache_full[kBuffer][i], parity);
        }
      }
''')
open(p,'w').write(s)

#include <barrier>
#include <thread>
#include <vector>
#include <cstdio>
#include <cstdint>
#include <algorithm>
#include <random>
#define __device__
#define __forceinline__ inline
using std::min; using std::max;
struct Idx{int x;}; thread_local Idx threadIdx;
std::barrier<> bar(32);
int xch[32];
template<class F> int coll(int v, F f){ xch[threadIdx.x]=v; bar.arrive_and_wait(); int r=f(); bar.arrive_and_wait(); return r;}
int __reduce_add_sync(unsigned,int v){return coll(v,[]{int s=0;for(int x:xch)s+=x;return s;});}
int __reduce_max_sync(unsigned,int v){return coll(v,[]{int s=-1<<30;for(int x:xch)s=max(s,x);return s;});}
int __shfl_up_sync(unsigned,int v,int d){return coll(v,[=]{int l=threadIdx.x;return l>=d?xch[l-d]:xch[l];});}
int __shfl_sync(unsigned,int v,int s){return coll(v,[=]{return xch[s];});}
void __syncwarp(){bar.arrive_and_wait();}
int __ldg(const int*p){return *p;}
#include "../sm90/decode/schedule.cuh"
using namespace mla;
int main(int argc,char**argv){
  std::mt19937 rng(1);
  std::vector<std::vector<int>> cases;
  for(int b: {1,4,16,128}) for(int k:{1024,4096}) cases.push_back(std::vector<int>(b,k));
  cases.push_back({128,100});
  for(int t=0;t<20;t++){int b=1+rng()%300; int m=1+rng()%20000; std::vector<int> v(b); for(int&x:v)x=rng()%m; cases.push_back(v);}
  for(auto&lens:cases) for(int parts:{132,66,33}){
    int b=lens.size(); std::vector<std::vector<int>> cov(b); int mx=0; double tot=0; int bad=0, items=0;
    std::vector<int> n(b); for(int i=0;i<b;i++){n[i]=sequence_blocks(lens[i]);cov[i].assign(n[i],-1);tot+=n[i];}
    std::vector<Part> P(parts);
    for(int p=0;p<parts;p++){
      std::vector<std::thread> th; Part& r=P[p];
      for(int l=0;l<32;l++) th.emplace_back([&,l]{threadIdx.x=l; find_part(lens.data(),b,1<<30,p,parts,&r);});
      for(auto&t:th)t.join();
      int c=0;
      for(int s=r.begin_seq;s<=r.end_seq;s++){int e=s==r.end_seq?r.end_block:n[s];int bg=s==r.begin_seq?r.begin_block:0; items++; if(e<=bg)bad++; for(int k=bg;k<e;k++){ if(s<0||s>=b||k>=n[s]||cov[s][k]!=-1)bad++; else cov[s][k]=p; c++;}}
      mx=max(mx,c);
    }
    for(int i=0;i<b;i++) for(int k=0;k<n[i];k++) if(cov[i][k]<0) bad++;
    // first/last parts
    for(int p=0;p<parts;p++){Part&r=P[p]; if(r.end_seq<r.begin_seq)continue; if(r.end_seq_first_part!=cov[r.end_seq][0]||r.end_seq_last_part!=cov[r.end_seq].back()) bad++; if(r.begin_seq_first_part!=cov[r.begin_seq][0])bad++;}
    printf("b %d n0 %d parts %d: max %d ideal %.2f items %d bad %d\n",b,n[0],parts,mx,tot/parts,items,bad);
    if(bad&&argc>1){for(int p=0;p<5;p++)printf("  part %d: %d.%d - %d.%d\n",p,P[p].begin_seq,P[p].begin_block,P[p].end_seq,P[p].end_block);}
  }
}

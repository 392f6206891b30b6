// y[M, N] = x[M, K] @ dequantized(W)[N, K]^T for 16-64 rows M on Hopper, through wgmma: decoded weights are the A operand
// in registers, x is the B operand in shared memory.
//
// A CTA owns WR blocks of 64 rows; WK warpgroups split its k range, SPLIT CTAs split k through a workspace. The grid
// must fit the device in one wave: the CTAs of a split wait for each other. Sums are taken in a fixed order.
#include "common.cuh"
#ifndef MT
#define MT 4  // tiles of 8 tokens: 2, 3, 4, 6 or 8
#endif
#include "wgmma.cuh"

#ifndef LORA
#define LORA 0  // 4: a warpgroup is added to compute LoRA's v = A x
#endif
#if LORA
#include "lora.cuh"
#endif

#ifndef KB
#define KB 64  // k blocks of 64
#endif
#ifndef SPLIT
#define SPLIT 1  // CTAs along k
#endif
#ifndef WR
#define WR 4  // warpgroups along rows
#endif
#ifndef WK
#define WK 1  // warpgroups along k
#endif
#ifndef P
#define P 4  // units a warpgroup keeps in flight; even
#endif
#ifndef AB
#define AB 2  // sets of decoded fragments a warpgroup holds; 1 leaves the overlap to the other warpgroups
#endif
#ifndef XC
#define XC 4  // k blocks of a chunk of x; a multiple of WK
#endif
#ifndef NBUF
#define NBUF 3  // chunks of x in shared memory: 2 or 3
#endif

constexpr int NUM_THREADS = WR * WK * 128;
constexpr int ROWS = WR * 64;                       // of one CTA
constexpr int KBC = (KB + SPLIT - 1) / SPLIT;       // k blocks of one CTA
constexpr int UNITS = (KBC + WK - 1) / WK;          // k blocks of one warpgroup
constexpr int CHUNKS = (KBC + XC - 1) / XC;
constexpr int CHUNK_UNITS = XC / WK;                // units of one warpgroup in a chunk
constexpr int CHUNK_BYTES = XC * MT * 1024;
constexpr int BUFFERS = CHUNKS < NBUF ? CHUNKS : NBUF;
constexpr int PASS_ROWS = NUM_THREADS / 8;          // rows of 128 bytes that all threads copy at once
constexpr int PASS_K = PASS_ROWS / (MT * 8);        // the same in k blocks
constexpr bool EVEN_CHUNKS = KB % SPLIT == 0 && KBC % XC == 0;
constexpr int SUM_STRIDE = ROWS + 4;
constexpr bool EVEN = KB % SPLIT == 0 && KBC % WK == 0;
static_assert(P % AB == 0 && XC % WK == 0, "units alternate between sets of fragments");

#if LORA
// Sixteen warps and four more get 96 registers each; the four give some to the sixteen.
constexpr bool MOVE_REGISTERS = NUM_THREADS == 512;
#endif

DEVICE void sync_multiplying() {
  if (LORA)
    asm volatile("bar.sync 1,%0;" ::"n"(NUM_THREADS) : "memory");
  else
    __syncthreads();
}

// Waits until all SPLIT CTAs of a group have arrived; the counter is zero again after the last has left.
DEVICE void split_arrive_and_wait(u32 *counter) {
  u32 seen;
  asm volatile("red.release.gpu.global.add.u32 [%0],1;" ::"l"(counter) : "memory");
  do {
    asm volatile("ld.acquire.gpu.global.u32 %0,[%1];" : "=r"(seen) : "l"(counter) : "memory");
  } while (seen < SPLIT);
}
DEVICE void split_leave(u32 *counter) {
  u32 before;
  asm volatile("atom.add.acq_rel.gpu.global.u32 %0,[%1],1;" : "=r"(before) : "l"(counter) : "memory");
  if (before == 2 * SPLIT - 1) asm volatile("st.relaxed.gpu.global.u32 [%0],0;" ::"l"(counter) : "memory");
}

// Shared memory: table | two chunks of x; the reduction reuses it from the start.
extern "C" __global__ void __launch_bounds__(NUM_THREADS + LORA * 32, 1)
    nf4_wgmma(const u8 *__restrict__ weight, const u16 *__restrict__ x, u16 *__restrict__ y,
              const u16 *__restrict__ bias, int m, int n, int num_blocks, float gain, float4 *workspace,
              u32 *counters
#if LORA
              ,
              const __grid_constant__ LoraArgs lora, int lora_offset
#endif
    ) {
  extern __shared__ __align__(1024) u8 shared[];
  check_table(shared);
  const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5, g = lane >> 2, t = lane & 3;
  const int w4 = warp & 3, wr = (warp >> 2) % WR, wk = (warp >> 2) / WR;
  const int split = blockIdx.x % SPLIT, group = blockIdx.x / SPLIT;
  const int num_k = SPLIT == 1 ? KB : min(KBC, KB - split * KBC);
  allow_next_launch();

#if LORA
  LoraBatch *batch = (LoraBatch *)(shared + lora_offset);  // then the shrink's scratch
  if (warp >= NUM_THREADS / 32) {
    if (MOVE_REGISTERS) asm volatile("setmaxnreg.dec.sync.aligned.u32 64;");
    lora_warps<MT, LORA, KB * 64, NUM_THREADS>(lora, x, batch, thread - NUM_THREADS, m, group * ROWS, ROWS, n, blockIdx.x,
                                               gridDim.x);
    return;
  }
  if (MOVE_REGISTERS) asm volatile("setmaxnreg.inc.sync.aligned.u32 104;");
#endif

  // The stream of weights starts before anything else: it depends on no other launch.
  const int block = min(group * WR + wr, num_blocks - 1);
  const u8 *unit = weight + ((size_t)block * KB + (size_t)split * KBC + wk) * UNIT_BYTES;
  const u8 *codes_at = unit + w4 * 512 + lane * 16;
  const u8 *scales_at = unit + UNIT_CODES + g * 16 + w4 * 4;
  uint4 codes[P];
  u32 scales[P];
  auto load = [&](int slot, int first, int ahead) {  // unit first + ahead of this warpgroup; codes_at points at first
    if (EVEN || (first + ahead) * WK + wk < num_k) {
      codes[slot] = load_stream16(codes_at + ahead * (WK * UNIT_BYTES));
      scales[slot] = load_stream4(scales_at + ahead * (WK * UNIT_BYTES));
    } else {
      codes[slot] = make_uint4(0, 0, 0, 0), scales[slot] = 0;
    }
  };
#pragma unroll
  for (int p = 0; p < P; p++)
    if (p < UNITS) load(p, 0, p);
  fill_table(shared, thread, NUM_THREADS);
  wait_previous_launch();

  // x in shared memory: for each k block, rows of 128 bytes (64 k) of each token in the 128-byte swizzle of wgmma: piece c
  // (16 bytes) of token i lies at c ^ (i % 8).
  const u32 staged = shared_address(shared) + TABLE_BYTES;
  const int x_token = (thread >> 3) % (MT * 8), x_k = (thread >> 3) / (MT * 8);
  const u32 x_to = staged + (x_k * MT * 8 + x_token) * 128 + (((thread ^ x_token) & 7) << 4);
  const u32 x_from = min(x_token, m - 1) * (KB * 128) + (split * KBC + x_k) * 128 + (thread & 7) * 16;
  auto fetch = [&](int chunk) {
    const u32 to = x_to + chunk % BUFFERS * CHUNK_BYTES;
    const u32 from = x_from + chunk * (XC * 128);
    if (PASS_K > 0) {  // a pass of all threads brings whole k blocks
#pragma unroll
      for (int k = 0; k < XC; k += PASS_K) {
        const int over = EVEN_CHUNKS ? 0 : max(0, chunk * XC + k + x_k - (num_k - 1));  // repeats the last block
        if (x_k < PASS_K && (XC % PASS_K == 0 || k + x_k < XC))
          copy_async16(to + k * (MT * 1024), (const u8 *)x + from + (k - over) * 128);
      }
    } else {
#pragma unroll
      for (int k = 0; k < XC; k++)
#pragma unroll
        for (int token = 0; token < MT * 8; token += PASS_ROWS) {
          const int over = EVEN_CHUNKS ? 0 : max(0, chunk * XC + k - (num_k - 1));
          const int skip = min(x_token + token, m - 1) - min(x_token, m - 1);
          if (x_token + token < MT * 8)
            copy_async16(to + (k * MT * 8 + token) * 128, (const u8 *)x + from + (k - over) * 128 + skip * (KB * 128));
        }
    }
    copy_async_commit();
  };
  auto publish = [&]() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    sync_multiplying();
  };
#pragma unroll
  for (int chunk = 0; chunk < BUFFERS - 1 || chunk == 0; chunk++) fetch(chunk);
  copy_async_wait<(BUFFERS > 2 ? 1 : 0)>();
  publish();

  const u32 lane4 = lane * 4;
  auto decode = [&](const uint4 &v, u32 *a) {
#pragma unroll
    for (int s = 0; s < 4; s++) decode4_spread(word_at(v, s), lane4, a + 4 * s);
  };
  u32 a[AB][16];
  float acc[MT][4];
#pragma unroll
  for (int mt = 0; mt < MT; mt++)
#pragma unroll
    for (int j = 0; j < 4; j++) acc[mt][j] = 0.f;
  if (AB == 2) decode(codes[0], a[0]);
  if (BUFFERS > 1) fetch(BUFFERS - 1);

  const u64 layout = ((u64)1 << 62) | ((u64)(1024 >> 4) << 32) | ((u64)1 << 16);  // 128-byte swizzle, 8 tokens apart 1,024
  int chunk = 0, in_chunk = 0;
  u32 x_at = staged + wk * (MT * 1024);

  // Unit first + p, whose codes are in slot p; refills the slot with the unit P later.
  auto step = [&](int first, int p, bool refill) {
    constexpr bool anywhere = CHUNK_UNITS % P != 0 && P % CHUNK_UNITS != 0;
    if (CHUNKS > 1 && (anywhere || p % CHUNK_UNITS == 0) && in_chunk == CHUNK_UNITS) {
      copy_async_wait<(BUFFERS > 2 ? 1 : 0)>();
      publish();  // everyone is done with this chunk, and the next one is complete
      in_chunk = 0;
      chunk++;
      x_at = staged + chunk % BUFFERS * CHUNK_BYTES + wk * (MT * 1024);
      if (chunk + BUFFERS - 1 < CHUNKS)
        fetch(chunk + BUFFERS - 1);
      else
        copy_async_commit();
    }
    float c[MT][4];
#pragma unroll
    for (int mt = 0; mt < MT; mt++)
#pragma unroll
      for (int j = 0; j < 4; j++) asm volatile("" : "=f"(c[mt][j]));
    const float2 f = half2_to_float2(scales[p]);
    if (AB == 1) {
      decode(codes[p], a[0]);
      if (refill) load(p, first, p + P);
    }
    const u64 b = layout | (u64)(x_at >> 4);
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
    for (int s = 0; s < 4; s++) wgmma(c, a[p % AB] + 4 * s, b + s * 2, s > 0);
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    in_chunk++;
    x_at += WK * (MT * 1024);
    if (AB == 2) {
      if (refill) load(p, first, p + P);
      decode(codes[(p + 1) % P], a[(p + 1) % AB]);
    }
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
    for (int mt = 0; mt < MT; mt++) {
#pragma unroll
      for (int j = 0; j < 4; j++) asm volatile("" : "+f"(c[mt][j])::"memory");
      acc[mt][0] += f.x * c[mt][0], acc[mt][1] += f.x * c[mt][1];
      acc[mt][2] += f.y * c[mt][2], acc[mt][3] += f.y * c[mt][3];
    }
  };
  int units;  // UNITS, unknown to the compiler: branches between units keep it from hoisting until registers spill
  asm volatile("mov.u32 %0,%1;" : "=r"(units) : "n"(UNITS));
#pragma unroll 1
  for (int first = 0; first < units; first += P) {
#pragma unroll
    for (int p = 0; p < P; p++)
      if (first + p < units) step(first, p, first + P + p < units);
    codes_at += P * WK * UNIT_BYTES, scales_at += P * WK * UNIT_BYTES;
  }

#if LORA
  named_sync<LORA_PREPARED, NUM_THREADS + LORA * 32>();
  lora_expand<1, MT>(&acc, lora, batch, block * 64 + w4 * 16, n, 1.f / gain, split * WK + wk, SPLIT * WK,
                     named_sync<LORA_COLLECTED, NUM_THREADS + LORA * 32>);
#endif
  // Reduction over the warpgroups along k, [k][token][row], then over the split.
  float *sums = (float *)shared;
  sync_multiplying();
#pragma unroll
  for (int mt = 0; mt < MT; mt++) {
    float *to = sums + (wk * MT * 8 + mt * 8 + 2 * t) * SUM_STRIDE + wr * 64 + w4 * 16 + g;
    to[0] = acc[mt][0], to[SUM_STRIDE] = acc[mt][1], to[8] = acc[mt][2], to[SUM_STRIDE + 8] = acc[mt][3];
  }
  sync_multiplying();
  constexpr int QUADS = ROWS / 4;
  float4 *own = workspace + (size_t)blockIdx.x * MT * 8 * QUADS;
  for (int i = thread; i < m * QUADS; i += NUM_THREADS) {
    const int token = i / QUADS, quad = i % QUADS;
    float4 v = *(const float4 *)(sums + token * SUM_STRIDE + quad * 4);
#pragma unroll
    for (int k = 1; k < WK; k++) v = add4(v, *(const float4 *)(sums + (k * MT * 8 + token) * SUM_STRIDE + quad * 4));
    if (SPLIT > 1)
      __stcg(own + i, v);
    else
      store_y4(y, bias, gain, n, token, group * ROWS + quad * 4, v);
  }
  if (SPLIT > 1) {
    u32 *counter = counters + group * 8;
    sync_multiplying();
    if (thread == 0) split_arrive_and_wait(counter);
    sync_multiplying();
    const float4 *parts = workspace + (size_t)group * SPLIT * MT * 8 * QUADS;
    for (int i = split * NUM_THREADS + thread; i < m * QUADS; i += SPLIT * NUM_THREADS) {
      float4 v[SPLIT];
#pragma unroll
      for (int k = 0; k < SPLIT; k++) v[k] = __ldcg(parts + (size_t)k * MT * 8 * QUADS + i);
#pragma unroll
      for (int k = 1; k < SPLIT; k++) v[0] = add4(v[0], v[k]);
      store_y4(y, bias, gain, n, i / QUADS, group * ROWS + i % QUADS * 4, v[0]);
    }
    if (thread == 0) split_leave(counter);
  }
}

// y[M, N] = x[M, K] @ dequantized(W)[N, K]^T for few rows M, through mma.sync: the weights are the A operand and go from
// device memory through registers and the pair table straight into the tensor cores; tokens are the columns, 8 a tile.
//
// A CTA owns WR * R tiles of 16 rows; its warps split k WK ways, a cluster of CL CTAs splits k again. Partial sums meet
// in shared memory in a fixed order: results are the same on every run.
#include "common.cuh"

#ifndef LORA
#define LORA 0  // warps that each CTA adds for LoRA, to make v = A x
#endif
#if LORA
#include "lora_beside.cuh"
#define EPILOGUE(token) lora_epilogue(batch, token)
#else
#define EPILOGUE(token) nullptr
#endif

#ifndef MT
#define MT 1  // tiles of 8 tokens
#endif
#ifndef KB
#define KB 64  // k blocks of 64
#endif
#ifndef R
#define R 2  // 16-row tiles a warp
#endif
#ifndef CL
#define CL 1  // CTAs of a cluster, along k
#endif
#ifndef WR
#define WR 1  // warps along rows
#endif
#ifndef WK
#define WK 8  // warps along k
#endif
#ifndef P
#define P 2  // units a warp keeps in flight
#endif
#ifndef DX
#define DX 0  // 1: every warp streams the x it needs; 0: the CTA stages x once
#endif
#ifndef XCH
#define XCH 1  // staged x arrives in this many chunks along k, each of at least WK blocks
#endif

constexpr int NUM_THREADS = WR * WK * 32;  // that multiply
constexpr int ROWS = WR * R * 16;           // of one CTA
constexpr int KBC = (KB + CL - 1) / CL;     // k blocks of one CTA
constexpr int UNITS = (KBC + WK - 1) / WK;  // k blocks of one warp
constexpr bool EVEN = KB % CL == 0 && KBC % WK == 0;
constexpr int X_STRIDE = KBC * 128 + 16;  // bytes of a staged token; the 16 spread tokens over banks
constexpr int X_CHUNK = (KBC + XCH - 1) / XCH;
constexpr int SUM_STRIDE = ROWS + 4;  // floats of a token in the reduction

struct Scales {
  u32 w[R];
};
DEVICE Scales load_scales(const u8 *p) {
  Scales s;
#if R == 4
  uint4 v = load_stream16(p);
  s.w[0] = v.x, s.w[1] = v.y, s.w[2] = v.z, s.w[3] = v.w;
#elif R == 2
  uint2 v = load_stream8(p);
  s.w[0] = v.x, s.w[1] = v.y;
#else
  s.w[0] = load_stream4(p);
#endif
  return s;
}

DEVICE void sync_multiplying() {
  if (LORA)
    asm volatile("bar.sync 1,%0;" ::"n"(NUM_THREADS) : "memory");
  else
    __syncthreads();
}

// After everyone's wait for the cluster: a warp that arrives again before another has waited would hold that one for ever.
DEVICE void sync_all() {
  asm volatile("bar.sync 5,%0;" ::"n"(NUM_THREADS + LORA * 32) : "memory");
}

// Shared memory: table | staged x | chunk barriers; the reduction reuses it from the start; cluster parts lie behind.
extern "C" __global__ void __launch_bounds__(NUM_THREADS + LORA * 32, 1)
    nf4_mma(const u8 *__restrict__ weight, const u16 *__restrict__ x, u16 *__restrict__ y,
            const u16 *__restrict__ bias, int m, int n, int num_tiles, float gain, int receive_offset
#if LORA
            ,
            const __grid_constant__ LoraArgs lora, int lora_offset
#endif
    ) {
  extern __shared__ __align__(1024) u8 shared[];
  const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5, g = lane >> 2, t = lane & 3;
  const int wr = warp % WR, wk = warp / WR;
  const int rank = blockIdx.x % CL, group = blockIdx.x / CL;
  const int num_k = CL == 1 ? KB : min(KBC, KB - rank * KBC);
  allow_next_launch();
  if (CL > 1) cluster_arrive_relaxed();
#if LORA
  LoraBatch *batch = (LoraBatch *)(shared + lora_offset);  // then the shrink's scratch
  if (warp >= WR * WK) {
    lora_warps_beside<MT, LORA, KB * 64, NUM_THREADS>(lora, x, batch, thread - NUM_THREADS, m, group * ROWS, ROWS, n,
                                                      blockIdx.x, gridDim.x);
    if (CL > 1) {
      cluster_wait();
      sync_all();
      cluster_arrive();
      cluster_wait();
    }
    return;
  }
#endif

  // The stream of weights starts before anything else: it depends on no other launch.
  const int first_tile = min((group * WR + wr) * R, num_tiles - R);
  const u8 *unit = weight + ((size_t)(first_tile / 4) * KB + (size_t)rank * KBC + wk) * UNIT_BYTES;
  const u8 *codes_at = unit + (first_tile % 4) * 512 + lane * 16;
  const u8 *scales_at = unit + UNIT_CODES + g * 16 + (first_tile % 4) * 4;
  uint4 codes[P][R];
  Scales scales[P];
  int k_load = wk;
  auto load = [&](int p) {
    if (EVEN || k_load < num_k) {
#pragma unroll
      for (int r = 0; r < R; r++) codes[p][r] = load_stream16(codes_at + r * 512);
      scales[p] = load_scales(scales_at);
    } else {
#pragma unroll
      for (int r = 0; r < R; r++) codes[p][r] = make_uint4(0, 0, 0, 0), scales[p].w[r] = 0;
    }
    codes_at += WK * UNIT_BYTES, scales_at += WK * UNIT_BYTES, k_load += WK;
  };
#pragma unroll
  for (int p = 0; p < P; p++)
    if (p < UNITS) load(p);

  fill_table(shared, thread, NUM_THREADS);
  u8 *staged = shared + TABLE_BYTES;
  const u32 chunk_bar = shared_address(staged) + (m * X_STRIDE);
  if (!DX && thread == 0) {
    for (int c = 0; c < XCH; c++) barrier_init(chunk_bar + 8 * c, 1);
    barrier_init_done();
  }
  sync_multiplying();
  wait_previous_launch();

  // x in shared memory: rows of 64 k x 16 bits (eight 16-byte pieces) for each token and k block; load_matrix4 turns two
  // k16 steps of 8 tokens into B fragments.
#if DX
  // Every warp keeps its own ring of P k blocks; piece c of token i lies at c ^ (i % 8), which spreads rows over banks.
  const u32 ring = shared_address(staged) + warp * (P * MT * 1024);
  int k_x = wk;
  auto load_x = [&](int p) {
    const int k = EVEN ? k_x : min(k_x, num_k - 1);
    const u8 *from = (const u8 *)x + (size_t)(rank * KBC + k) * 128 + (lane & 7) * 16;
#pragma unroll
    for (int j = 0; j < MT * 2; j++) {
      const int token = j * 4 + (lane >> 3);
      copy_async16(ring + p * (MT * 1024) + token * 128 + (((lane ^ token) & 7) << 4),
                   from + (size_t)min(token, m - 1) * (KB * 128));
    }
    k_x += WK;
  };
#pragma unroll
  for (int p = 0; p < P; p++) {
    if (p < UNITS) load_x(p);
    copy_async_commit();
  }
#else
  if (warp == 0) {
#pragma unroll 1
    for (int c = 0; c < XCH; c++) {
      const int k0 = c * X_CHUNK, bytes = max(0, min(X_CHUNK, num_k - k0)) * 128;
      if (lane == 0) barrier_expect(chunk_bar + 8 * c, m * bytes);
      __syncwarp();
      if (bytes)
        for (int token = lane; token < m; token += 32)
          bulk_copy(shared_address(staged) + token * X_STRIDE + k0 * 128,
                    (const u8 *)x + (size_t)token * (KB * 128) + (size_t)(rank * KBC + k0) * 128, bytes,
                    chunk_bar + 8 * c);
    }
  }
  u32 x_at[MT];
#pragma unroll
  for (int mt = 0; mt < MT; mt++)
    x_at[mt] = shared_address(staged) + min(mt * 8 + (lane & 7), m - 1) * X_STRIDE + (lane >> 3) * 16;
  int chunk = 0, k_ready = 0;
#endif

  const u32 lane4 = table_lane(shared, lane);
  float acc[R][MT][4];
#pragma unroll
  for (int r = 0; r < R; r++)
#pragma unroll
    for (int mt = 0; mt < MT; mt++)
#pragma unroll
      for (int j = 0; j < 4; j++) acc[r][mt][j] = 0.f;

  // One unit (16 * R rows x 64 k) from register slot p, which is refilled first.
  auto step = [&](int p, int i, bool refill) {
    uint4 c4[R];
    uint4 xb[MT][2];
    const Scales s = scales[p];
#pragma unroll
    for (int r = 0; r < R; r++) c4[r] = codes[p][r];
    if (refill) load(p);
#if DX
    copy_async_wait<P - 1>();
    __syncwarp();  // also keeps the loads above before the arithmetic
#pragma unroll
    for (int mt = 0; mt < MT; mt++)
#pragma unroll
      for (int h = 0; h < 2; h++)
        xb[mt][h] = load_matrix4(ring + p * (MT * 1024) + mt * 1024 + (lane & 7) * 128 +
                                 (((h * 4 + (lane >> 3)) ^ (lane & 7)) << 4));
    if (refill) {
      __syncwarp();
      load_x(p);
    }
    copy_async_commit();
#else
    __syncwarp();  // keeps the loads above before the arithmetic
    const int k = EVEN ? i * WK + wk : min(i * WK + wk, num_k - 1);
    while (k >= k_ready) {  // a loop, so that units stay apart: mixed, they take registers and time
      barrier_wait(chunk_bar + 8 * chunk, 0);
      chunk++, k_ready += X_CHUNK;
    }
#pragma unroll
    for (int mt = 0; mt < MT; mt++)
#pragma unroll
      for (int h = 0; h < 2; h++) xb[mt][h] = load_matrix4(x_at[mt] + k * 128 + h * 64);
#endif
#pragma unroll
    for (int r = 0; r < R; r++) {
      float c[MT][4];
#pragma unroll
      for (int mt = 0; mt < MT; mt++) c[mt][0] = c[mt][1] = c[mt][2] = c[mt][3] = 0.f;
#pragma unroll
      for (int q = 0; q < 4; q++) {
        u32 a[4];
        decode4(word_at(c4[r], q), lane4, a);
#pragma unroll
        for (int mt = 0; mt < MT; mt++)
          mma16816(c[mt], a[0], a[1], a[2], a[3], word_at(xb[mt][q >> 1], (2 * q) & 3),
                   word_at(xb[mt][q >> 1], (2 * q + 1) & 3));
      }
      const float2 f = half2_to_float2(s.w[r]);
#pragma unroll
      for (int mt = 0; mt < MT; mt++) {
        acc[r][mt][0] += f.x * c[mt][0], acc[r][mt][1] += f.x * c[mt][1];
        acc[r][mt][2] += f.y * c[mt][2], acc[r][mt][3] += f.y * c[mt][3];
      }
    }
  };
  // Straight-line rounds: the compiler overlaps one unit's look-ups with the arithmetic of the one before.
  constexpr int REFILLED = UNITS > P ? (UNITS - P) / P : 0;  // rounds in which every slot is refilled
#pragma unroll 1
  for (int round = 0; round < REFILLED; round++)
#pragma unroll
    for (int p = 0; p < P; p++) step(p, round * P + p, true);
#pragma unroll
  for (int q = 0; q < UNITS - REFILLED * P; q++) step(q % P, REFILLED * P + q, REFILLED * P + q + P < UNITS);

#if LORA
  named_sync<LORA_PREPARED, NUM_THREADS + LORA * 32>();
  lora_expand<R, MT>(acc, lora, batch, (group * WR + wr) * 16 * R, n, 1.f / gain, rank * WK + wk, CL * WK,
                     named_sync<LORA_COLLECTED, NUM_THREADS + LORA * 32>);
#endif
  // Reduction over the warps along k: [k][token][row].
  float *sums = (float *)shared;
  if (CL > 1) cluster_wait();
  if (CL > 1)
    sync_all();
  else
    sync_multiplying();
#pragma unroll
  for (int r = 0; r < R; r++)
#pragma unroll
    for (int mt = 0; mt < MT; mt++) {
      float *to = sums + (wk * MT * 8 + mt * 8 + 2 * t) * SUM_STRIDE + (wr * R + r) * 16 + g;
      to[0] = acc[r][mt][0], to[SUM_STRIDE] = acc[r][mt][1];
      to[8] = acc[r][mt][2], to[SUM_STRIDE + 8] = acc[r][mt][3];
    }
  sync_multiplying();
  constexpr int QUADS = ROWS / 4, OWN = QUADS / CL;
  const int first_row = group * ROWS;
  float4 *receive = (float4 *)(shared + receive_offset);  // [rank][token][own quads]
  for (int i = thread; i < m * QUADS; i += NUM_THREADS) {
    const int token = i / QUADS, quad = i % QUADS;
    float4 v = *(const float4 *)(sums + token * SUM_STRIDE + quad * 4);
#pragma unroll
    for (int k = 1; k < WK; k++) v = add4(v, *(const float4 *)(sums + (k * MT * 8 + token) * SUM_STRIDE + quad * 4));
    if (CL > 1)
      store_cluster16(shared_address(receive + (rank * MT * 8 + token) * OWN + quad % OWN), quad / OWN, v);
    else
      store_y4(y, bias, gain, n, token, first_row + quad * 4, v, EPILOGUE(token));
  }
  if (CL > 1) {
    cluster_arrive();
    cluster_wait();
    for (int i = thread; i < m * OWN; i += NUM_THREADS) {
      const int token = i / OWN, quad = i % OWN;
      float4 v = receive[token * OWN + quad];
#pragma unroll
      for (int c = 1; c < CL; c++) v = add4(v, receive[(c * MT * 8 + token) * OWN + quad]);
      store_y4(y, bias, gain, n, token, first_row + (rank * OWN + quad) * 4, v, EPILOGUE(token));
    }
  }
}

// y[M, N] = x[M, K] @ dequantized(W)[N, K]^T for up to 64 rows M on Hopper, through wgmma: decoded weights are the A
// operand in registers, x is the B operand in shared memory.
//
// A CTA owns WR blocks of 64 rows; WK warpgroups split its k range, SPLIT CTAs split k through a workspace. Two CTAs of a
// cluster may own SHARE of their blocks together, each half of k, so that work divides more evenly. One more warpgroup
// keeps a ring of STAGES stages filled, each XC k blocks of weights and of x, by bulk copies: nothing in the main loop
// waits for all warps. The grid must fit the device in one wave where SPLIT > 1: the CTAs of a split wait for each other.
// Sums are taken in a fixed order.
#include "common.cuh"
#ifndef MT
#define MT 4  // tiles of 8 tokens: 2, 3, 4, 6 or 8
#endif
#include "wgmma.cuh"

#ifndef LORA
#define LORA 0  // 3: the copying warpgroup's other warps collect v = A x
#endif
#if LORA
#include "lora.cuh"
#include "lora_expand_staged.cuh"
#define EPILOGUE(token) lora_epilogue(batch, token)
#else
#define EPILOGUE(token) nullptr
#endif
#include "ring.cuh"

constexpr int SUM_STRIDE = ROWS + 4;

// 16 bytes to the same place in the pair's second CTA, counted by its barrier.
DEVICE void send(u32 to, u32 bar, float4 v) {
  asm volatile(
      "{.reg .b32 p,q; mapa.shared::cluster.u32 p,%0,1; mapa.shared::cluster.u32 q,%1,1; "
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [p],{%2,%3,%4,%5},[q];}" ::"r"(to),
      "r"(bar), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w)
      : "memory");
}
// A value that the compiler keeps rather than computing it again.
DEVICE u32 opaque(u32 v) {
  asm volatile("" : "+r"(v));
  return v;
}
DEVICE void sync_multiplying() { asm volatile("bar.sync 1,%0;" ::"n"(NUM_THREADS) : "memory"); }

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

// Shared memory: table | ring | barriers | what the pair's other CTA sends; the reduction reuses it from the start.
extern "C" __global__ void __launch_bounds__(NUM_THREADS + 128, 1)
    nf4_ring(const u8 *__restrict__ weight, const __grid_constant__ TensorMap x_map, u16 *__restrict__ y,
             const u16 *__restrict__ bias, int m, int n, int num_blocks, float gain, float4 *workspace, u32 *counters
#if LORA
             ,
             const __grid_constant__ LoraArgs lora, int lora_offset
#endif
    ) {
  extern __shared__ __align__(1024) u8 shared[];
  const int thread = threadIdx.x, lane = thread & 31, g = lane >> 2, t = lane & 3;
  const int warp = __shfl_sync(~0u, thread >> 5, 0);  // uniform, so that addresses of tiles stay in uniform registers
  const u32 ring = shared_address(shared) + RING_AT, full = shared_address(shared) + BARRIERS_AT, empty = full + STAGES * 8;
  const Work work;
#if LORA
  LoraBatch *batch = (LoraBatch *)(shared + lora_offset);
#endif
  allow_next_launch();

  if (warp >= NUM_THREADS / 32) {
    if (OWN_REGISTERS) asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COPY_REGISTERS));
    if (warp == NUM_THREADS / 32)
      fill_ring(work, weight, &x_map, ring, full, empty, m, num_blocks, lane);
    else
      sync_started();
#if LORA
    if (warp > NUM_THREADS / 32)
      lora_warps<LORA, KB * 64, NUM_THREADS>(lora, batch, thread - NUM_THREADS - 32, m, work.first_block() * 64,
                                             work.all_rows(), n);
#endif
    if (PAIR) cluster_wait();
    return;
  }
  if (OWN_REGISTERS) asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(OWN_REGISTERS ? OWN_REGISTERS : 24));
  fill_table(shared, thread, NUM_THREADS);
  sync_started();
  wait_previous_launch();

  const int w4 = warp & 3, wr = (warp >> 2) % WR, wk = (warp >> 2) / WR;
  const u32 lane4 = opaque(table_lane(shared, lane));
  u32 codes_at = opaque(ring + X_BYTES + (wr * XC + wk) * UNIT_BYTES + w4 * 512 + lane * 16);
  u32 scales_at = opaque(ring + X_BYTES + (wr * XC + wk) * UNIT_BYTES + UNIT_CODES + g * 16 + w4 * 4);
  // Of a matrix descriptor, the half that changes: the address, without the CTA's rank.
  const u32 x_at = DESCRIPTOR_LOW + (((ring & 0x3ffff) + wk * (MT * 1024)) >> 4);

  uint4 codes;
  u32 scales, next_scales;
  u32 a[16];
  float c[MT][4], acc[MT][4];
#pragma unroll
  for (int mt = 0; mt < MT; mt++)
#pragma unroll
    for (int j = 0; j < 4; j++) acc[mt][j] = 0.f;

  auto fetch = [&](int u) {  // unit u of the stage that codes_at points to
    asm volatile("ld.shared.v4.b32 {%0,%1,%2,%3},[%4];"
                 : "=r"(codes.x), "=r"(codes.y), "=r"(codes.z), "=r"(codes.w)
                 : "r"(codes_at + u * (WK * UNIT_BYTES))
                 : "memory");
    asm volatile("ld.shared.b32 %0,[%1];" : "=r"(next_scales) : "r"(scales_at + u * (WK * UNIT_BYTES)) : "memory");
  };
  auto decode = [&]() {
#pragma unroll
    for (int s = 0; s < 4; s++) decode4_spread(word_at(codes, s), lane4, a + 4 * s);
  };
  auto multiply = [&](u32 x) {
#pragma unroll
    for (int mt = 0; mt < MT; mt++)
#pragma unroll
      for (int j = 0; j < 4; j++) asm volatile("" : "=f"(c[mt][j]));
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
    for (int s = 0; s < 4; s++) wgmma(c, a + 4 * s, matrix_descriptor(x + s * 2), s > 0);
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
  };
  auto finish = [&]() {
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    const float2 f = half2_to_float2(scales);
#pragma unroll
    for (int mt = 0; mt < MT; mt++) {
#pragma unroll
      for (int j = 0; j < 4; j++) asm volatile("" : "+f"(c[mt][j])::"memory");
      acc[mt][0] += f.x * c[mt][0], acc[mt][1] += f.x * c[mt][1];
      acc[mt][2] += f.y * c[mt][2], acc[mt][3] += f.y * c[mt][3];
    }
  };
  int slot = 0;
  u32 parity = 0, stage_at = 0;  // of the stage to fetch from
  auto release = [&](int of) {
    __syncwarp();
    if (lane == 0) barrier_arrive(empty + of * 8);
  };
  auto next_stage = [&]() {
    slot++, stage_at += STAGE_BYTES, codes_at += STAGE_BYTES, scales_at += STAGE_BYTES;
    if (slot == STAGES) {
      slot = 0, parity ^= 1, stage_at = 0;
      codes_at -= STAGES * STAGE_BYTES, scales_at -= STAGES * STAGE_BYTES;
    }
    barrier_wait(full + slot * 8, parity);
  };
  auto pass = [&](int stages) {  // stages of which this warpgroup has no part
#pragma unroll 1
    for (int i = 0; i < stages; i++) {
      release(slot);
      next_stage();
    }
  };

  // Units of this warpgroup, unknown to the compiler: branches between units keep it from hoisting until registers spill.
  const bool shares = UNEVEN && wr >= OWN;
  int units = EVEN ? KBC / WK : (work.num_k - wk + WK - 1) / WK;
  if (shares) units = work.rank == 0 ? work.half * CU : units - work.half * CU;
  asm volatile("mov.u32 %0,%0;" : "+r"(units));
  barrier_wait(full, 0);
  if (shares && work.rank == 1) pass(work.half);
  if (units > 0) fetch(0);
#pragma unroll 1
  for (int first = 0; first < units; first += CU) {
    const int this_slot = slot;
    const u32 x = x_at + stage_at / 16;
#pragma unroll
    for (int u = 0; u < CU; u++) {
      if (u > 0 && first + u >= units) break;
      decode();
      scales = next_scales;
      multiply(x + u * (WK * MT * 64));
      if (first + u + 1 < units) {
        if (u + 1 == CU) next_stage();
        fetch((u + 1) % CU);
      }
      finish();
      if (u + 1 == CU) release(this_slot);
    }
  }
  if (shares && work.rank == 0)
#pragma unroll 1
    for (int stage = work.half; stage < work.stages; stage++) {
      next_stage();
      release(slot);
    }

#if LORA
  named_sync<LORA_PREPARED, NUM_THREADS + LORA * 32>();
  const bool both = PAIR && wr >= OWN;  // CTAs of the pair hold parts of these sums
  sync_multiplying();  // the table and the ring are free
  lora_expand_staged<MT>(acc, lora, batch, shared_address(shared) + warp * EXPAND_BYTES, work.block(wr) * 64 + w4 * 16, n,
                         1.f / gain, (both ? work.split * 2 + work.rank : work.split) * WK + wk,
                         SPLIT * WK * (both ? 2 : 1), named_sync<LORA_COLLECTED, NUM_THREADS + LORA * 32>);
#endif
  // Reduction over the warpgroups along k, [k][token][row], then over the pair, then over the split.
  float *sums = (float *)shared;
  if (PAIR) cluster_wait();
  sync_multiplying();
#pragma unroll
  for (int mt = 0; mt < MT; mt++) {
    float *to = sums + (wk * MT * 8 + mt * 8 + 2 * t) * SUM_STRIDE + wr * 64 + w4 * 16 + g;
    to[0] = acc[mt][0], to[SUM_STRIDE] = acc[mt][1], to[8] = acc[mt][2], to[SUM_STRIDE + 8] = acc[mt][3];
  }
  sync_multiplying();
  constexpr int QUADS = ROWS / 4, SHARED_QUADS = PAIR ? SHARE * 16 : 1;
  const int own_quads = work.rows() / 4;
  auto sum = [&](int token, int quad) {
    float4 v = *(const float4 *)(sums + token * SUM_STRIDE + quad * 4);
#pragma unroll
    for (int k = 1; k < WK; k++) v = add4(v, *(const float4 *)(sums + (k * MT * 8 + token) * SUM_STRIDE + quad * 4));
    return v;
  };
  const float4 *received = (const float4 *)(shared + RECEIVE_AT);
  if (PAIR && work.rank == 0)
    for (int i = thread; i < m * SHARED_QUADS; i += NUM_THREADS)
      send(shared_address(received + i), empty + STAGES * 8, sum(i / SHARED_QUADS, OWN * 16 + i % SHARED_QUADS));
  if (PAIR && work.rank == 1) barrier_wait(empty + STAGES * 8, 0);
  const int group = PAIR ? work.group * 2 + work.rank : work.group;
  float4 *parts = workspace + (size_t)group * SPLIT * MT * 8 * QUADS, *own = parts + work.split * MT * 8 * QUADS;
  for (int i = thread; i < m * QUADS; i += NUM_THREADS) {
    const int token = i / QUADS, quad = i % QUADS;
    if (PAIR && quad >= own_quads) continue;
    float4 v = sum(token, quad);
    if (PAIR && quad >= OWN * 16) v = add4(received[token * SHARED_QUADS + quad - OWN * 16], v);
    if (SPLIT > 1)
      __stcg(own + i, v);
    else
      store_y4(y, bias, gain, n, token, work.first_row() + quad * 4, v, EPILOGUE(token));
  }
  if (SPLIT > 1 && own_quads > 0) {
    u32 *counter = counters + group * 8;
    sync_multiplying();
    if (thread == 0) split_arrive_and_wait(counter);
    sync_multiplying();
    for (int i = work.split * NUM_THREADS + thread; i < m * QUADS; i += SPLIT * NUM_THREADS) {
      if (PAIR && i % QUADS >= own_quads) continue;
      float4 v[SPLIT];
#pragma unroll
      for (int k = 0; k < SPLIT; k++) v[k] = __ldcg(parts + (size_t)k * MT * 8 * QUADS + i);
#pragma unroll
      for (int k = 1; k < SPLIT; k++) v[0] = add4(v[0], v[k]);
      store_y4(y, bias, gain, n, i / QUADS, work.first_row() + i % QUADS * 4, v[0],
               EPILOGUE(i / QUADS));
    }
    if (thread == 0) split_leave(counter);
  }
}

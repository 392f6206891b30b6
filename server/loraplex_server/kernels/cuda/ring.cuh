// How nf4_ring.cu divides its work, and the ring in shared memory that brings each CTA its weights and x.
#pragma once
#include "common.cuh"

#ifndef KB
#define KB 64  // k blocks of 64
#endif
#ifndef SPLIT
#define SPLIT 1  // CTAs along k
#endif
#ifndef SHARE
#define SHARE 0  // row blocks that two CTAs of a cluster share, WR at most; 0: no cluster
#endif
#ifndef WR
#define WR 4  // warpgroups along rows
#endif
#ifndef WK
#define WK 1  // warpgroups along k
#endif
#ifndef XC
#define XC 4  // k blocks of a stage; a multiple of WK
#endif
#ifndef STAGES
#define STAGES 4
#endif

constexpr int NUM_THREADS = WR * WK * 128;  // that multiply
constexpr int ROWS = WR * 64;               // of one CTA
constexpr bool PAIR = SHARE > 0, HALF_K = SHARE == WR, UNEVEN = PAIR && !HALF_K;
constexpr int OWN = WR - SHARE;  // row blocks that are not shared
constexpr int PARTS = SPLIT * (HALF_K ? 2 : 1);
constexpr int KBC = (KB + PARTS - 1) / PARTS;  // k blocks of one CTA
constexpr int CU = XC / WK;                    // units of one warpgroup in a stage
constexpr int X_BYTES = XC * MT * 1024, STAGE_BYTES = (X_BYTES + WR * XC * UNIT_BYTES + 1023) / 1024 * 1024;
constexpr int RING_AT = TABLE_BYTES, BARRIERS_AT = RING_AT + STAGES * STAGE_BYTES;
constexpr int RECEIVE_AT = BARRIERS_AT + STAGES * 16 + 16;  // behind one more barrier
constexpr bool EVEN = KB % PARTS == 0 && KBC % XC == 0;
static_assert(XC % WK == 0, "a stage is divided evenly");

// Registers of a thread once the warpgroup that copies has kept some of its own (of 96, 128 or 168) and given the rest
// away.
constexpr int WARPGROUPS = WR * WK, COPY_REGISTERS = LORA ? 64 : 32;
constexpr int OWN_REGISTERS = WARPGROUPS == 4   ? LORA ? 104 : 112
                              : WARPGROUPS == 3 ? LORA ? 144 : 160
                              : WARPGROUPS == 2 ? LORA ? 216 : 232
                                                : 0;

struct __align__(64) TensorMap {
  u64 opaque[16];
};

// What one CTA does.
struct Work {
  int rank, split, group;  // CTA of the pair, part of k, group of rows
  int first_k, num_k;      // k blocks
  int stages, half;        // of the ring; stage at which the pair's shared blocks change hands
  DEVICE Work() {
    rank = PAIR ? blockIdx.x % 2 : 0;
    const int unit = PAIR ? blockIdx.x / 2 : blockIdx.x;
    split = unit % SPLIT, group = unit / SPLIT;
    first_k = (HALF_K ? split * 2 + rank : split) * KBC;
    num_k = PARTS == 1 ? KB : min(KBC, KB - first_k);
    stages = EVEN ? KBC / XC : (num_k + XC - 1) / XC;
    half = stages / 2;
  }
  DEVICE int first_block() const { return group * (PAIR ? OWN + WR : WR); }
  // The r-th row block of this CTA among those of the pair: own ones of rank 0, own ones of rank 1, shared ones.
  DEVICE int block(int r) const { return first_block() + r + (PAIR && (rank || r >= OWN) ? OWN : 0); }
  DEVICE int first_row() const { return (first_block() + rank * OWN) * 64; }
  DEVICE int all_rows() const { return (PAIR ? OWN + WR : WR) * 64; }  // of this CTA or its pair
  DEVICE int rows() const { return PAIR && rank == 0 ? OWN * 64 : ROWS; }  // that this CTA writes
  DEVICE bool has(int r, int stage) const { return !UNEVEN || r < OWN || (stage >= half) == (rank == 1); }
};

DEVICE void copy_x(u32 to, const TensorMap *map, int k, u32 bar) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0],[%1,{%2,%2,%3}],[%4];" ::"r"(to),
      "l"(map), "r"(0), "r"(k), "r"(bar)
      : "memory");
}
DEVICE void sync_started() {  // table and barriers are ready; the pair's other CTA learns it
  __syncthreads();
  if (PAIR) cluster_arrive_relaxed();
}
// Fills the ring: each stage holds x, then of each row block its k blocks' units. One warp runs this: lane r copies row
// block r, lane 0 also x.
DEVICE void fill_ring(const Work &work, const u8 *weight, const TensorMap *x_map, u32 ring, u32 full, u32 empty,
                      int m, int num_blocks, int lane) {
  const u8 *from = weight + ((size_t)min(work.block(min(lane, WR - 1)), num_blocks - 1) * KB + work.first_k) * UNIT_BYTES;
  auto copy_weights = [&](int stage, int slot) {
    const int bytes = (EVEN ? XC : min(XC, work.num_k - stage * XC)) * UNIT_BYTES;
    const int blocks = UNEVEN && !work.has(OWN, stage) ? OWN : WR;
    if (lane == 0) barrier_expect(full + slot * 8, X_BYTES + blocks * bytes);
    __syncwarp();
    if (lane < blocks)
      bulk_copy(ring + slot * STAGE_BYTES + X_BYTES + lane * (XC * UNIT_BYTES), from, bytes, full + slot * 8);
    from += XC * UNIT_BYTES;
  };
  auto copy_stage_x = [&](int stage, int slot) {
    if (lane == 0) copy_x(ring + slot * STAGE_BYTES, x_map, work.first_k + stage * XC, full + slot * 8);
  };
  if (lane == 0) {
    for (int i = 0; i < STAGES; i++) barrier_init(full + i * 8, 1), barrier_init(empty + i * 8, NUM_THREADS / 32);
    if (PAIR) barrier_init(empty + STAGES * 8, 1);
    barrier_init_done();
    if (PAIR && work.rank == 1) barrier_expect(empty + STAGES * 8, m * SHARE * 256);
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  }
  __syncwarp();
  // The stream of weights starts before anything else: it depends on no other launch.
  const int first = min(work.stages, STAGES);
#pragma unroll 1
  for (int stage = 0; stage < first; stage++) copy_weights(stage, stage);
  sync_started();
  wait_previous_launch();
#pragma unroll 1
  for (int stage = 0; stage < first; stage++) copy_stage_x(stage, stage);
  int slot = 0, parity = 0;
#pragma unroll 1
  for (int stage = STAGES; stage < work.stages; stage++) {
    barrier_wait(empty + slot * 8, parity);
    copy_weights(stage, slot);
    copy_stage_x(stage, slot);
    if (++slot == STAGES) slot = 0, parity ^= 1;
  }
  __syncwarp();
}

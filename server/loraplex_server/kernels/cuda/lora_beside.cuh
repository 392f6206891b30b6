// The shrink inside a GEMM's own launch, for few rows: its CTAs' extra warps make v = A x while the others multiply, so
// that A's trip to memory hides behind the weights'. With more rows the launch that makes x does it (lora_produce.cu).
#pragma once
#include "lora.cuh"
#include "lora_shrink.cuh"

constexpr int BESIDE_SLICES = 16;  // at most

// Shrink with WARPS warps of this CTA (this one is number `warp`), the work split over the first CTAs: an item is 16 ranks
// of one adapter x a slice of k, and leaves its part of v in global memory. x [tokens, K] is written by the previous
// launch, which is waited for once the first A is on its way. Returns the number of items; `state` counts all of them.
// scratch: WARPS * TT * 128 floats of shared memory.
template <int TT, int WARPS, int K>
DEVICE int lora_shrink_beside(const LoraArgs &args, const u16 *x, LoraBatch *batch, float *scratch, int warp, int cta, int workers) {
  constexpr int BATCH = 4;  // steps of 32 k whose loads are in flight together
  const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  const LoraTiles tiles = lora_tiles(args);
  const int slices = tiles.total == 0 ? 1 : max(1, min(min(BESIDE_SLICES, K / 128), workers / tiles.total));
  if (warp == 0 && lane == 0) batch->slices = slices;
  bool waited = false;
#pragma unroll 1
  for (int item = cta < workers ? cta : tiles.total * slices; item < tiles.total * slices; item += workers) {
    const int tile = item % tiles.total, slice = item / tiles.total;
    const LoraTile found = lora_tile<K>(args, tiles, tile);
    const int count = found.count, first = found.first;
    const int end = (K / 32) * (slice + 1) / slices;
    int step = (K / 32) * slice / slices + warp;
    u32 x_row[TT];
#pragma unroll
    for (int i = 0; i < TT; i++) x_row[i] = args.order[first + min(i * 8 + g, count - 1)] * K + t * 8;
    float c[TT][4];
#pragma unroll
    for (int i = 0; i < TT; i++) c[i][0] = c[i][1] = c[i][2] = c[i][3] = 0.f;
#pragma unroll 1
    for (; step < end; step += BATCH * WARPS) {
      uint4 a0[BATCH], a1[BATCH];
#pragma unroll
      for (int j = 0; j < BATCH; j++) {
        const bool on = step + j * WARPS < end;
        a0[j] = on ? load_stream16(found.a + (step + j * WARPS) * 32) : make_uint4(0, 0, 0, 0);
        a1[j] = on && found.upper ? load_stream16(found.a + 8 * K + (step + j * WARPS) * 32) : make_uint4(0, 0, 0, 0);
      }
      if (!waited) wait_previous_launch();
      waited = true;
#pragma unroll
      for (int i = 0; i < TT; i++) {
        if (i * 8 >= count) continue;
        uint4 b[BATCH];
#pragma unroll
        for (int j = 0; j < BATCH; j++) b[j] = load_x16(x + x_row[i] + min(step + j * WARPS, K / 32 - 1) * 32);
#pragma unroll
        for (int j = 0; j < BATCH; j++) {
          mma16816(c[i], a0[j].x, a1[j].x, a0[j].y, a1[j].y, b[j].x, b[j].y);
          mma16816(c[i], a0[j].z, a1[j].z, a0[j].w, a1[j].w, b[j].z, b[j].w);
        }
      }
    }
    if (!waited) wait_previous_launch();  // before anything is written that the previous launch may read
    waited = true;
    // Sum over the warps: [warp][token][rank].
    sync_lora<WARPS>();
#pragma unroll
    for (int i = 0; i < TT; i++) {
      float *to = scratch + (warp * TT * 8 + i * 8 + 2 * t) * 16 + g;
      to[0] = c[i][0], to[16] = c[i][1], to[8] = c[i][2], to[24] = c[i][3];
    }
    sync_lora<WARPS>();
    lora_store<TT, WARPS>(args, found, scratch, slice, warp * 32 + lane);
    sync_lora<WARPS>();
    if (warp == 0 && lane == 0) add_release(args.state, 1);
  }
  if (!waited) wait_previous_launch();
  return tiles.total * slices;
}

// What the WARPS warps that a CTA adds do, from start to end; as lora_warps, but they make v first. batch is followed by
// WARPS * TT * 128 floats.
template <int TT, int WARPS, int K, int NUM_MULTIPLYING>
DEVICE void lora_warps_beside(const LoraArgs &args, const u16 *x, LoraBatch *batch, int thread, int m, int row, int rows,
                              int n, int cta, int num_ctas) {
  constexpr int THREADS = NUM_MULTIPLYING + WARPS * 32;
  lora_prepare(args, batch, K, thread, WARPS * 32, row, rows, n, sync_lora<WARPS>);
  __threadfence_block();
  lora_arrive<LORA_PREPARED, THREADS>();
  const int items =
      lora_shrink_beside<TT, WARPS, K>(args, x, batch, (float *)(batch + 1), thread >> 5, cta, args.workers);
  sync_lora<WARPS>();
  if (items > 0) {
    if (thread == 0)
      while (load_acquire(args.state) < (u32)items) {
      }
    sync_lora<WARPS>();
    lora_collect<WARPS>(args, batch, thread, m, row, rows, n);
  }
  __threadfence_block();
  lora_arrive<LORA_COLLECTED, THREADS>();
  // The last CTA to leave clears the counts for the next launch.
  if (items > 0 && thread == 0 && add_acquire_release(args.state + 1, 1) == (u32)num_ctas - 1)
    args.state[0] = 0, args.state[1] = 0;
  __syncwarp();
}

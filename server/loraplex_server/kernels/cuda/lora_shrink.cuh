// v = A x for every adapter of the batch, by the warps that a GEMM's CTAs add for it.
#pragma once
#include "lora_tables.cuh"

// The batch's adapters as one warp sees them: lane l knows adapters l and l + 32.
struct LoraTiles {
  int num_adapters, total;  // total: tiles of 16 ranks
  int before[2];            // tiles of the adapters before
  int rank[2], start[2], count[2];
  const u16 *a[2];
};
DEVICE LoraTiles lora_tiles(const LoraArgs &args) {
  const int lane = threadIdx.x & 31;
  LoraTiles tiles;
  tiles.num_adapters = tiles.total = 0;
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const int d = lane + 32 * h, slot = d < args.num_groups ? args.slots[d] : -1;
    tiles.num_adapters += __popc(__ballot_sync(~0u, slot >= 0));
    const LoraRow *row = lora_row(args, max(slot, 0));
    tiles.start[h] = slot >= 0 ? args.starts[d] : 0;
    tiles.count[h] = slot >= 0 ? args.starts[d + 1] - tiles.start[h] : 0;
    tiles.a[h] = args.arena + row->offset, tiles.rank[h] = slot >= 0 ? (int)row->rank : 0;
    const int own = (tiles.rank[h] + 15) / 16;
    int sum = own;
#pragma unroll
    for (int i = 1; i < 32; i *= 2) {
      const int left = __shfl_up_sync(~0u, sum, i);
      if (lane >= i) sum += left;
    }
    tiles.before[h] = tiles.total + sum - own;
    tiles.total += __shfl_sync(~0u, sum, 31);
  }
  return tiles;
}
template <typename T> DEVICE T pick(const T (&of)[2], int d) {
  const T low = __shfl_sync(~0u, of[0], d & 31), high = __shfl_sync(~0u, of[1], d & 31);
  return d < 32 ? low : high;
}

// Shrink with WARPS warps of this CTA (this one is number `warp`), the work split over the first CTAs: an item is 16 ranks of
// one adapter x a slice of k, and leaves its part of v in global memory. x [tokens, K] is written by the previous launch,
// which is waited for once the first A is on its way. Returns the number of items; all of them are counted in `state`.
// scratch: WARPS * TT * 128 floats of shared memory.
template <int TT, int WARPS, int K>
DEVICE int lora_shrink(const LoraArgs &args, const u16 *x, LoraBatch *batch, float *scratch, int warp, int cta, int workers) {
  constexpr int BATCH = TT <= 2 ? 4 : 2;  // steps of 32 k whose loads are in flight together
  const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  const LoraTiles tiles = lora_tiles(args);
  const int most = TT <= 2 ? MAX_SLICES : MAX_SLICES / 2;
  const int slices = tiles.total == 0 ? 1 : max(1, min(min(most, K / 128), workers / tiles.total));
  if (warp == 0 && lane == 0) batch->slices = slices;
  bool waited = false;
#pragma unroll 1
  for (int item = cta < workers ? cta : tiles.total * slices; item < tiles.total * slices; item += workers) {
    const int tile = item % tiles.total, slice = item / tiles.total;
    const u32 low = __ballot_sync(~0u, lane < tiles.num_adapters && tiles.before[0] <= tile);
    const u32 high = __ballot_sync(~0u, lane + 32 < tiles.num_adapters && tiles.before[1] <= tile);
    const int d = __popc(low) + __popc(high) - 1;
    const int rank0 = (tile - pick(tiles.before, d)) * 16, count = pick(tiles.count, d), first = pick(tiles.start, d);
    const bool upper = rank0 + 8 < pick(tiles.rank, d);  // ranks come in eights
    const u16 *a_at = (const u16 *)pick((const u64(&)[2])tiles.a, d) + (size_t)(rank0 + g) * K + t * 8;
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
        a0[j] = on ? load_stream16(a_at + (step + j * WARPS) * 32) : make_uint4(0, 0, 0, 0);
        a1[j] = on && upper ? load_stream16(a_at + 8 * K + (step + j * WARPS) * 32) : make_uint4(0, 0, 0, 0);
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
    sync_shrinking<WARPS>();
#pragma unroll
    for (int i = 0; i < TT; i++) {
      float *to = scratch + (warp * TT * 8 + i * 8 + 2 * t) * 16 + g;
      to[0] = c[i][0], to[16] = c[i][1], to[8] = c[i][2], to[24] = c[i][3];
    }
    sync_shrinking<WARPS>();
    for (int i = warp * 32 + lane; i < count * 4; i += WARPS * 32) {
      float4 sum = *(const float4 *)(scratch + i * 4);
#pragma unroll
      for (int w = 1; w < WARPS; w++) sum = add4(sum, *(const float4 *)(scratch + w * TT * 128 + i * 4));
      const int token = args.order[first + i / 4];
      __stcg((float4 *)(args.v + ((size_t)slice * 64 + token) * args.v_stride + rank0 + i % 4 * 4), sum);
    }
    sync_shrinking<WARPS>();
    if (warp == 0 && lane == 0) add_release(args.state, 1);
  }
  if (!waited) wait_previous_launch();
  return tiles.total * slices;
}

// Waits until every item's v is there, and gathers the v of this CTA's parts in shared memory if it fits. By all
// shrinking warps; `thread` counts their threads.
template <int WARPS>
DEVICE void lora_collect(const LoraArgs &args, LoraBatch *batch, int items, int thread, int m, int row, int rows, int n) {
  if (thread == 0)
    while (load_acquire(args.state) < (u32)items) {
    }
  auto part_of = [&](int r) { return (r >= args.part_start[0]) + (r >= args.part_start[1]); };
  const int first = part_of(min(row, n - 1)), last = part_of(min(row + rows, n) - 1);
  int widest = 0;
  for (int d = thread & 31; d < batch->num_adapters; d += 32) {
    const LoraEntry &entry = batch->entry[d];
    widest = max(widest, entry.v_at[last] + entry.rank[last] - entry.v_at[first]);
  }
  widest = (__reduce_max_sync(~0u, widest) + 15) / 16 * 16;
  const bool fits = m * widest <= LORA_V;
  if (thread == 0) batch->v_stride = fits ? widest : 0, batch->first_part = first;
  sync_shrinking<WARPS>();
  if (!fits || widest == 0) return;
  for (int i = thread; i < m * (widest / 4); i += WARPS * 32) {
    const int token = i / (widest / 4), rank = i % (widest / 4) * 4, d = batch->adapter[token];
    if (d < 0) continue;
    const LoraEntry &entry = batch->entry[d];
    if (rank < entry.v_at[last] + entry.rank[last] - entry.v_at[first])
      *(float4 *)(batch->collected + token * widest + rank) =
          lora_sum<8>(args, batch->slices, token, entry.v_at[first] + rank);
  }
}
// After lora_collect: the last CTA to leave clears the counts for the next launch.
DEVICE void lora_leave(const LoraArgs &args, int num_ctas) {
  if (add_acquire_release(args.state + 1, 1) == (u32)num_ctas - 1) args.state[0] = 0, args.state[1] = 0;
}

// v = A x for every adapter of the batch, by whole CTAs.
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
    const LoraRow *row = lora_row(args, d, slot);
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

// 16 ranks of one adapter, as one lane sees them.
struct LoraTile {
  int rank0, count, first;  // the first rank; rows of the batch, order[first] being the first
  bool upper;               // ranks come in eights: whether the second eight are there
  const u16 *a;             // this lane's first 16 bytes of A
};
template <int K> DEVICE LoraTile lora_tile(const LoraArgs &args, const LoraTiles &tiles, int tile) {
  const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  const u32 low = __ballot_sync(~0u, lane < tiles.num_adapters && tiles.before[0] <= tile);
  const u32 high = __ballot_sync(~0u, lane + 32 < tiles.num_adapters && tiles.before[1] <= tile);
  const int d = __popc(low) + __popc(high) - 1;
  LoraTile found;
  found.rank0 = (tile - pick(tiles.before, d)) * 16;
  found.count = pick(tiles.count, d), found.first = pick(tiles.start, d);
  found.upper = found.rank0 + 8 < pick(tiles.rank, d);
  found.a = (const u16 *)pick((const u64(&)[2])tiles.a, d) + (size_t)(found.rank0 + g) * K + t * 8;
  return found;
}
// Adds up what the warps left in scratch [warp][token][rank], and stores it as one slice's part of v.
template <int TT, int WARPS>
DEVICE void lora_store(const LoraArgs &args, const LoraTile &tile, const float *scratch, int slice, int thread) {
  for (int i = thread; i < tile.count * 4; i += WARPS * 32) {
    float4 sum = *(const float4 *)(scratch + i * 4);
#pragma unroll
    for (int w = 1; w < WARPS; w++) sum = add4(sum, *(const float4 *)(scratch + w * TT * 128 + i * 4));
    const int row = args.order[tile.first + i / 4];
    __stcg((float4 *)(args.v + ((size_t)slice * 64 + row) * args.v_stride + tile.rank0 + i % 4 * 4), sum);
  }
}

// The items of CTA `cta` of `num_ctas`: an item is 16 ranks of one adapter x a slice of k, and leaves its part of v in
// global memory. The work of an item does not depend on the other rows of the batch, so neither does its result.
// x: x.made(x.load(token, k)) gives the eight values from k on, as they go into the product; it is asked only after the
// previous launch, which is waited for once the first A is on its way. CTAs without items wait for nothing, but for the
// first: a launch of which nobody waits could end before the one in front of it, and the next would not wait for that.
// scratch: WARPS * TT * 128 floats of shared memory.
template <int TT, int WARPS, int K, typename X>
DEVICE void lora_shrink(const LoraArgs &args, const X &x, float *scratch, int cta, int num_ctas) {
  constexpr int BATCH = 2;                              // steps of 32 k whose loads are in flight together
  constexpr int TILES = TT < X::TILES ? TT : X::TILES;  // and token tiles
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  const LoraTiles tiles = lora_tiles(args);
  const int slices = args.slices, items = tiles.total * slices;
  bool waited = false;
#pragma unroll 1
  for (int item = cta; item < items; item += num_ctas) {
    const int tile = item / slices, slice = item % slices;
    const LoraTile found = lora_tile<K>(args, tiles, tile);
    const int count = found.count, first = found.first;
    const int end = (K / 32) * (slice + 1) / slices;
    int step = (K / 32) * slice / slices + warp;
    int token[TT];
#pragma unroll
    for (int i = 0; i < TT; i++) token[i] = args.order[first + min(i * 8 + g, count - 1)];
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
      // The loads of several token tiles first, then their products.
#pragma unroll
      for (int i0 = 0; i0 < TT; i0 += TILES) {
        if (i0 * 8 >= count) continue;
        typename X::Raw raw[TILES][BATCH];
#pragma unroll
        for (int i = 0; i < TILES; i++)
#pragma unroll
          for (int j = 0; j < BATCH; j++)
            if (i0 + i == 0 || (i0 + i) * 8 < count)
              raw[i][j] = x.load(token[i0 + i], min(step + j * WARPS, K / 32 - 1) * 32 + t * 8);
#pragma unroll
        for (int i = 0; i < TILES; i++) {
          if (i0 + i > 0 && (i0 + i) * 8 >= count) continue;
#pragma unroll
          for (int j = 0; j < BATCH; j++) {
            const uint4 b = x.made(raw[i][j]);
            mma16816(c[i0 + i], a0[j].x, a1[j].x, a0[j].y, a1[j].y, b.x, b.y);
            mma16816(c[i0 + i], a0[j].z, a1[j].z, a0[j].w, a1[j].w, b.z, b.w);
          }
        }
      }
    }
    if (!waited) wait_previous_launch();  // before anything is written that the previous launch may read
    waited = true;
    // Sum over the warps: [warp][token][rank].
    __syncthreads();
#pragma unroll
    for (int i = 0; i < TT; i++) {
      if (i * 8 >= count) continue;
      float *to = scratch + (warp * TT * 8 + i * 8 + 2 * t) * 16 + g;
      to[0] = c[i][0], to[16] = c[i][1], to[8] = c[i][2], to[24] = c[i][3];
    }
    __syncthreads();
    lora_store<TT, WARPS>(args, found, scratch, slice, threadIdx.x);
  }
  if (!waited && cta == 0) wait_previous_launch();
}

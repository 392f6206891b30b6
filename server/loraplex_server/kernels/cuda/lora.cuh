// LoRA beside a fused GEMM, for up to 64 tokens: v = A x per adapter ("shrink"), then y += B v in the GEMM's epilogue
// ("expand"), both on tensor cores. Everything that depends on the batch or the adapters is read from device memory, so
// that a captured graph serves any mix of adapters.
#pragma once
#include "common.cuh"

#ifndef LORA_V
#define LORA_V 3072  // floats of v that a CTA keeps in shared memory
#endif

// Where one adapter's factors for one linear group lie: stacked A [rank, K] at `offset` elements of the arena, then each
// present part's B [rows of the part, rank of the part], all row-major.
struct LoraRow {
  long long offset, rank, part_rank[3], pad[3];
};

struct LoraArgs {
  const u16 *arena;
  const LoraRow *table;  // of this layer and group, for slot 0
  long long slot_stride;  // bytes
  const int *slots;   // [num_groups]: the distinct adapters of the batch, then -1
  const int *starts;  // [num_groups + 1]: adapter d has rows order[starts[d]] to order[starts[d + 1] - 1]
  const int *order;
  float *v;    // [slice of k][64][v_stride]
  u32 *state;  // [0] items done, [1] CTAs gone; both zero between launches
  int num_groups, v_stride;
  int workers;  // the first CTAs of the grid, surely resident at once: they alone shrink, so that waiting for them ends
  int part_start[2];  // first output row of the second and the third part; N where there is none
};

// The same as the epilogue wants it, in shared memory.
struct LoraEntry {
  const u16 *b[3];
  int rank[3], v_at[3];
};
struct LoraBatch {
  int num_adapters;
  int slices;    // of k, whose v must be added
  int v_stride;  // floats of a token in `collected`; 0: v must be read from global memory
  int first_part;
  int adapter[64];  // of each token row: index among the distinct adapters, or -1
  LoraEntry entry[64];
  float collected[LORA_V];  // v of the CTA's parts, summed over the slices
};

constexpr int MAX_SLICES = 16;

// Loads that stay behind the wait for their writer.
DEVICE uint4 load_x16(const u16 *p) {
  uint4 v;
  asm volatile("ld.global.v4.u32 {%0,%1,%2,%3},[%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p) : "memory");
  return v;
}
DEVICE float4 load_v4(const float *p) {
  float4 v;
  asm volatile("ld.global.cg.v4.f32 {%0,%1,%2,%3},[%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"(p) : "memory");
  return v;
}
DEVICE u32 load_acquire(const u32 *p) {
  u32 v;
  asm volatile("ld.acquire.gpu.global.u32 %0,[%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
DEVICE u32 add_acquire_release(u32 *p, u32 n) {
  u32 v;
  asm volatile("atom.add.acq_rel.gpu.global.u32 %0,[%1],%2;" : "=r"(v) : "l"(p), "r"(n) : "memory");
  return v;
}
DEVICE void add_release(u32 *p, u32 n) {
  asm volatile("red.release.gpu.global.add.u32 [%0],%1;" ::"l"(p), "r"(n) : "memory");
}
template <int ID, int THREADS> DEVICE void named_sync() {
  asm volatile("bar.sync %0,%1;" ::"n"(ID), "n"(THREADS) : "memory");
}

DEVICE const LoraRow *lora_row(const LoraArgs &args, int slot) {
  return (const LoraRow *)((const u8 *)args.table + slot * args.slot_stride);
}

template <int WARPS> DEVICE void sync_shrinking() {
  __syncwarp();
  if (WARPS > 1)
    named_sync<2, WARPS * 32>();
  else
    __syncwarp();
}

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

// Adds the slices of four ranks of v, in order, WIDE loads in flight.
template <int WIDE> DEVICE float4 lora_sum(const LoraArgs &args, int slices, int token, int rank) {
  const float *from = args.v + (size_t)token * args.v_stride + rank;
  const size_t copy = (size_t)64 * args.v_stride;
  float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll 1
  for (int s0 = 0; s0 < slices; s0 += WIDE) {
    float4 part[WIDE];
#pragma unroll
    for (int s = 0; s < WIDE; s++) {
      part[s] = make_float4(0.f, 0.f, 0.f, 0.f);
      if (s0 + s < slices) part[s] = load_v4(from + (s0 + s) * copy);
    }
#pragma unroll
    for (int s = 0; s < WIDE; s++) sum = add4(sum, part[s]);
  }
  return sum;
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

// This batch's adapters of this layer and group into shared memory, and the rows of B that the CTA will need into L2.
// sync: a barrier among the threads; one more must follow.
template <typename Sync>
DEVICE void lora_prepare(const LoraArgs &args, LoraBatch *batch, int k, int thread, int threads, int row, int rows, int n,
                         Sync sync) {
  for (int i = thread; i < 64; i += threads) batch->adapter[i] = -1;
  sync();
  for (int d = thread; d < 64; d += threads) {
    const int slot = d < args.num_groups ? args.slots[d] : -1;
    const bool last = slot >= 0 && (d + 1 >= args.num_groups || args.slots[d + 1] < 0);
    if (last) batch->num_adapters = d + 1;
    if (d == 0 && slot < 0) batch->num_adapters = 0;
    if (slot < 0) continue;
    for (int i = args.starts[d]; i < args.starts[d + 1]; i++) batch->adapter[args.order[i]] = d;
    const LoraRow found = *lora_row(args, slot);
    const u16 *b = args.arena + found.offset + found.rank * k;
    int v_at = 0;
#pragma unroll
    for (int part = 0; part < 3; part++) {
      const int from = part == 0 ? 0 : args.part_start[part - 1], to = part == 2 ? n : args.part_start[part];
      const int begin = max(row, from), end = min(row + rows, to), rank = (int)found.part_rank[part];
      batch->entry[d].b[part] = b, batch->entry[d].rank[part] = rank, batch->entry[d].v_at[part] = v_at;
      if (begin < end && rank > 0)
        asm volatile("cp.async.bulk.prefetch.L2.global [%0],%1;" ::"l"(b + (size_t)(begin - from) * rank),
                     "r"((end - begin) * rank * 2));
      b += (size_t)(to - from) * rank, v_at += rank;
    }
  }
}

// TILES tiles of one part; see lora_expand.
template <int TILES, int TT, typename Wait>
DEVICE void lora_expand_part(float (*acc)[TT][4], const LoraArgs &args, const LoraBatch *batch, const int *own, int row,
                             int part, int n, float scale, int share, int shares, Wait &wait) {
  constexpr int BATCH = TILES * TT >= 8 || TILES >= 4 ? 2 : 4;  // adapters whose B is in flight together
  const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3, num_adapters = batch->num_adapters;
  const int in_part = row - (part == 0 ? 0 : args.part_start[part - 1]);
  int largest = lane < num_adapters ? batch->entry[lane].rank[part] : 0;
  if (lane + 32 < num_adapters) largest = max(largest, batch->entry[lane + 32].rank[part]);
  largest = __reduce_max_sync(~0u, largest);
#pragma unroll 1
  for (int k = 0; k < largest; k += 16) {
    float4 v[TT];
#pragma unroll 1
    for (int d0 = share; d0 < num_adapters; d0 += shares * BATCH) {
      uint2 low[BATCH][TILES], high[BATCH][TILES];
#pragma unroll
      for (int j = 0; j < BATCH; j++) {
        const int d = d0 + j * shares, rank = d < num_adapters ? batch->entry[d].rank[part] : 0;
        const u16 *b = d < num_adapters ? batch->entry[d].b[part] + (size_t)(in_part + g) * rank + k + t * 4 : 0;
#pragma unroll
        for (int r = 0; r < TILES; r++) {
          const bool on = k + t * 4 < rank;
          low[j][r] = high[j][r] = make_uint2(0, 0);
          if (on && row + r * 16 + g < n) low[j][r] = *(const uint2 *)(b + r * 16 * rank);
          if (on && row + r * 16 + g + 8 < n) high[j][r] = *(const uint2 *)(b + (r * 16 + 8) * rank);
        }
      }
      wait();
      if (d0 == share) {
        const int stride = batch->v_stride, slices = batch->slices;
#pragma unroll
        for (int i = 0; i < TT; i++) {
          v[i] = make_float4(0.f, 0.f, 0.f, 0.f);
          if (own[i] < 0 || own[i] % shares != share) continue;
          const LoraEntry &entry = batch->entry[own[i]];
          if (k + t * 4 >= entry.rank[part]) continue;
          const int token = i * 8 + g, at = entry.v_at[part] + k + t * 4;
          v[i] = stride ? *(const float4 *)(batch->collected + token * stride + at - entry.v_at[batch->first_part])
                        : lora_sum<1>(args, slices, token, at);
        }
      }
#pragma unroll
      for (int i = 0; i < TT; i++) {
        const u32 h0 = pack2(v[i].x, v[i].y), h1 = pack2(v[i].z, v[i].w);
        const float2 f0 = unpack2(h0), f1 = unpack2(h1);
        const u32 l0 = pack2(v[i].x - f0.x, v[i].y - f0.y), l1 = pack2(v[i].z - f1.x, v[i].w - f1.y);
#pragma unroll
        for (int j = 0; j < BATCH; j++) {
          const bool mine = own[i] == d0 + j * shares;
          if (!__any_sync(~0u, mine)) continue;
#pragma unroll
          for (int r = 0; r < TILES; r++) {
            float c[4] = {0.f, 0.f, 0.f, 0.f};
            mma16816(c, low[j][r].x, high[j][r].x, low[j][r].y, high[j][r].y, mine ? h0 : 0, mine ? h1 : 0);
            mma16816(c, low[j][r].x, high[j][r].x, low[j][r].y, high[j][r].y, mine ? l0 : 0, mine ? l1 : 0);
#pragma unroll
            for (int e = 0; e < 4; e++) acc[r][i][e] += scale * c[e];
          }
        }
      }
    }
  }
}

// acc[tile][token tile] += scale * B v for the distinct adapters share, share + shares, ... of this batch; `row` is the
// first output row of the warp's tiles, parts begin at multiples of 16. v goes in as two 16-bit parts, so it is not
// rounded. wait: called once, when v is needed.
template <int TILES, int TT, typename Wait>
DEVICE void lora_expand(float (*acc)[TT][4], const LoraArgs &args, const LoraBatch *batch, int row, int n, float scale,
                        int share, int shares, Wait wait) {
  bool waited = false;
  auto once = [&]() {
    if (!waited) wait();
    waited = true;
  };
  if (share < batch->num_adapters && row < n) {
    const int g = (threadIdx.x & 31) >> 2;
    int own[TT];
#pragma unroll
    for (int i = 0; i < TT; i++) own[i] = batch->adapter[i * 8 + g];
    auto part_of = [&](int r) { return (r >= args.part_start[0]) + (r >= args.part_start[1]); };
    const int last = min(row + TILES * 16, n) - 1;
    if (TILES == 1 || part_of(row) == part_of(last)) {
      lora_expand_part<TILES, TT>(acc, args, batch, own, row, part_of(row), n, scale, share, shares, once);
    } else {
#pragma unroll 1
      for (int r = 0; r < TILES; r++) {
        const int tile_row = row + r * 16;
        if (tile_row >= n) break;
        float c[1][TT][4];
#pragma unroll
        for (int i = 0; i < TT; i++) c[0][i][0] = c[0][i][1] = c[0][i][2] = c[0][i][3] = 0.f;
        lora_expand_part<1, TT>(c, args, batch, own, tile_row, part_of(tile_row), n, scale, share, shares, once);
#pragma unroll
        for (int q = 0; q < TILES; q++)
          if (q == r)
#pragma unroll
            for (int i = 0; i < TT; i++)
#pragma unroll
              for (int e = 0; e < 4; e++) acc[q][i][e] += c[0][i][e];
      }
    }
  }
  once();
}

// What the WARPS shrinking warps of a CTA do, from start to end. `thread` counts their threads; the CTA's multiplying
// threads, NUM_MULTIPLYING, meet them at the barriers LORA_PREPARED and LORA_COLLECTED.
constexpr int LORA_PREPARED = 4, LORA_COLLECTED = 3;
template <int BARRIER, int THREADS> DEVICE void lora_arrive() {
  __syncwarp();
  asm volatile("bar.arrive %0,%1;" ::"n"(BARRIER), "n"(THREADS) : "memory");
}
template <int TT, int WARPS, int K, int NUM_MULTIPLYING>
DEVICE void lora_warps(const LoraArgs &args, const u16 *x, LoraBatch *batch, int thread, int m, int row, int rows, int n,
                       int cta, int num_ctas) {
  constexpr int THREADS = NUM_MULTIPLYING + WARPS * 32;
  lora_prepare(args, batch, K, thread, WARPS * 32, row, rows, n, sync_shrinking<WARPS>);
  __threadfence_block();
  lora_arrive<LORA_PREPARED, THREADS>();
  const int items = lora_shrink<TT, WARPS, K>(args, x, batch, (float *)(batch + 1), thread >> 5, cta, args.workers);
  sync_shrinking<WARPS>();
  if (items > 0) lora_collect<WARPS>(args, batch, items, thread, m, row, rows, n);
  __threadfence_block();
  lora_arrive<LORA_COLLECTED, THREADS>();
  if (items > 0 && thread == 0) lora_leave(args, num_ctas);
  __syncwarp();
}

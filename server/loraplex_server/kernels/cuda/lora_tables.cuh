// The tables that say which adapters a batch uses and where they lie, and how a CTA of the GEMM holds them and v in
// shared memory.
#pragma once
#include "common.cuh"

#ifndef LORA_V
#define LORA_V 3072  // floats of v that a CTA keeps in shared memory
#endif

// Where one adapter's factors for one linear group lie: stacked A [rank, K] at `offset` elements of the arena, then each
// present part's B [rows of the part, rank of the part], all row-major. `epilogue`: where float32 factor [n] and shift [n]
// of the finished output lie, in elements of the arena; 0 for none.
struct LoraRow {
  long long offset, rank, part_rank[3], epilogue, pad[2];
};

struct LoraArgs {
  const u16 *arena;
  const LoraRow *table;   // of this layer and group
  long long slot_stride;  // bytes
  const int *slots;   // [num_groups]: the distinct adapters of the batch, then -1
  const int *starts;  // [num_groups + 1]: adapter d has rows order[starts[d]] to order[starts[d + 1] - 1]
  const int *order;
  float *v;                // [slice of k][64][v_stride]: parts of A x
  const float *row_scale;  // [64]: factor of each row's v; null: 1
  int num_groups, v_stride;
  int slices;         // of k, whose parts add up to v
  u32 *state;         // of a GEMM that shrinks itself: items done, CTAs gone; zero between launches
  int workers;        // the first CTAs of its grid, surely resident at once: they alone shrink, so that waiting ends
  int by_slot;        // 1: adapter d is in the table's row slots[d]; 0: in row d, found without waiting for slots
  int part_start[2];  // first output row of the second and the third part; N where there is none
};

// The same as the epilogue wants it, in shared memory.
struct LoraEntry {
  const u16 *b[3];
  const float *epilogue;  // or null
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

// Where adapter d of the batch, in `slot`, lies.
DEVICE const LoraRow *lora_row(const LoraArgs &args, int d, int slot) {
  const int at = args.by_slot ? max(slot, 0) : min(d, args.num_groups - 1);
  return (const LoraRow *)((const u8 *)args.table + at * args.slot_stride);
}

template <int WARPS> DEVICE void sync_lora() {
  __syncwarp();
  if (WARPS > 1)
    named_sync<2, WARPS * 32>();
  else
    __syncwarp();
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
    const LoraRow found = *lora_row(args, d, slot);
    const u16 *b = args.arena + found.offset + found.rank * k;
    batch->entry[d].epilogue = found.epilogue ? (const float *)(args.arena + found.epilogue) : nullptr;
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

// Four ranks of a token's v: the slices added in order, WIDE loads in flight.
template <int WIDE> DEVICE float4 lora_sum(const LoraArgs &args, int slices, int token, int rank) {
  const float *from = args.v + (size_t)token * args.v_stride + rank;
  const size_t copy = (size_t)64 * args.v_stride;
  const float scale = args.row_scale ? __ldcg(args.row_scale + token) : 1.f;
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
  return make_float4(scale * sum.x, scale * sum.y, scale * sum.z, scale * sum.w);
}

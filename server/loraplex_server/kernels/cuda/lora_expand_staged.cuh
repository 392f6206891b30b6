// y += B v as lora_expand, for warps that have few registers left: B passes through shared memory, so that nothing that
// is still on its way from device memory occupies a register.
#pragma once
#include "lora_tables.cuh"

constexpr int EXPAND_DEPTH = 8;                            // steps of 16 ranks that a warp has on their way
constexpr int EXPAND_STAGE = 512;                          // bytes of one: 16 rows x 16 ranks
constexpr int EXPAND_BYTES = EXPAND_DEPTH * EXPAND_STAGE;  // of shared memory, for each warp

// 16 bytes into shared memory, or zeros.
DEVICE void copy_async16_or_zero(u32 to, const void *from, bool on) {
  asm volatile("cp.async.cg.shared.global [%0],[%1],16,%2;" ::"r"(to), "l"(from), "r"(on ? 16 : 0) : "memory");
}

// acc[token tile] += scale * B v for the distinct adapters share, share + shares, ... of this batch; `row` is the first
// of the warp's 16 output rows, parts begin at multiples of 16. v goes in as two 16-bit parts, so it is not rounded.
// stage: the warp's own EXPAND_BYTES of shared memory. wait: called once, when v is needed.
template <int TT, typename Wait>
DEVICE void lora_expand_staged(float (*acc)[4], const LoraArgs &args, const LoraBatch *batch, u32 stage, int row, int n,
                               float scale, int share, int shares, Wait wait) {
  const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3, num_adapters = row < n ? batch->num_adapters : 0;
  const int part = (row >= args.part_start[0]) + (row >= args.part_start[1]);
  const int line = row - (part == 0 ? 0 : args.part_start[part - 1]) + lane / 2;  // of B, that this lane copies
  const bool exists = row + lane / 2 < n;
  // The next 16 ranks at or after (d, k).
  auto settle = [&](int &d, int &k) {
    while (d < num_adapters && k >= batch->entry[d].rank[part]) d += shares, k = 0;
  };
  int d_load = share, k_load = 0, d = share, k = 0;
  settle(d_load, k_load), settle(d, k);
  auto load = [&](int slot) {
    if (d_load < num_adapters) {
      const LoraEntry &entry = batch->entry[d_load];
      const int rank = entry.rank[part], column = k_load + lane % 2 * 8;
      const bool on = exists && column < rank;
      const u16 *from = on ? entry.b[part] + (size_t)line * rank + column : args.arena;
      copy_async16_or_zero(stage + slot * EXPAND_STAGE + lane * 16, from, on);
      k_load += 16;
      settle(d_load, k_load);
    }
    copy_async_commit();
  };
#pragma unroll 1
  for (int slot = 0; slot < EXPAND_DEPTH; slot++) load(slot);
  u32 own[(TT + 3) / 4];  // the adapter of token g of each tile, a byte each
#pragma unroll
  for (int i = 0; i < TT; i++) {
    const u32 byte = (u32)batch->adapter[i * 8 + g] & 255;
    own[i / 4] = i % 4 == 0 ? byte : own[i / 4] | byte << i % 4 * 8;
  }
  wait();
  const int stride = batch->v_stride, base = batch->first_part;
  int slot = 0;
#pragma unroll 1
  while (d < num_adapters) {
    copy_async_wait<EXPAND_DEPTH - 1>();
    __syncwarp();
    const u32 from = stage + slot * EXPAND_STAGE + g * 32 + t * 8;
    uint2 low, high;
    asm volatile("ld.shared.v2.b32 {%0,%1},[%2];" : "=r"(low.x), "=r"(low.y) : "r"(from) : "memory");
    asm volatile("ld.shared.v2.b32 {%0,%1},[%2];" : "=r"(high.x), "=r"(high.y) : "r"(from + 256) : "memory");
    __syncwarp();  // everyone has read before the place is filled again
    load(slot);
    const LoraEntry &entry = batch->entry[d];
    const bool on = k + t * 4 < entry.rank[part];
    const int at = entry.v_at[part] + k + t * 4;
    u32 mine = 0;
#pragma unroll
    for (int i = 0; i < TT; i++) mine |= (u32)((own[i / 4] >> i % 4 * 8 & 255) == (u32)d) << i;
    const u32 any = __reduce_or_sync(~0u, mine);
#pragma unroll
    for (int i = 0; i < TT; i++) {
      if (!(any >> i & 1)) continue;
      float4 v = make_float4(0.f, 0.f, 0.f, 0.f);
      if ((mine >> i & 1) && on)
        v = stride ? *(const float4 *)(batch->collected + (i * 8 + g) * stride + at - entry.v_at[base])
                   : lora_sum<1>(args, batch->slices, i * 8 + g, at);
      // In float16, `scale` could take v out of range.
      if (!HALF) v = make_float4(scale * v.x, scale * v.y, scale * v.z, scale * v.w);
      const u32 h0 = pack2(v.x, v.y), h1 = pack2(v.z, v.w);
      const float2 f0 = unpack2(h0), f1 = unpack2(h1);
      float apart[4] = {0.f, 0.f, 0.f, 0.f};
      float *c = HALF ? apart : acc[i];
      mma16816(c, low.x, high.x, low.y, high.y, h0, h1);
      mma16816(c, low.x, high.x, low.y, high.y, pack2(v.x - f0.x, v.y - f0.y), pack2(v.z - f1.x, v.w - f1.y));
#pragma unroll
      for (int e = 0; HALF && e < 4; e++) acc[i][e] += scale * apart[e];
    }
    k += 16;
    settle(d, k);
    slot = slot + 1 == EXPAND_DEPTH ? 0 : slot + 1;
  }
}

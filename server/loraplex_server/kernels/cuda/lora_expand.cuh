// y += B v in the accumulators of the warps that multiply.
#pragma once
#include "lora_tables.cuh"

// TILES tiles of one part; see lora_expand.
template <int TILES, int TT, typename Wait>
DEVICE void lora_expand_part(float (*acc)[TT][4], const LoraArgs &args, const LoraBatch *batch, const int *own, int row,
                             int part, int n, float scale, int share, int shares, Wait &wait) {
  constexpr int BATCH = TILES >= 4 ? 2 : TILES == 2 ? 4 : 8;  // adapters whose B is in flight together
  const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3, num_adapters = batch->num_adapters;
  const int in_part = row - (part == 0 ? 0 : args.part_start[part - 1]);
  int largest = lane < num_adapters ? batch->entry[lane].rank[part] : 0;
  if (lane + 32 < num_adapters) largest = max(largest, batch->entry[lane + 32].rank[part]);
  largest = __reduce_max_sync(~0u, largest);
#pragma unroll 1
  for (int k = 0; k < largest; k += 16) {
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
          if (on && row + r * 16 + g < n) low[j][r] = load_stream8(b + r * 16 * rank);
          if (on && row + r * 16 + g + 8 < n) high[j][r] = load_stream8(b + (r * 16 + 8) * rank);
        }
      }
      __syncwarp();  // keeps the loads together, before the branches on who needs them
      wait();
      const int stride = batch->v_stride;
#pragma unroll
      for (int j = 0; j < BATCH; j++) {
        const int d = d0 + j * shares;
        if (d >= num_adapters) continue;
        const LoraEntry &entry = batch->entry[d];
        if (k >= entry.rank[part]) continue;
        const int at = entry.v_at[part] + k + t * 4;
#pragma unroll
        for (int i = 0; i < TT; i++) {
          const bool mine = own[i] == d && k + t * 4 < entry.rank[part];
          if (!__any_sync(~0u, mine)) continue;
          float4 v = make_float4(0.f, 0.f, 0.f, 0.f);
          if (mine)
            v = stride ? *(const float4 *)(batch->collected + (i * 8 + g) * stride + at - entry.v_at[batch->first_part])
                       : lora_sum<1>(args, batch->slices, i * 8 + g, at);
          const u32 h0 = pack2(v.x, v.y), h1 = pack2(v.z, v.w);
          const float2 f0 = unpack2(h0), f1 = unpack2(h1);
          const u32 l0 = pack2(v.x - f0.x, v.y - f0.y), l1 = pack2(v.z - f1.x, v.w - f1.y);
#pragma unroll
          for (int r = 0; r < TILES; r++) {
            float c[4] = {0.f, 0.f, 0.f, 0.f};
            mma16816(c, low[j][r].x, high[j][r].x, low[j][r].y, high[j][r].y, h0, h1);
            mma16816(c, low[j][r].x, high[j][r].x, low[j][r].y, high[j][r].y, l0, l1);
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

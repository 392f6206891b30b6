// The dense matrix back from repacked NF4: one warp a tile of 16 rows x 64 k, rows written 128 bytes at a time.
#include "common.cuh"

constexpr int WARPS = 8;

extern "C" __global__ void __launch_bounds__(WARPS * 32)
    nf4_dequantize(const u8 *__restrict__ weight, u16 *__restrict__ out, float gain, int num_rows, int num_k_blocks) {
  __shared__ float table[16];
  __shared__ __align__(16) u32 tiles[WARPS][16 * 36];  // rows padded by 16 bytes
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
  if (threadIdx.x < 16) table[threadIdx.x] = nf4_value(threadIdx.x) * (TABLE_GAIN * gain);
  __syncthreads();
  const long long tile = (long long)blockIdx.x * WARPS + warp;  // [row tile][k block]
  const int k = (int)(tile % num_k_blocks), row_tile = (int)(tile / num_k_blocks);
  if (row_tile * 16 >= num_rows) return;
  const u8 *unit = weight + ((size_t)(row_tile / 4) * num_k_blocks + k) * UNIT_BYTES;
  const uint4 codes = load_stream16(unit + (row_tile % 4) * 512 + lane * 16);
  const float2 scale = half2_to_float2(load_stream4(unit + UNIT_CODES + g * 16 + (row_tile % 4) * 4));
  u32 *mine = tiles[warp];
#pragma unroll
  for (int q = 0; q < 4; q++) {
    const u32 w = word_at(codes, q);
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const int o = j >> 1, h = j & 1;
      const u32 byte = w >> (8 * j) & 255;
      const float f = h ? scale.y : scale.x;
      mine[(h * 8 + g) * 36 + q * 8 + o * 4 + t] = pack2(table[byte >> 4] * f, table[byte & 15] * f);
    }
  }
  __syncwarp();
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int row = i * 4 + (lane >> 3);
    if (row_tile * 16 + row < num_rows)
      *(uint4 *)(out + ((size_t)(row_tile * 16 + row) * num_k_blocks + k) * 64 + (lane & 7) * 8) =
          *(const uint4 *)(mine + row * 36 + (lane & 7) * 4);
  }
}

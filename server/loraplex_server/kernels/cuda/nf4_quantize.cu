// A 16-bit matrix to NF4 with double quantization, bit for bit as bitsandbytes quantizes it: the same comparisons, and the
// same approximate reciprocal, which its build asks for.
#include "common.cuh"

DEVICE float reciprocal(float x) {
  float r;
  asm("rcp.approx.ftz.f32 %0,%1;" : "=f"(r) : "f"(x));
  return r;
}
DEVICE float scaled(float x, float by) {
  float r;
  asm("mul.ftz.f32 %0,%1,%2;" : "=f"(r) : "f"(x), "f"(by));
  return r;
}
// How many of the 15 bounds lie below x; no number lies above none.
DEVICE u32 nf4_code(float x) {
  return (x > -0.8480964004993439f) + (x > -0.6106329262256622f) + (x > -0.4599952697753906f) +
         (x > -0.33967943489551544f) + (x > -0.23460740596055984f) + (x > -0.13791173323988914f) +
         (x > -0.045525018125772476f) + (x > 0.03979014977812767f) + (x > 0.1202552504837513f) +
         (x > 0.2035212516784668f) + (x > 0.2920137718319893f) + (x > 0.3893125355243683f) +
         (x > 0.5016634166240692f) + (x > 0.6427869200706482f) + (x > 0.8614784181118011f);
}

// Eight lanes take a block of 64 values. packed: two codes a byte, the first in the high half.
extern "C" __global__ void nf4_quantize(const uint4 *weight, u32 *packed, float *absmax, long long num_eights) {
  const long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
  const bool inside = i < num_eights;
  const uint4 v = inside ? weight[i] : make_uint4(0, 0, 0, 0);
  float2 x[4];
  float highest = 0.0f;
#pragma unroll
  for (int j = 0; j < 4; j++) {
    x[j] = unpack2(word_at(v, j));
    highest = fmaxf(highest, fmaxf(fabsf(x[j].x), fabsf(x[j].y)));
  }
#pragma unroll
  for (int step = 1; step < 8; step *= 2) highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, step));
  if (!inside) return;
  const float by = reciprocal(highest);
  u32 codes = 0;
#pragma unroll
  for (int j = 0; j < 4; j++) codes |= (nf4_code(scaled(x[j].x, by)) << 4 | nf4_code(scaled(x[j].y, by))) << (8 * j);
  packed[i] = codes;
  if (i % 8 == 0) absmax[i / 8] = highest;
}

// The nearest of 256 sorted values as a search by halves finds it.
DEVICE int nearest(const float *table, float x) {
  int pivot = 127, above = 255, below = 0;
  float high = 1.0f, low = -1.0f, value = table[pivot];
  for (int step = 64; step; step >>= 1) {
    if (x > value) {
      below = pivot, low = value;
      pivot += step;
    } else {
      above = pivot, high = value;
      pivot -= step;
    }
    value = table[pivot];
  }
  if (above == 255) high = table[255];
  if (below == 0) low = table[0];
  if (x > value) return x > scaled(high + value, 0.5f) ? above : pivot;
  return x < scaled(low + value, 0.5f) ? below : pivot;
}

// One CTA of 256 threads takes a block of 256 statistics.
extern "C" __global__ void nf4_quantize_absmax(const float *values, const float *table, u8 *codes, float *absmax,
                                               int num_values) {
  __shared__ float entries[256], parts[8];
  const int i = blockIdx.x * 256 + threadIdx.x;
  entries[threadIdx.x] = table[threadIdx.x];
  const float x = i < num_values ? values[i] : 0.0f;
  float highest = fabsf(x);
#pragma unroll
  for (int step = 16; step; step /= 2) highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, step));
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = highest;
  __syncthreads();
#pragma unroll
  for (int j = 0; j < 8; j++) highest = fmaxf(highest, parts[j]);
  if (threadIdx.x == 0) absmax[blockIdx.x] = highest;
  if (i < num_values) codes[i] = (u8)nearest(entries, scaled(x, reciprocal(highest)));
}

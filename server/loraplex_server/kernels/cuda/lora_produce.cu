// Makes the input x of a GEMM from the output of the GEMM before, and in the same launch shrinks it: v = A x for the
// batch's adapters, in parts that the GEMM's epilogue adds up. The first `num_producers` CTAs make x, the others v; both
// read what the GEMM before wrote, so neither waits for the other. CTAs that turn out to have no work leave at once, and
// make room for the next launch.
//
// SOURCE 0: x exists already. 1: x = RMSNorm(residual + in) * weight. 2: x = silu(gate) * up.
// For a norm, v is made without the row's factor 1 / rms, which is a scalar that the producer leaves in row_scale.
#include "lora_shrink.cuh"
#ifndef SOURCE
#define SOURCE 1
#endif
#ifndef COLUMNS
#define COLUMNS 4096  // columns of x; a multiple of 64
#endif
#ifndef MT
#define MT 1  // tiles of 8 tokens
#endif
#ifndef RESIDUAL
#define RESIDUAL 1  // a norm adds `in` to a residual
#endif

constexpr int K = COLUMNS, WARPS = 8, THREADS = WARPS * 32, PIECES = K / 8;  // of a row, 16 bytes each
constexpr int GATED = 2, COLUMN_PIECES = THREADS * GATED;  // of one CTA that makes silu(gate) * up
constexpr int ROW_CTAS = SOURCE == 2 ? (PIECES + COLUMN_PIECES - 1) / COLUMN_PIECES : 1;
// Keeps float16's unscaled rows of a norm in range.
#if HALF
constexpr float RAW_GAIN = 1.f / 64;
#else
constexpr float RAW_GAIN = 1.f;
#endif

struct Eight {
  float2 of[4];
  DEVICE Eight() {}
  DEVICE explicit Eight(const uint4 &v) {
#pragma unroll
    for (int i = 0; i < 4; i++) of[i] = unpack2(word_at(v, i));
  }
  DEVICE uint4 packed() const {
    return make_uint4(pack2(of[0].x, of[0].y), pack2(of[1].x, of[1].y), pack2(of[2].x, of[2].y), pack2(of[3].x, of[3].y));
  }
};
DEVICE Eight rounded(const Eight &v) { return Eight(v.packed()); }
DEVICE Eight added(const Eight &a, const Eight &b) {
  Eight sum;
#pragma unroll
  for (int i = 0; i < 4; i++) sum.of[i] = make_float2(a.of[i].x + b.of[i].x, a.of[i].y + b.of[i].y);
  return rounded(sum);
}
DEVICE Eight times(const Eight &a, const Eight &b, float gain) {
  Eight product;
#pragma unroll
  for (int i = 0; i < 4; i++)
    product.of[i] = make_float2(a.of[i].x * gain * b.of[i].x, a.of[i].y * gain * b.of[i].y);
  return product;
}
DEVICE float silu(float v) { return v / (1.f + expf(-v)); }
// Rounded between the two steps, as torch rounds silu's result before it is multiplied.
DEVICE Eight gated(const Eight &gate, const Eight &up) {
  Eight active;
#pragma unroll
  for (int i = 0; i < 4; i++) active.of[i] = make_float2(silu(gate.of[i].x), silu(gate.of[i].y));
  return times(rounded(active), up, 1.f);
}

struct Source {
  const u16 *in, *residual, *weight;
  // Before a norm: the row's new residual.
  DEVICE Eight sum(int token, int k) const {
    const Eight own(load_x16(in + (size_t)token * K + k));
    return RESIDUAL ? added(own, Eight(load_x16(residual + (size_t)token * K + k))) : own;
  }
  // What the shrink multiplies by, in two steps: all that is to be read, for so many token tiles at once, and the values.
  static constexpr int TILES = SOURCE == 0 ? 4 : 2;
  struct Raw {
    uint4 a, b, weight;
  };
  DEVICE Raw load(int token, int k) const {
    Raw raw;
    const u16 *row = in + (size_t)token * (SOURCE == 2 ? 2 * K : K) + k;
    raw.a = load_x16(row);
    if (SOURCE == 2) raw.b = load_x16(row + K);
    if (SOURCE == 1 && RESIDUAL) raw.b = load_x16(residual + (size_t)token * K + k);
    if (SOURCE == 1) raw.weight = __ldg((const uint4 *)(weight + k));
    return raw;
  }
  DEVICE uint4 made(const Raw &raw) const {
    if (SOURCE == 0) return raw.a;
    if (SOURCE == 2) return gated(Eight(raw.a), Eight(raw.b)).packed();
    return times(RESIDUAL ? added(Eight(raw.a), Eight(raw.b)) : Eight(raw.a), Eight(raw.weight), RAW_GAIN).packed();
  }
};

DEVICE void make_norm(const Source &source, u16 *new_residual, u16 *x, float *row_scale, float eps, int row) {
  constexpr int OWN = (PIECES + THREADS - 1) / THREADS;
  __shared__ float of_warp[WARPS];
  const int thread = threadIdx.x;
  uint4 weights[OWN];
#pragma unroll
  for (int i = 0; i < OWN; i++)  // no launch writes them
    if (thread + i * THREADS < PIECES) weights[i] = __ldg((const uint4 *)source.weight + thread + i * THREADS);
  wait_previous_launch();
  Eight sums[OWN];
  float squares = 0.f;
#pragma unroll
  for (int i = 0; i < OWN; i++) {
    const int piece = thread + i * THREADS;
    if (piece >= PIECES) continue;
    sums[i] = source.sum(row, piece * 8);
#pragma unroll
    for (int j = 0; j < 4; j++) squares += sums[i].of[j].x * sums[i].of[j].x + sums[i].of[j].y * sums[i].of[j].y;
  }
#pragma unroll
  for (int lanes = 16; lanes; lanes /= 2) squares += __shfl_xor_sync(~0u, squares, lanes);
  if ((thread & 31) == 0) of_warp[thread >> 5] = squares;
  __syncthreads();
  float total = 0.f;
#pragma unroll
  for (int warp = 0; warp < WARPS; warp++) total += of_warp[warp];
  const float scale = rsqrtf(total / K + eps);
#pragma unroll
  for (int i = 0; i < OWN; i++) {
    const int piece = thread + i * THREADS;
    if (piece >= PIECES) continue;
    Eight normed;
#pragma unroll
    for (int j = 0; j < 4; j++) normed.of[j] = make_float2(sums[i].of[j].x * scale, sums[i].of[j].y * scale);
    ((uint4 *)(x + (size_t)row * K))[piece] = times(rounded(normed), Eight(weights[i]), 1.f).packed();
    if (RESIDUAL) ((uint4 *)(new_residual + (size_t)row * K))[piece] = sums[i].packed();
  }
  if (thread == 0) row_scale[row] = scale / RAW_GAIN;
}

extern "C" __global__ void __launch_bounds__(THREADS, 2)
    lora_produce(const u16 *__restrict__ in, const u16 *__restrict__ residual, u16 *__restrict__ new_residual,
                 const u16 *__restrict__ weight, u16 *__restrict__ x, float *__restrict__ row_scale, float eps,
                 int num_producers, const __grid_constant__ LoraArgs lora) {
  __shared__ float scratch[WARPS * MT * 128];
  allow_next_launch();
  const Source source{in, residual, weight};
  const int cta = blockIdx.x;
  if (cta >= num_producers) {
    lora_shrink<MT, WARPS, K>(lora, source, scratch, cta - num_producers, gridDim.x - num_producers);
  } else if (SOURCE == 1) {
    make_norm(source, new_residual, x, row_scale, eps, cta);
  } else {
    wait_previous_launch();
    const int row = cta / ROW_CTAS, first = cta % ROW_CTAS * COLUMN_PIECES + threadIdx.x;
    Source::Raw raw[GATED];
#pragma unroll
    for (int i = 0; i < GATED; i++) raw[i] = source.load(row, min(first + i * THREADS, PIECES - 1) * 8);
#pragma unroll
    for (int i = 0; i < GATED; i++)
      if (first + i * THREADS < PIECES) ((uint4 *)(x + (size_t)row * K))[first + i * THREADS] = source.made(raw[i]);
  }
}

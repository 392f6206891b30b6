// LoRA in a GEMM's launch, for up to 64 tokens: y += B v in the epilogue ("expand"), on tensor cores. v = A x was made by
// the launch before (lora_produce.cu), or is made beside the GEMM (lora_beside.cuh). Everything that depends on the
// batch or the adapters is read from device memory, so that a captured graph serves any mix of adapters.
#pragma once
#include "lora_expand.cuh"

// Gathers the v of this CTA's parts, once all of it is there, in shared memory if it fits. By WARPS warps.
template <int WARPS>
DEVICE void lora_collect(const LoraArgs &args, LoraBatch *batch, int thread, int m, int row, int rows, int n) {
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

// The epilogue of a token's adapter; null without one. After LORA_PREPARED.
DEVICE const float *lora_epilogue(const LoraBatch *batch, int token) {
  const int d = batch->adapter[token];
  return d < 0 ? nullptr : batch->entry[d].epilogue;
}

// What the WARPS warps that a CTA adds for LoRA do, from start to end. `thread` counts their threads; the CTA's
// multiplying threads, NUM_MULTIPLYING, meet them at the barriers LORA_PREPARED and LORA_COLLECTED.
constexpr int LORA_PREPARED = 4, LORA_COLLECTED = 3;
template <int BARRIER, int THREADS> DEVICE void lora_arrive() {
  __syncwarp();
  asm volatile("bar.arrive %0,%1;" ::"n"(BARRIER), "n"(THREADS) : "memory");
}
template <int WARPS, int K, int NUM_MULTIPLYING>
DEVICE void lora_warps(const LoraArgs &args, LoraBatch *batch, int thread, int m, int row, int rows, int n) {
  constexpr int THREADS = NUM_MULTIPLYING + WARPS * 32;
  lora_prepare(args, batch, K, thread, WARPS * 32, row, rows, n, sync_lora<WARPS>);
  sync_lora<WARPS>();
  __threadfence_block();
  lora_arrive<LORA_PREPARED, THREADS>();
  wait_previous_launch();
  if (thread == 0) batch->slices = args.slices;
  sync_lora<WARPS>();
  lora_collect<WARPS>(args, batch, thread, m, row, rows, n);
  __threadfence_block();
  lora_arrive<LORA_COLLECTED, THREADS>();
}

// LoRA beside a fused GEMM, for up to 64 tokens: v = A x per adapter ("shrink"), then y += B v in the GEMM's epilogue
// ("expand"), both on tensor cores. Everything that depends on the batch or the adapters is read from device memory, so
// that a captured graph serves any mix of adapters.
#pragma once
#include "lora_expand.cuh"
#include "lora_shrink.cuh"

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

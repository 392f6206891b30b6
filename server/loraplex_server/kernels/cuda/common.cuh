// Pieces that every kernel here shares. Compiled by NVRTC: no headers of the CUDA toolkit are needed.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#ifndef HALF
#define HALF 0  // 1: activations are float16, 0: bfloat16
#endif

#define DEVICE __device__ __forceinline__

// ---- the repacked weight: units of 64 rows x 64 k, ordered [row block][k block]
constexpr int UNIT_CODES = 2048;  // 4 tiles of 16 rows x 64 k, 32 lanes x 16 bytes each
constexpr int UNIT_BYTES = UNIT_CODES + 128;  // + 64 float16 scales, [row % 8][tile][row / 8 % 2]
constexpr int TABLE_BYTES = 65536;  // 256 pairs of values, one copy a bank, every second 128 bytes unused

// The scales are divided by this and the table is multiplied by it, which halves what rounding the values to bfloat16
// costs.
constexpr float TABLE_GAIN = 1.524605f;

// The NF4 value of a code as selects between immediates: a constant array would cost a cold cache miss every launch.
DEVICE float nf4_value(int code) {
  float v = -1.0f;
  if (code == 1) v = -0.6961928009986877f;
  if (code == 2) v = -0.5250730514526367f;
  if (code == 3) v = -0.39491748809814453f;
  if (code == 4) v = -0.28444138169288635f;
  if (code == 5) v = -0.18477343022823334f;
  if (code == 6) v = -0.09105003625154495f;
  if (code == 7) v = 0.0f;
  if (code == 8) v = 0.07958029955625534f;
  if (code == 9) v = 0.16093020141124725f;
  if (code == 10) v = 0.24611230194568634f;
  if (code == 11) v = 0.33791524171829224f;
  if (code == 12) v = 0.44070982933044434f;
  if (code == 13) v = 0.5626170039176941f;
  if (code == 14) v = 0.7229568362236023f;
  if (code == 15) v = 1.0f;
  return v;
}

DEVICE u32 shared_address(const void *p) { return (u32)__cvta_generic_to_shared(p); }

// ---- two floats <-> one 32-bit register of activations (low half first)
DEVICE u32 pack2(float low, float high) {
  u32 r;
#if HALF
  asm("cvt.rn.f16x2.f32 %0,%1,%2;" : "=r"(r) : "f"(high), "f"(low));
#else
  asm("cvt.rn.bf16x2.f32 %0,%1,%2;" : "=r"(r) : "f"(high), "f"(low));
#endif
  return r;
}
DEVICE float2 half2_to_float2(u32 v) {
  float2 r;
  asm("{.reg .f16 l,h; mov.b32 {l,h},%2; cvt.f32.f16 %0,l; cvt.f32.f16 %1,h;}" : "=f"(r.x), "=f"(r.y) : "r"(v));
  return r;
}
DEVICE float2 unpack2(u32 v) {
#if HALF
  return half2_to_float2(v);
#else
  return make_float2(__uint_as_float(v << 16), __uint_as_float(v & 0xffff0000u));
#endif
}

// ---- loads. Weights are read once: they pass L1 by. They are weak loads in volatile asm, so that ptxas cannot sink
// them past the next __syncwarp().
DEVICE uint4 load_stream16(const void *p) {
  uint4 v;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0,%1,%2,%3},[%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}
DEVICE uint2 load_stream8(const void *p) {
  uint2 v;
  asm volatile("ld.global.L1::no_allocate.v2.u32 {%0,%1},[%2];" : "=r"(v.x), "=r"(v.y) : "l"(p));
  return v;
}
DEVICE u32 load_stream4(const void *p) {
  u32 v;
  asm volatile("ld.global.L1::no_allocate.u32 %0,[%1];" : "=r"(v) : "l"(p));
  return v;
}
// Activations: 16 bytes into shared memory, cached in L1 because the CTA's other warps read them too.
DEVICE void copy_async16(u32 to, const void *from) {
  asm volatile("cp.async.ca.shared.global [%0],[%1],16;" ::"r"(to), "l"(from) : "memory");
}
DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING> DEVICE void copy_async_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory"); }
// Four 8x8 matrices of 16-bit values; lane l gives the address of row l % 8 of matrix l / 8.
DEVICE uint4 load_matrix4(u32 at) {
  uint4 v;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3},[%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(at) : "memory");
  return v;
}
DEVICE u32 word_at(const uint4 &v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

// ---- the pair table: entry b holds the values of a byte's high and low code. The entry's stride is 256 bytes, so one
// byte permute of (codes, lane offset) forms the address, and every lane reads its own bank.
DEVICE void fill_table(u8 *table, int thread, int num_threads) {
  const float mine = nf4_value(thread & 15) * TABLE_GAIN;
  for (int i = thread; i < 2048; i += num_threads) {
    const int entry = i >> 3;
    const float high = __shfl_sync(~0u, mine, entry >> 4), low = __shfl_sync(~0u, mine, entry & 15);
    const u32 v = pack2(high, low);
    *(uint4 *)(table + entry * 256 + (i & 7) * 16) = make_uint4(v, v, v, v);
  }
}
// Dynamic shared memory begins at a fixed address, which becomes part of the load instruction. In a cluster byte 3 of a
// shared address holds the CTA's rank; the permute takes it over from `lane4`.
constexpr u32 TABLE_AT = 1024;
DEVICE u32 table_lane(const u8 *table, int lane) {
  const u32 at = shared_address(table);
  if ((at & 0xffffff) != TABLE_AT) asm volatile("trap;");
  return (at & 0xff000000) | lane * 4;
}
// Four code bytes of one lane -> one 16x16 A fragment. All at once: for mma.sync, where the look-ups of one step hide
// behind the arithmetic of the one before.
DEVICE void decode4(u32 codes, u32 lane4, u32 *a) {
  asm volatile(
      "{.reg .b32 p,q,r,s; prmt.b32 p,%4,%5,0x7604; prmt.b32 q,%4,%5,0x7614; prmt.b32 r,%4,%5,0x7624; "
      "prmt.b32 s,%4,%5,0x7634; ld.shared.b32 %0,[p+%6]; ld.shared.b32 %1,[q+%6]; ld.shared.b32 %2,[r+%6]; "
      "ld.shared.b32 %3,[s+%6];}"
      : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
      : "r"(codes), "r"(lane4), "n"(TABLE_AT));
}
// One by one: for wgmma, between whose issues the compiler spreads them.
DEVICE u32 look_up(u32 offset) {
  u32 r;
  asm volatile("ld.shared.b32 %0,[%1+%2];" : "=r"(r) : "r"(offset), "n"(TABLE_AT));
  return r;
}
DEVICE void decode4_spread(u32 codes, u32 lane4, u32 *a) {
  a[0] = look_up(__byte_perm(codes, lane4, 0x7604));
  a[1] = look_up(__byte_perm(codes, lane4, 0x7614));
  a[2] = look_up(__byte_perm(codes, lane4, 0x7624));
  a[3] = look_up(__byte_perm(codes, lane4, 0x7634));
}

// ---- tensor cores: c[16 x 8] += a[16 x 16] b[16 x 8]
DEVICE void mma16816(float *c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
#if HALF
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
#else
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
#endif
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// ---- programmatic dependent launch
DEVICE void allow_next_launch() { asm volatile("griddepcontrol.launch_dependents;"); }
DEVICE void wait_previous_launch() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// ---- mbarriers and bulk copies into shared memory
DEVICE void barrier_init(u32 bar, u32 count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0],%1;" ::"r"(bar), "r"(count) : "memory");
}
DEVICE void barrier_init_done() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
DEVICE void barrier_wait(u32 bar, u32 parity) {
  asm volatile(
      "{.reg .pred p; WAIT: mbarrier.try_wait.parity.shared::cta.b64 p,[%0],%1; @p bra DONE; bra WAIT; DONE:}" ::"r"(bar),
      "r"(parity)
      : "memory");
}
DEVICE void barrier_arrive(u32 bar) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _,[%0];" ::"r"(bar) : "memory");
}
DEVICE void barrier_expect(u32 bar, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _,[%0],%1;" ::"r"(bar), "r"(bytes) : "memory");
}
DEVICE void bulk_copy(u32 to, const void *from, u32 bytes, u32 bar) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0],[%1],%2,[%3];" ::"r"(to),
               "l"(from), "r"(bytes), "r"(bar)
               : "memory");
}

// ---- clusters
DEVICE void cluster_arrive_relaxed() { asm volatile("barrier.cluster.arrive.relaxed.aligned;"); }
DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
DEVICE void store_cluster16(u32 local, u32 rank, float4 v) {
  u32 remote;
  asm("mapa.shared::cluster.u32 %0,%1,%2;" : "=r"(remote) : "r"(local), "r"(rank));
  asm volatile("st.shared::cluster.v4.f32 [%0],{%1,%2,%3,%4};" ::"r"(remote), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w)
               : "memory");
}

DEVICE float4 add4(float4 a, float4 b) { return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w); }

// Four output rows of one token: y = v * gain (+ bias); then, with an epilogue [2][n], factor * y + shift.
DEVICE void store_y4(u16 *y, const u16 *bias, float gain, int n, int token, int row, float4 v,
                     const float *epilogue = nullptr) {
  u16 *to = y + (size_t)token * n + row;
  v = make_float4(v.x * gain, v.y * gain, v.z * gain, v.w * gain);
  if (bias) {
#pragma unroll
    for (int j = 0; j < 4; j++)
      if (row + j < n) (&v.x)[j] += unpack2(bias[row + j]).x;
  }
  if (epilogue) {
#pragma unroll
    for (int j = 0; j < 4; j++)
      if (row + j < n) (&v.x)[j] = epilogue[row + j] * (&v.x)[j] + epilogue[n + row + j];
  }
  u32 low = pack2(v.x, v.y), high = pack2(v.z, v.w);
  if (row + 3 < n && (n & 3) == 0) {
    *(uint2 *)to = make_uint2(low, high);
  } else {
    if (row < n) to[0] = (u16)low;
    if (row + 1 < n) to[1] = (u16)(low >> 16);
    if (row + 2 < n) to[2] = (u16)high;
    if (row + 3 < n) to[3] = (u16)(high >> 16);
  }
}

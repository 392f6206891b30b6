// wgmma m64 n(8 * MT) k16 with A in registers and B in shared memory, one variant for each number of token tiles.
#pragma once
#include "common.cuh"

#if HALF
#define TYPES "f16.f16"
#else
#define TYPES "bf16.bf16"
#endif

// Rows of 128 bytes in the 128-byte swizzle, groups of 8 rows 1,024 bytes apart; `at`: DESCRIPTOR_LOW + the address / 16.
constexpr u32 DESCRIPTOR_LOW = 1 << 16;
DEVICE u64 matrix_descriptor(u32 at) {
  u64 d;
  asm("mov.b64 %0,{%1,%2};" : "=l"(d) : "r"(at), "n"(1 << 30 | 1024 >> 4));
  return d;
}

#if MT == 2
DEVICE void wgmma(float (*c)[4], const u32 *a, u64 b, int accumulate) {
  asm volatile(
      "{.reg .pred p; setp.ne.b32 p,%13,0; wgmma.mma_async.sync.aligned.m64n16k16.f32." TYPES " "
      "{%0,%1,%2,%3,%4,%5,%6,%7}"
      ",{%8,%9,%10,%11},%12,p,1,1,0;}"
      : "+f"(c[0][0]), "+f"(c[0][1]), "+f"(c[0][2]), "+f"(c[0][3]), "+f"(c[1][0]), "+f"(c[1][1]), "+f"(c[1][2]),
        "+f"(c[1][3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));
}
#elif MT == 3
DEVICE void wgmma(float (*c)[4], const u32 *a, u64 b, int accumulate) {
  asm volatile(
      "{.reg .pred p; setp.ne.b32 p,%17,0; wgmma.mma_async.sync.aligned.m64n24k16.f32." TYPES " "
      "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11}"
      ",{%12,%13,%14,%15},%16,p,1,1,0;}"
      : "+f"(c[0][0]), "+f"(c[0][1]), "+f"(c[0][2]), "+f"(c[0][3]), "+f"(c[1][0]), "+f"(c[1][1]), "+f"(c[1][2]),
        "+f"(c[1][3]), "+f"(c[2][0]), "+f"(c[2][1]), "+f"(c[2][2]), "+f"(c[2][3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));
}
#elif MT == 4
DEVICE void wgmma(float (*c)[4], const u32 *a, u64 b, int accumulate) {
  asm volatile(
      "{.reg .pred p; setp.ne.b32 p,%21,0; wgmma.mma_async.sync.aligned.m64n32k16.f32." TYPES " "
      "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15}"
      ",{%16,%17,%18,%19},%20,p,1,1,0;}"
      : "+f"(c[0][0]), "+f"(c[0][1]), "+f"(c[0][2]), "+f"(c[0][3]), "+f"(c[1][0]), "+f"(c[1][1]), "+f"(c[1][2]),
        "+f"(c[1][3]), "+f"(c[2][0]), "+f"(c[2][1]), "+f"(c[2][2]), "+f"(c[2][3]), "+f"(c[3][0]), "+f"(c[3][1]),
        "+f"(c[3][2]), "+f"(c[3][3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));
}
#elif MT == 6
DEVICE void wgmma(float (*c)[4], const u32 *a, u64 b, int accumulate) {
  asm volatile(
      "{.reg .pred p; setp.ne.b32 p,%29,0; wgmma.mma_async.sync.aligned.m64n48k16.f32." TYPES " "
      "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23}"
      ",{%24,%25,%26,%27},%28,p,1,1,0;}"
      : "+f"(c[0][0]), "+f"(c[0][1]), "+f"(c[0][2]), "+f"(c[0][3]), "+f"(c[1][0]), "+f"(c[1][1]), "+f"(c[1][2]),
        "+f"(c[1][3]), "+f"(c[2][0]), "+f"(c[2][1]), "+f"(c[2][2]), "+f"(c[2][3]), "+f"(c[3][0]), "+f"(c[3][1]),
        "+f"(c[3][2]), "+f"(c[3][3]), "+f"(c[4][0]), "+f"(c[4][1]), "+f"(c[4][2]), "+f"(c[4][3]), "+f"(c[5][0]),
        "+f"(c[5][1]), "+f"(c[5][2]), "+f"(c[5][3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));
}
#elif MT == 8
DEVICE void wgmma(float (*c)[4], const u32 *a, u64 b, int accumulate) {
  asm volatile(
      "{.reg .pred p; setp.ne.b32 p,%37,0; wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPES " "
      "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%"
      "26,%27,%28,%29,%30,%31}"
      ",{%32,%33,%34,%35},%36,p,1,1,0;}"
      : "+f"(c[0][0]), "+f"(c[0][1]), "+f"(c[0][2]), "+f"(c[0][3]), "+f"(c[1][0]), "+f"(c[1][1]), "+f"(c[1][2]),
        "+f"(c[1][3]), "+f"(c[2][0]), "+f"(c[2][1]), "+f"(c[2][2]), "+f"(c[2][3]), "+f"(c[3][0]), "+f"(c[3][1]),
        "+f"(c[3][2]), "+f"(c[3][3]), "+f"(c[4][0]), "+f"(c[4][1]), "+f"(c[4][2]), "+f"(c[4][3]), "+f"(c[5][0]),
        "+f"(c[5][1]), "+f"(c[5][2]), "+f"(c[5][3]), "+f"(c[6][0]), "+f"(c[6][1]), "+f"(c[6][2]), "+f"(c[6][3]),
        "+f"(c[7][0]), "+f"(c[7][1]), "+f"(c[7][2]), "+f"(c[7][3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));
}
#endif

// The inline PTX of attention on sm_90a: ptx.cuh goes on here, which is long enough.
#pragma once

#include "ptx.cuh"

namespace pyfast {

// Operands in shared memory lie in panels of 64 features: lines of 128 bytes, XORed as SharedTile does. Results, and
// operands wherever they are, are in use until a wait for the group; wgmma_arrived then says so to the compiler.

#define PYFAST_C4(mode, j) mode(c[j][0]), mode(c[j][1]), mode(c[j][2]), mode(c[j][3])
#define PYFAST_C16(mode, j) PYFAST_C4(mode, j), PYFAST_C4(mode, j + 1), PYFAST_C4(mode, j + 2), PYFAST_C4(mode, j + 3)
#define PYFAST_C32(mode) PYFAST_C16(mode, 0), PYFAST_C16(mode, 4)
#define PYFAST_C40(mode) PYFAST_C32(mode), PYFAST_C4(mode, 8), PYFAST_C4(mode, 9)
#define PYFAST_C48(mode) PYFAST_C32(mode), PYFAST_C16(mode, 8)
#define PYFAST_C64(mode) PYFAST_C48(mode), PYFAST_C16(mode, 12)
#define PYFAST_R16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define PYFAST_R32 PYFAST_R16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define PYFAST_R40 PYFAST_R32 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define PYFAST_R48 PYFAST_R40 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define PYFAST_R64 \
  PYFAST_R48 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

// c [64, 8 kTiles] = a b^T, or += it, over 16 kSteps features of a panel of a [64, 64] and of b [8 kTiles, 64]; both in
// shared memory by depth, of which 16 are 32 bytes. In one piece, so that a panel takes the registers of two addresses.
template <class T, bool kAdd, int kSteps, int kTiles>
__device__ __forceinline__ void wgmma_panel(float (&c)[kTiles][4], uint64_t a, uint64_t b) {
  static_assert(kTiles == 4 || kTiles == 8, "b has 32 or 64 rows");
  static_assert(kSteps == 1 || kSteps == 2 || kSteps == 4, "a panel, half of it, or a quarter");
#define PYFAST_STEP(SHAPE, C, add) "wgmma.mma_async.sync.aligned." SHAPE " {" C "}, x, y, " add ", 1, 1, 0, 0; "
#define PYFAST_NEXT(SHAPE, C) "add.u64 x, x, 2; add.u64 y, y, 2; " PYFAST_STEP(SHAPE, C, "rest")
#define PYFAST_STEPS(STEPS, x, y, add, ...) \
  asm volatile( \
      "{ .reg .pred first, rest; .reg .u64 x, y; mov.u64 x, " x "; mov.u64 y, " y "; " \
      "setp.ne.u32 first, " add ", 0; setp.eq.u32 rest, 0, 0; " STEPS "}" \
      : __VA_ARGS__ \
      : "l"(a), "l"(b), "n"(int(kAdd)) \
      : "memory")
#define PYFAST_PANEL(SHAPE, C, ...) \
  if constexpr (kSteps == 1) \
    PYFAST_STEPS(PYFAST_STEP(SHAPE, C, "first"), __VA_ARGS__); \
  else if constexpr (kSteps == 2) \
    PYFAST_STEPS(PYFAST_STEP(SHAPE, C, "first") PYFAST_NEXT(SHAPE, C), __VA_ARGS__); \
  else \
    PYFAST_STEPS(PYFAST_STEP(SHAPE, C, "first") PYFAST_NEXT(SHAPE, C) PYFAST_NEXT(SHAPE, C) PYFAST_NEXT(SHAPE, C), \
                 __VA_ARGS__)
#define PYFAST_PANELS(mode) \
  if constexpr (kTiles == 8 && std::is_same_v<T, bfloat16>) { \
    PYFAST_PANEL("m64n64k16.f32.bf16.bf16", PYFAST_R32, "%32", "%33", "%34", PYFAST_C32(mode)); \
  } else if constexpr (kTiles == 8) { \
    PYFAST_PANEL("m64n64k16.f32.f16.f16", PYFAST_R32, "%32", "%33", "%34", PYFAST_C32(mode)); \
  } else if constexpr (std::is_same_v<T, bfloat16>) { \
    PYFAST_PANEL("m64n32k16.f32.bf16.bf16", PYFAST_R16, "%16", "%17", "%18", PYFAST_C16(mode, 0)); \
  } else { \
    PYFAST_PANEL("m64n32k16.f32.f16.f16", PYFAST_R16, "%16", "%17", "%18", PYFAST_C16(mode, 0)); \
  }
  if constexpr (kAdd) {
    PYFAST_PANELS("+f")
  } else {
    PYFAST_PANELS("=f")
  }
#undef PYFAST_PANELS
#undef PYFAST_PANEL
#undef PYFAST_STEPS
#undef PYFAST_NEXT
#undef PYFAST_STEP
}

// c [64, 8 kTiles] += p [64, 32] b: p in registers, as the left operand of mma.sync for each warp's 16 rows; b
// [32, 8 kTiles] in shared memory with its columns next to each other, of whose lines 16 are 2048 bytes.
template <class T, int kTiles>
__device__ __forceinline__ void wgmma_held(float (*c)[4], const uint32_t (&p)[4], const uint32_t (&q)[4], uint64_t b) {
  static_assert(kTiles == 8 || kTiles == 10 || kTiles == 12 || kTiles == 16, "b has 64, 80, 96 or 128 columns");
#define PYFAST_HELD(SHAPE, C, P, Q, y, ...) \
  asm volatile( \
      "{ .reg .pred all; .reg .u64 y; setp.eq.u32 all, 0, 0; add.u64 y, " y ", 128; " \
      "wgmma.mma_async.sync.aligned." SHAPE " {" C "}, {" P "}, " y ", all, 1, 1, 1; " \
      "wgmma.mma_async.sync.aligned." SHAPE " {" C "}, {" Q "}, y, all, 1, 1, 1; }" \
      : __VA_ARGS__ \
      : "r"(p[0]), "r"(p[1]), "r"(p[2]), "r"(p[3]), "r"(q[0]), "r"(q[1]), "r"(q[2]), "r"(q[3]), "l"(b) \
      : "memory")
#define PYFAST_HELD_64(SHAPE) \
  PYFAST_HELD("m64n64k16." SHAPE, PYFAST_R32, "%32, %33, %34, %35", "%36, %37, %38, %39", "%40", PYFAST_C32("+f"))
#define PYFAST_HELD_80(SHAPE) \
  PYFAST_HELD("m64n80k16." SHAPE, PYFAST_R40, "%40, %41, %42, %43", "%44, %45, %46, %47", "%48", PYFAST_C40("+f"))
#define PYFAST_HELD_96(SHAPE) \
  PYFAST_HELD("m64n96k16." SHAPE, PYFAST_R48, "%48, %49, %50, %51", "%52, %53, %54, %55", "%56", PYFAST_C48("+f"))
#define PYFAST_HELD_128(SHAPE) \
  PYFAST_HELD("m64n128k16." SHAPE, PYFAST_R64, "%64, %65, %66, %67", "%68, %69, %70, %71", "%72", PYFAST_C64("+f"))
#define PYFAST_HELD_AS(SHAPE) \
  if constexpr (kTiles == 8) PYFAST_HELD_64(SHAPE); \
  else if constexpr (kTiles == 10) PYFAST_HELD_80(SHAPE); \
  else if constexpr (kTiles == 12) PYFAST_HELD_96(SHAPE); \
  else PYFAST_HELD_128(SHAPE)
  if constexpr (std::is_same_v<T, bfloat16>) {
    PYFAST_HELD_AS("f32.bf16.bf16");
  } else {
    PYFAST_HELD_AS("f32.f16.f16");
  }
#undef PYFAST_HELD_AS
#undef PYFAST_HELD_128
#undef PYFAST_HELD_96
#undef PYFAST_HELD_80
#undef PYFAST_HELD_64
#undef PYFAST_HELD
}
#undef PYFAST_R64
#undef PYFAST_R48
#undef PYFAST_R40
#undef PYFAST_R32
#undef PYFAST_R16
#undef PYFAST_C64
#undef PYFAST_C48
#undef PYFAST_C40
#undef PYFAST_C32
#undef PYFAST_C16
#undef PYFAST_C4

// 4 bytes from global to shared memory; with `bytes` 0, a zero.
__device__ __forceinline__ void cp_async_word(uint32_t to, const void* from, int bytes) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

// Warps meet at barrier `id`, kThreads threads of them, wherever in the code they are.
template <int kThreads>
__device__ __forceinline__ void barrier(int id) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "n"(kThreads) : "memory");
}
template <int kThreads>
__device__ __forceinline__ void barrier_arrive(int id) {   // and waits for nobody
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "n"(kThreads) : "memory");
}

// Keeps the compiler from reading or moving these registers before the wait above.
template <int kTiles>
__device__ __forceinline__ void wgmma_arrived(float (&c)[kTiles][4]) {
#pragma unroll
  for (int j = 0; j < kTiles; ++j)
    asm volatile("" : "+f"(c[j][0]), "+f"(c[j][1]), "+f"(c[j][2]), "+f"(c[j][3])::"memory");
}

}  // namespace pyfast

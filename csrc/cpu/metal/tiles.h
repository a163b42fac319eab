// AMX tile instructions (Intel SDM volume 1, chapter 18). PYFAST_TILES is defined where they may be used. With
// PYFAST_EMULATE_TILES plain C++ stands in for them, so that the AMX kernels are tested on machines without.
#pragma once

#include "vec.h"

#if defined(__AMX_TILE__) || defined(PYFAST_EMULATE_TILES)
#define PYFAST_TILES

namespace pyfast {
namespace {

#ifndef PYFAST_EMULATE_TILES

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// All eight tiles are 16 rows of 64 bytes. The instructions are inline assembly because g++ 12's intrinsics take
// literals only and do not say that they touch memory, so that it drops the stores that fill what they read.
struct TileSession {
  TileSession() {
    const TileConfig config;
    __asm__ volatile("ldtilecfg %0" ::"m"(config) : "memory");
  }
  ~TileSession() { __asm__ volatile("tilerelease" ::: "memory"); }
};

template <int kTile> inline void tile_zero() { __asm__ volatile("tilezero %%tmm%c0" ::"i"(kTile)); }
template <int kTile> inline void tile_load(const void* from, int64_t stride) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(kTile) : "memory");
}
template <int kTile> inline void tile_store(void* to, int64_t stride) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(kTile) : "memory");
}
template <int kC, int kA, int kB> inline void tile_multiply() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kC), "i"(kA), "i"(kB));
}

#else

struct EmulatedTile {
  alignas(64) uint8_t rows[16][64];
};
thread_local EmulatedTile emulated_tiles[8];

struct TileSession {
  ~TileSession() { __builtin_memset(emulated_tiles, 0xff, sizeof emulated_tiles); }   // NaN: use after release shows
};

template <int kTile> inline void tile_zero() { __builtin_memset(&emulated_tiles[kTile], 0, sizeof(EmulatedTile)); }
template <int kTile> inline void tile_load(const void* from, int64_t stride) {
  for (int r = 0; r < 16; ++r)
    __builtin_memcpy(emulated_tiles[kTile].rows[r], static_cast<const uint8_t*>(from) + r * stride, 64);
}
template <int kTile> inline void tile_store(void* to, int64_t stride) {
  for (int r = 0; r < 16; ++r)
    __builtin_memcpy(static_cast<uint8_t*>(to) + r * stride, emulated_tiles[kTile].rows[r], 64);
}
// TDPBF16PS: c[m][n] += a[m][2k] b[k][2n] + a[m][2k+1] b[k][2n+1], in float.
template <int kC, int kA, int kB> inline void tile_multiply() {
  float c[16][16];
  uint16_t a[16][32], b[16][32];
  __builtin_memcpy(c, &emulated_tiles[kC], sizeof c);
  __builtin_memcpy(a, &emulated_tiles[kA], sizeof a);
  __builtin_memcpy(b, &emulated_tiles[kB], sizeof b);
  const auto wide = [](uint16_t h) {
    const uint32_t bits = uint32_t(h) << 16;
    float x;
    __builtin_memcpy(&x, &bits, sizeof x);
    return x;
  };
  for (int m = 0; m < 16; ++m)
    for (int k = 0; k < 16; ++k)
      for (int n = 0; n < 16; ++n) {
        c[m][n] += wide(a[m][2 * k]) * wide(b[k][2 * n]);
        c[m][n] += wide(a[m][2 * k + 1]) * wide(b[k][2 * n + 1]);
      }
  __builtin_memcpy(&emulated_tiles[kC], c, sizeof c);
}

#endif

}  // namespace
}  // namespace pyfast
#endif

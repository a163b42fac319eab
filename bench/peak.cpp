// The arithmetic this processor does at best: multiply-add loops that touch no memory. Each function runs
// `turns` turns in the calling thread and returns the floating-point operations done, or -1 where the
// processor (or the system, for AMX) does not have the instructions.
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>

namespace {

constexpr int kChains = 12;   // independent sums: they hide the latency (4 cycles, two units) and fit the registers

__attribute__((target("avx512f"))) double fma512(long turns) {
  __m512 sum[kChains], scale = _mm512_set1_ps(0.999f), shift = _mm512_set1_ps(0.5f);
  for (int i = 0; i < kChains; i++) sum[i] = _mm512_set1_ps(i);
  for (long turn = 0; turn < turns; turn++)
#pragma GCC unroll 12
    for (int i = 0; i < kChains; i++) sum[i] = _mm512_fmadd_ps(sum[i], scale, shift);
  for (int i = 0; i < kChains; i++) __asm__ volatile("" ::"v"(sum[i]));  // so that the loop is not dropped
  return 2.0 * 16 * kChains * turns;
}

__attribute__((target("avx2,fma"))) double fma256(long turns) {
  __m256 sum[kChains], scale = _mm256_set1_ps(0.999f), shift = _mm256_set1_ps(0.5f);
  for (int i = 0; i < kChains; i++) sum[i] = _mm256_set1_ps(i);
  for (long turn = 0; turn < turns; turn++)
#pragma GCC unroll 12
    for (int i = 0; i < kChains; i++) sum[i] = _mm256_fmadd_ps(sum[i], scale, shift);
  for (int i = 0; i < kChains; i++) __asm__ volatile("" ::"x"(sum[i]));
  return 2.0 * 8 * kChains * turns;
}

// Products of pairs of bfloat16, both added to a float: four operations a lane.
__attribute__((target("avx512f,avx512bf16"))) double pairs512(long turns) {
  __m512 sum[kChains];
  const __m512bh scale = (__m512bh)_mm512_set1_epi32(0x3f003f00);   // two 0.5
  for (int i = 0; i < kChains; i++) sum[i] = _mm512_set1_ps(i);
  for (long turn = 0; turn < turns; turn++)
#pragma GCC unroll 12
    for (int i = 0; i < kChains; i++) sum[i] = _mm512_dpbf16_ps(sum[i], scale, scale);
  for (int i = 0; i < kChains; i++) __asm__ volatile("" ::"v"(sum[i]));
  return 4.0 * 16 * kChains * turns;
}

struct TileConfig {
  std::uint8_t palette, start_row, reserved[14];
  std::uint16_t row_bytes[16];
  std::uint8_t rows[16];
};

// Four products of 16 x 32 by 32 x 16 bfloat16 tiles a turn, summed in four tiles.
__attribute__((target("amx-tile,amx-bf16"))) double tiles(long turns) {
  TileConfig config{};
  config.palette = 1;
  for (int i = 0; i < 8; i++) config.row_bytes[i] = 64, config.rows[i] = 16;
  // not _tile_loadconfig: g++ 12 drops the stores to `config` before it
  __asm__ volatile("ldtilecfg %0" ::"m"(config));
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_zero(4);
  _tile_zero(5);
  _tile_zero(6);
  _tile_zero(7);
  for (long turn = 0; turn < turns; turn++) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_release();
  return 2.0 * 16 * 16 * 32 * 4 * turns;
}

bool has_tiles() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;   // Linux gives tile registers on request only
  return __builtin_cpu_supports("amx-bf16") && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

}  // namespace

extern "C" {

double pyfast_peak_fma_avx512(long turns) { return __builtin_cpu_supports("avx512f") ? fma512(turns) : -1; }

double pyfast_peak_fma_avx2(long turns) {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? fma256(turns) : -1;
}

double pyfast_peak_avx512_bf16(long turns) {
  return __builtin_cpu_supports("avx512bf16") ? pairs512(turns) : -1;
}

double pyfast_peak_amx_bf16(long turns) { return has_tiles() ? tiles(turns) : -1; }

}  // extern "C"

#include "isa.h"

#include <cstdlib>
#include <cstring>

#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace pyfast {
namespace {

constexpr Isa kLevels[] = {Isa::amx, Isa::avx512_bf16, Isa::avx512, Isa::avx2, Isa::generic};

// Linux gives a process the AMX tile registers only on request (arch_prctl ARCH_REQ_XCOMP_PERM).
bool request_tiles() {
#if defined(__x86_64__) && defined(__linux__)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

Isa best_isa() {
  for (Isa isa : kLevels)
    if (isa_supported(isa)) return isa;
  return Isa::generic;
}

Isa first_choice() {
  const char* forced = std::getenv("PYFAST_CPU_ISA");
  if (forced)
    for (Isa isa : kLevels)
      if (std::strcmp(forced, isa_name(isa)) == 0 && isa_supported(isa)) return isa;
  return best_isa();   // the Python side tells of a PYFAST_CPU_ISA that could not be honoured
}

Isa& chosen() {
  static Isa isa = first_choice();
  return isa;
}

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::amx: return "amx";
    case Isa::avx512_bf16: return "avx512_bf16";
    case Isa::avx512: return "avx512";
    case Isa::avx2: return "avx2";
    default: return "generic";
  }
}

bool isa_supported(Isa isa) {
#ifdef __x86_64__
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (isa == Isa::avx2) return avx2;
  const bool avx512_bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  if (isa == Isa::avx512) return avx512;
  if (isa == Isa::avx512_bf16) return avx512_bf16;
#ifdef PYFAST_EMULATE_TILES
  if (isa == Isa::amx) return avx512;   // plain C++ stands in for the tile instructions
#endif
  if (isa == Isa::amx) {
    static const bool amx = avx512_bf16 && __builtin_cpu_supports("amx-bf16") && request_tiles();
    return amx;
  }
#endif
  return isa == Isa::generic;
}

Isa current_isa() { return chosen(); }

bool rounds_bfloat16() { return current_isa() >= Isa::avx512_bf16 && isa_supported(Isa::avx512_bf16); }

bool select_isa(const char* name) {
  for (Isa isa : kLevels) {
    if (std::strcmp(name, isa_name(isa)) != 0 || !isa_supported(isa)) continue;
    chosen() = isa;
    return true;
  }
  return false;
}

}  // namespace pyfast

// Which vector instructions this processor has, chosen at run time: the build never depends on the machine it runs on.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__)
#define FASTIF_X86 1
#if defined(__linux__) && !defined(__clang__)
// On a plain function: the compiler emits one body per target and the loader picks the best.
#define FASTIF_CLONES __attribute__((target_clones("avx512f", "arch=haswell", "default")))
#endif
#endif
#ifndef FASTIF_CLONES
#define FASTIF_CLONES
#endif

namespace fastif {

enum class Isa { generic, avx2, avx512 };

inline Isa isa() {
#ifdef FASTIF_X86
  static const Isa best = __builtin_cpu_supports("avx512f")                                 ? Isa::avx512
                          : __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? Isa::avx2
                                                                                            : Isa::generic;
  return best;
#else
  return Isa::generic;
#endif
}

inline const char* isa_name() { return isa() == Isa::avx512 ? "avx512" : isa() == Isa::avx2 ? "avx2" : "generic"; }

}  // namespace fastif

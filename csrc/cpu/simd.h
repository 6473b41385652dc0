// One loop, compiled for each instruction set: the compiler vectorises it, the processor chooses at run time.

#pragma once

#include <type_traits>

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define SNOWS_X86 1
#if !defined(__clang__) || __clang_major__ >= 9
#define SNOWS_BFLOAT16 1  // the compiler knows AVX512-BF16
#endif
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"  // gcc 12's own undefined vectors
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif
// Keeps a value in its register, "r" for numbers and addresses or SNOWS_VECTOR: the compiler would load it again for its second use, or
// compute an address anew for every load from it, where loads are what bounds a loop.
#if defined(__x86_64__) || defined(__aarch64__)
#define SNOWS_KEEP(register_kind, value) asm("" : "+" register_kind(value))
#else
#define SNOWS_KEEP(register_kind, value) static_cast<void>(value)
#endif
#ifdef __aarch64__
#define SNOWS_VECTOR "w"
#else
#define SNOWS_VECTOR "v"
#endif
#define SNOWS_INLINE __attribute__((always_inline))  // into the version for each instruction set

namespace snows {

template <typename T> using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;  // what numbers of a type are computed in

enum class Simd { portable, avx2, avx512 };  // portable: vectors of four, which are NEON on Arm
Simd simd();  // as PyTorch chose for this process: ATEN_CPU_CAPABILITY is heard
bool multiplies_bfloat16();  // avx512, and the processor has instructions for products of bfloat16

#ifdef SNOWS_X86
template <typename F>
__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))) auto with_avx512(const F& f) { return f(); }
template <typename F>
__attribute__((target("avx2,fma"))) auto with_avx2(const F& f) { return f(); }
#endif

// f(), whose body and what it calls are SNOWS_INLINE.
template <typename F>
auto vectorised(const F& f) {
#ifdef SNOWS_X86
  if (simd() == Simd::avx512) return with_avx512(f);
  if (simd() == Simd::avx2) return with_avx2(f);
#endif
  return f();
}

}  // namespace snows

// A vector of float32 for each instruction set, under the same names: what is written once over them stands in functions marked SNOWS_SET,
// which is defined where such a text is included.

#pragma once

#include <cstring>

#include "simd.h"

namespace snows::portable {

typedef float Vector __attribute__((vector_size(16)));  // the compiler's: NEON on Arm, SSE2 on x86 without AVX2
constexpr int kLanes = 4;

inline Vector set(float x) { return Vector{x, x, x, x}; }
inline Vector load(const float* from) {
  Vector x;
  std::memcpy(&x, from, sizeof x);
  return x;
}
inline void store(float* to, Vector x) { std::memcpy(to, &x, sizeof x); }
inline Vector add(Vector a, Vector b) { return a + b; }
inline Vector fmadd(Vector a, Vector b, Vector sum) { return a * b + sum; }  // one instruction where the processor has it

}  // namespace snows::portable

#ifdef SNOWS_X86

#define SNOWS_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,popcnt")))
#define SNOWS_AVX2 __attribute__((target("avx2,fma,f16c,popcnt")))

namespace snows::avx512 {

using Vector = __m512;
constexpr int kLanes = 16;

SNOWS_AVX512 inline Vector set(float x) { return _mm512_set1_ps(x); }
SNOWS_AVX512 inline Vector load(const float* from) { return _mm512_loadu_ps(from); }
SNOWS_AVX512 inline void store(float* to, Vector x) { _mm512_storeu_ps(to, x); }
SNOWS_AVX512 inline Vector add(Vector a, Vector b) { return _mm512_add_ps(a, b); }
SNOWS_AVX512 inline Vector fmadd(Vector a, Vector b, Vector sum) { return _mm512_fmadd_ps(a, b, sum); }
SNOWS_AVX512 inline float sum_of(Vector x) { return _mm512_reduce_add_ps(x); }

}  // namespace snows::avx512

namespace snows::avx2 {

using Vector = __m256;
constexpr int kLanes = 8;

SNOWS_AVX2 inline Vector set(float x) { return _mm256_set1_ps(x); }
SNOWS_AVX2 inline Vector load(const float* from) { return _mm256_loadu_ps(from); }
SNOWS_AVX2 inline void store(float* to, Vector x) { _mm256_storeu_ps(to, x); }
SNOWS_AVX2 inline Vector add(Vector a, Vector b) { return _mm256_add_ps(a, b); }
SNOWS_AVX2 inline Vector fmadd(Vector a, Vector b, Vector sum) { return _mm256_fmadd_ps(a, b, sum); }
SNOWS_AVX2 inline float sum_of(Vector x) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1)), two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

}  // namespace snows::avx2

#endif

// One token times a packed weight: the weight is read once, so its bytes rule, and it is read as it is packed.
// AVX-512 selects from registers by the codes (2:4, 1:4) or spreads values by the mask's bits (unstructured).

#include "panels.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstring>

#ifdef SNOWS_X86
#include <immintrin.h>
#endif

namespace snows {

#ifdef SNOWS_X86

namespace {

constexpr int AHEAD = 2048;  // bytes; the processor's own prefetching follows a row of so few bytes late

// 16 stored values and their 32 bits of codes cover 8 groups of 2:4, which are 32 columns.
__attribute__((target("avx512f"))) float dot_2_of_4(const float* values, const uint8_t* codes, const float* x, int64_t columns) {
  const __m512i shifts = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i groups = _mm512_setr_epi32(0, 0, 4, 4, 8, 8, 12, 12, 16, 16, 20, 20, 24, 24, 28, 28);
  const __m512i two_bits = _mm512_set1_epi32(3);
  __m512 sum[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  for (int64_t c = 0, i = 0; c < columns; c += 32, ++i, values += 16, codes += 4) {
    _mm_prefetch(reinterpret_cast<const char*>(values) + AHEAD, _MM_HINT_T0);
    int32_t word;
    std::memcpy(&word, codes, 4);
    const __m512i position = _mm512_and_si512(_mm512_srlv_epi32(_mm512_set1_epi32(word), shifts), two_bits);
    const __m512 chosen = _mm512_permutex2var_ps(_mm512_loadu_ps(x + c), _mm512_add_epi32(position, groups), _mm512_loadu_ps(x + c + 16));
    sum[i % 2] = _mm512_fmadd_ps(_mm512_loadu_ps(values), chosen, sum[i % 2]);
  }
  return _mm512_reduce_add_ps(_mm512_add_ps(sum[0], sum[1]));
}

// 16 stored values and their 32 bits of codes cover 16 groups of 1:4, which are 64 columns.
__attribute__((target("avx512f"))) float dot_1_of_4(const float* values, const uint8_t* codes, const float* x, int64_t columns) {
  const __m512i shifts = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i groups = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 48, 52, 56, 60);
  const __m512i two_bits = _mm512_set1_epi32(3);
  __m512 sum = _mm512_setzero_ps();
  for (int64_t c = 0; c < columns; c += 64, values += 16, codes += 4) {
    _mm_prefetch(reinterpret_cast<const char*>(values) + AHEAD, _MM_HINT_T0);
    int32_t word;
    std::memcpy(&word, codes, 4);
    const __m512i at = _mm512_add_epi32(_mm512_and_si512(_mm512_srlv_epi32(_mm512_set1_epi32(word), shifts), two_bits), groups);
    const __m512 low = _mm512_permutex2var_ps(_mm512_loadu_ps(x + c), at, _mm512_loadu_ps(x + c + 16));
    const __m512 high = _mm512_permutex2var_ps(_mm512_loadu_ps(x + c + 32), at, _mm512_loadu_ps(x + c + 48));
    sum = _mm512_fmadd_ps(_mm512_loadu_ps(values), _mm512_mask_blend_ps(0xff00, low, high), sum);
  }
  return _mm512_reduce_add_ps(sum);
}

// The stored values of 16 columns are spread to where the mask's bits are set; `values` moves on.
__attribute__((target("avx512f,popcnt"))) float dot_masked(const float*& values, const uint8_t* codes, const float* x, int64_t columns) {
  __m512 sum = _mm512_setzero_ps();
  for (int64_t c = 0; c < columns; c += 16, codes += 2) {
    uint16_t mask;
    std::memcpy(&mask, codes, 2);
    sum = _mm512_fmadd_ps(_mm512_maskz_expandloadu_ps(mask, values), _mm512_loadu_ps(x + c), sum);
    values += __builtin_popcount(mask);
  }
  return _mm512_reduce_add_ps(sum);
}

__attribute__((target("popcnt"))) int64_t bits_set(const uint8_t* codes, int64_t bytes) {
  int64_t count = 0, i = 0;
  for (uint64_t word; i + 8 <= bytes; i += 8) {
    std::memcpy(&word, codes + i, 8);
    count += __builtin_popcountll(word);
  }
  for (; i < bytes; ++i) count += __builtin_popcount(codes[i]);
  return count;
}

}  // namespace

bool one_token(const float* x, const float* values, const uint8_t* codes, const float* bias, float* y, int64_t rows, int64_t columns, int64_t n, int64_t m) {
  // Rows must begin with a byte of codes, and end with a whole step.
  const bool two = n == 2 && m == 4 && columns % 32 == 0, one = n == 1 && m == 4 && columns % 64 == 0, masked = m == 0 && columns % 16 == 0;
  if (simd() != Simd::avx512 || !(two || one || masked)) return false;
  const int64_t row_codes = masked ? columns / 8 : columns / m * n / 4;
  const int64_t grain = std::max<int64_t>(1, 65536 / columns);
  at::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    const float* stored = values + (masked ? bits_set(codes, begin * row_codes) : begin * columns / m * n);
    for (int64_t r = begin; r < end; ++r) {
      const uint8_t* code = codes + r * row_codes;
      float sum;
      if (masked) {
        sum = dot_masked(stored, code, x, columns);
      } else {
        sum = two ? dot_2_of_4(stored, code, x, columns) : dot_1_of_4(stored, code, x, columns);
        stored += columns / m * n;
      }
      y[r] = sum + (bias ? bias[r] : 0.0f);
    }
  });
  return true;
}

#else

bool one_token(const float*, const float*, const uint8_t*, const float*, float*, int64_t, int64_t, int64_t, int64_t) { return false; }

#endif

}  // namespace snows

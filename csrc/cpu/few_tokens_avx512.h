// One token times a packed weight with AVX-512, a row at a time: codes select inputs from registers (2:4, 1:4), or the columns that the
// mask's bits name do (unstructured, where the processor can press bytes together; elsewhere the values are spread to where the bits are set).

#pragma once

#include <algorithm>
#include <array>
#include <cstring>

#include "few_tokens.h"

namespace snows::avx512 {

constexpr int AHEAD = 2048;  // bytes; the processor's own prefetching follows a row of so few bytes late

#define SNOWS_AVX512_STEP SNOWS_AVX512 SNOWS_INLINE

// 16-bit values, widened.
SNOWS_AVX512 inline Vector widen(__m256i x, c10::BFloat16) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }
SNOWS_AVX512 inline Vector widen(__m256i x, c10::Half) { return _mm512_cvtph_ps(x); }
template <typename T>
SNOWS_AVX512 inline Vector load(const T* from) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)), T()); }

// The first numbers at `from`, spread to where the mask's bits are set, zeros elsewhere; no number behind them is read.
SNOWS_AVX512 inline __m512 spread(uint16_t mask, const float* from) { return _mm512_maskz_expandloadu_ps(mask, from); }
template <typename T>
SNOWS_AVX512 inline __m512 spread(uint16_t mask, const T* from) {
  const auto first = static_cast<__mmask16>((1u << __builtin_popcount(mask)) - 1);
  return _mm512_maskz_expand_ps(mask, widen(_mm256_maskz_loadu_epi16(first, from), T()));
}

// 16 stored values and their 32 bits of codes cover 8 groups of 2:4, which are 32 columns.
template <typename T>
SNOWS_AVX512 float dot_2_of_4(const T* values, const uint8_t* codes, const float* x, int64_t columns) {
  const __m512i shifts = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i groups = _mm512_setr_epi32(0, 0, 4, 4, 8, 8, 12, 12, 16, 16, 20, 20, 24, 24, 28, 28);
  const __m512i two_bits = _mm512_set1_epi32(3);
  __m512 even = _mm512_setzero_ps(), odd = _mm512_setzero_ps();
  const auto step = [&](__m512& sum) SNOWS_AVX512_STEP {
    int32_t word;
    std::memcpy(&word, codes, 4);
    const __m512i position = _mm512_and_si512(_mm512_srlv_epi32(_mm512_set1_epi32(word), shifts), two_bits);
    const __m512 chosen = _mm512_permutex2var_ps(_mm512_loadu_ps(x), _mm512_or_si512(position, groups), _mm512_loadu_ps(x + 16));
    sum = _mm512_fmadd_ps(load(values), chosen, sum);
    x += 32, values += 16, codes += 4;
  };
  for (; columns >= 64; columns -= 64) {
    _mm_prefetch(reinterpret_cast<const char*>(values) + AHEAD, _MM_HINT_T0);
    if (sizeof(T) == 4) _mm_prefetch(reinterpret_cast<const char*>(values) + AHEAD + 64, _MM_HINT_T0);
    step(even), step(odd);
  }
  if (columns > 0) step(even);
  return _mm512_reduce_add_ps(_mm512_add_ps(even, odd));
}

// 16 stored values and their 32 bits of codes cover 16 groups of 1:4, which are 64 columns.
template <typename T>
SNOWS_AVX512 float dot_1_of_4(const T* values, const uint8_t* codes, const float* x, int64_t columns) {
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
    sum = _mm512_fmadd_ps(load(values), _mm512_mask_blend_ps(0xff00, low, high), sum);
  }
  return _mm512_reduce_add_ps(sum);
}

// The stored values of 16 columns are spread to where the mask's bits are set; `values` moves on.
template <typename T>
SNOWS_AVX512 float dot_spread(const T*& values, const uint8_t* codes, const float* x, int64_t columns) {
  __m512 sum = _mm512_setzero_ps();
  for (int64_t c = 0; c < columns; c += 16, codes += 2) {
    uint16_t mask;
    std::memcpy(&mask, codes, 2);
    sum = _mm512_fmadd_ps(spread(mask, values), _mm512_loadu_ps(x + c), sum);
    values += __builtin_popcount(mask);
  }
  return _mm512_reduce_add_ps(sum);
}

// The first `count` numbers, zeros behind them.
SNOWS_AVX512 inline __m512 first(__mmask16 count, const float* from) { return _mm512_maskz_loadu_ps(count, from); }
template <typename T>
SNOWS_AVX512 inline __m512 first(__mmask16 count, const T* from) { return widen(_mm256_maskz_loadu_epi16(count, from), T()); }

// The numbers of the columns whose bits are set, of 64, are pressed together, and 16 inputs at a time chosen by them.
template <typename T>
__attribute__((target("avx512f,avx512bw,avx512vl,avx512vbmi2,popcnt,bmi2")))
float dot_chosen(const T*& values, const uint8_t* codes, const float* x, int64_t columns) {
  alignas(64) static constexpr auto all = [] {
    std::array<uint8_t, 64> numbers{};
    for (int i = 0; i < 64; ++i) numbers[i] = static_cast<uint8_t>(i);
    return numbers;
  }();
  const __m512i numbers = _mm512_load_si512(all.data()), second_half = _mm512_set1_epi32(32);
  __m512 sum = _mm512_setzero_ps();
  int64_t c = 0;
  for (; c + 64 <= columns; c += 64) {
    uint64_t mask;
    std::memcpy(&mask, codes + c / 8, 8);
    __m512i chosen = _mm512_maskz_compress_epi8(mask, numbers);
    const __m512 x0 = _mm512_loadu_ps(x + c), x1 = _mm512_loadu_ps(x + c + 16), x2 = _mm512_loadu_ps(x + c + 32), x3 = _mm512_loadu_ps(x + c + 48);
    for (int64_t left = __builtin_popcountll(mask); left > 0; left -= 16) {
      const int64_t count = std::min<int64_t>(left, 16);
      const auto some = static_cast<__mmask16>(_bzhi_u32(0xffff, count));
      const __m512i at = _mm512_cvtepu8_epi32(_mm512_castsi512_si128(chosen));
      const __m512 inputs = _mm512_mask_blend_ps(_mm512_test_epi32_mask(at, second_half), _mm512_permutex2var_ps(x0, at, x1),
                                                 _mm512_permutex2var_ps(x2, at, x3));
      sum = _mm512_mask3_fmadd_ps(first(some, values), inputs, sum, some);
      values += count;
      chosen = _mm512_shuffle_i32x4(chosen, chosen, 0x39);
    }
  }
  return _mm512_reduce_add_ps(sum) + dot_spread(values, codes + c / 8, x + c, columns - c);
}

template <typename T>
float dot_masked(const T*& values, const uint8_t* codes, const float* x, int64_t columns) {
  static const bool presses = __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("bmi2");
  return presses ? dot_chosen(values, codes, x, columns) : dot_spread(values, codes, x, columns);
}

template <typename T>
void rows_of_groups(const Weight<T>& w, int64_t n, int64_t begin, int64_t end) {
  const int64_t values = w.columns / 4 * n, codes = w.columns / 16 * n;
  for (int64_t r = begin; r < end; ++r) {
    const T* stored = w.values + r * values;
    const uint8_t* code = w.codes + r * codes;
    w.y[r] = (n == 2 ? dot_2_of_4(stored, code, w.x, w.columns) : dot_1_of_4(stored, code, w.x, w.columns)) + w.bias_of(r);
  }
}

template <typename T>
void rows_of_masks(const Weight<T>& w, int64_t begin, int64_t end) {
  const T* stored = w.values + bits_set(w.codes, begin * w.columns / 8);
  for (int64_t r = begin; r < end; ++r) w.y[r] = dot_masked(stored, w.codes + r * w.columns / 8, w.x, w.columns) + w.bias_of(r);
}

}  // namespace snows::avx512

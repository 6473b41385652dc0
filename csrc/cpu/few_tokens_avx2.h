// Up to four tokens times a packed weight with AVX2.
//
// 2:4 and 1:4: a group of four columns is half a vector, within which vpermilps chooses by two bits of each lane. So the inputs are laid out once a
// call: each vector of x holds one group in either half, and blends put together what was chosen. The positions of R rows are shifted out of
// their codes once and used for N tokens, and a vector of x once loaded serves R rows.
// Unstructured: a table names, for every 8 bits of the mask, which of the next stored values goes to which lane.

#pragma once

#include <algorithm>
#include <array>
#include <cstring>
#include <vector>

#include "few_tokens.h"

namespace snows::avx2 {

#define SNOWS_AVX2_STEP SNOWS_AVX2 SNOWS_INLINE

// 16-bit values, widened.
SNOWS_AVX2 inline Vector widen(__m128i x, c10::BFloat16) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16)); }
SNOWS_AVX2 inline Vector widen(__m128i x, c10::Half) { return _mm256_cvtph_ps(x); }
template <typename T>
SNOWS_AVX2 inline Vector load(const T* from) { return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)), T()); }

// Up to how many tokens these kernels are faster than the panels, measured on a Zen 3 core; n is 0 of an unstructured weight. What they do to
// a mask's 8 bits does not depend on how many are set, so panels take over where few are.
inline int64_t most_tokens(int64_t n, int64_t stored, int64_t all) {
  if (n == 0) return 4 * stored > all ? 4 : 0;
  return n == 2 ? 4 : 3;
}

// 2:4 and 1:4: V vectors of x, 2 or 4, serve 8 stored values and their 16 bits of codes. A step takes twice as many; what is left of a row is
// one step with zeros behind it.
template <int V>
struct Groups {
  static constexpr int64_t kStep = 16 * V;  // columns; 16 values, 4 bytes of codes
  static int64_t padded(int64_t columns) { return (columns + kStep - 1) / kStep * kStep; }

  // Of the 2 V groups that serve 8 values, number g is in vector g % V, in its upper half from V on.
  static void arrange(const float* from, int64_t columns, float* to) {
    for (int64_t group = 0; group < columns / 4; ++group)
      std::memcpy(to + (group / (2 * V) * V + group % V) * 8 + group / V % 2 * 4, from + 4 * group, 16);
  }

  SNOWS_AVX2_STEP static inline __m256 choose(const __m256 (&x)[V], __m256i at) {
    if constexpr (V == 2)
      return _mm256_blend_ps(_mm256_permutevar_ps(x[0], at), _mm256_permutevar_ps(x[1], at), 0xcc);
    else
      return _mm256_blend_ps(_mm256_blend_ps(_mm256_permutevar_ps(x[0], at), _mm256_permutevar_ps(x[1], at), 0x22),
                             _mm256_blend_ps(_mm256_permutevar_ps(x[2], at), _mm256_permutevar_ps(x[3], at), 0x88), 0xcc);
  }

  // R rows, `row` and others that lie `apart`, times N tokens.
  template <int R, int N, typename T>
  SNOWS_AVX2 static void rows(const Weight<T>& w, int64_t row, int64_t apart) {
    const int64_t row_values = w.columns / V, row_codes = w.columns / (4 * V), of_x = padded(w.columns), steps = w.columns / kStep;
    const __m256i low = _mm256_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14), high = _mm256_setr_epi32(16, 18, 20, 22, 24, 26, 28, 30);
    __m256 sums[R][N];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) sums[r][n] = _mm256_setzero_ps();
    const auto step = [&](const T* values, int64_t next_values, const uint8_t* codes, int64_t next_codes, const float* x) SNOWS_AVX2_STEP {
      __m256i at[R][2];  // vpermilps reads the two lowest bits alone
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        int32_t word;
        std::memcpy(&word, codes + r * next_codes, 4);
        at[r][0] = _mm256_srlv_epi32(_mm256_set1_epi32(word), low), at[r][1] = _mm256_srlv_epi32(_mm256_set1_epi32(word), high);
      }
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) {
          __m256 in[V];
#pragma GCC unroll 4
          for (int v = 0; v < V; ++v) in[v] = _mm256_loadu_ps(x + n * of_x + 8 * (V * half + v));
#pragma GCC unroll 4
          for (int r = 0; r < R; ++r)
            sums[r][n] = _mm256_fmadd_ps(choose(in, at[r][half]), load(values + r * next_values + 8 * half), sums[r][n]);
        }
      }
    };
    const T* values = w.values + row * row_values;
    const uint8_t* codes = w.codes + row * row_codes;
    for (int64_t s = 0; s < steps; ++s) step(values + 16 * s, apart * row_values, codes + 4 * s, apart * row_codes, w.x + kStep * s);
    if (w.columns > steps * kStep) {
      T last[R][16] = {};
      uint8_t last_codes[R][4] = {};
      for (int64_t r = 0; r < R; ++r) {
        std::copy_n(values + r * apart * row_values + 16 * steps, row_values - 16 * steps, last[r]);
        std::copy_n(codes + r * apart * row_codes + 4 * steps, row_codes - 4 * steps, last_codes[r]);
      }
      step(last[0], 16, last_codes[0], 4, w.x + kStep * steps);
    }
    for (int r = 0; r < R; ++r)
      for (int n = 0; n < N; ++n) w.y[n * w.rows + row + r * apart] = sum_of(sums[r][n]) + w.bias_of(row + r * apart);
  }

  // Rows that are multiplied together are a quarter (or half) of all apart, not neighbours: so the processor sees R long streams, and
  // fetches ahead in each. Neighbours, of a few KiB each, took twice as long where the weight came from memory.
  template <int N, typename T>
  static void all(const Weight<T>& w, int64_t begin, int64_t end) {
    constexpr int R = N <= 2 ? 4 : 2;  // as many rows as keep their sums, positions and inputs in 16 registers
    const int64_t apart = (end - begin) / R;
    for (int64_t r = 0; r < apart; ++r) rows<R, N>(w, begin + r, apart);
    for (int64_t r = begin + R * apart; r < end; ++r) rows<1, N>(w, r, 1);
  }
};

// For every 8 bits of a mask: a lane's byte is 0x80 and which value it gets, or 0 where its bit is not set.
alignas(64) inline constexpr auto kPlaces = [] {
  std::array<std::array<uint8_t, 8>, 256> lanes{};
  for (int mask = 0; mask < 256; ++mask)
    for (int i = 0, value = 0; i < 8; ++i)
      if (mask >> i & 1) lanes[mask][i] = static_cast<uint8_t>(0x80 | value++);
  return lanes;
}();

// A row times N tokens; 8 values are read wherever one is stored. Returns where the next row's values are.
template <int N, typename T>
SNOWS_AVX2 const T* masked_row(const Weight<T>& w, const T* values, int64_t row) {
  const __m256 zero = _mm256_setzero_ps();
  __m256 sums[2][N];
  for (auto& half : sums)
    for (auto& sum : half) sum = zero;
  const auto step = [&](uint8_t mask, const float* x, __m256 (&to)[N]) SNOWS_AVX2_STEP {
    int64_t bytes;
    std::memcpy(&bytes, kPlaces[mask].data(), 8);
    const __m256i lanes = _mm256_cvtepi8_epi32(_mm_cvtsi64_si128(bytes));
    const __m256 stored = _mm256_blendv_ps(zero, _mm256_permutevar8x32_ps(load(values), lanes), _mm256_castsi256_ps(lanes));
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) to[n] = _mm256_fmadd_ps(stored, _mm256_loadu_ps(x + n * w.columns), to[n]);
    values += __builtin_popcount(mask);
  };
  const uint8_t* codes = w.codes + row * w.columns / 8;
  int64_t i = 0;
  for (; i + 4 <= w.columns / 8; i += 4) {
    uint32_t masks;
    std::memcpy(&masks, codes + i, 4);
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) step(static_cast<uint8_t>(masks >> 8 * k), w.x + 8 * (i + k), sums[k % 2]);
  }
  for (; i < w.columns / 8; ++i) step(codes[i], w.x + 8 * i, sums[0]);
  for (int n = 0; n < N; ++n) w.y[n * w.rows + row] = sum_of(_mm256_add_ps(sums[0][n], sums[1][n])) + w.bias_of(row);
  return values;
}

template <int N, typename T>
void all_masked(const Weight<T>& w, int64_t begin, int64_t end) {
  const T* values = w.values + bits_set(w.codes, begin * w.columns / 8);
  for (; begin < end && w.end - values >= w.columns + 8; ++begin) values = masked_row<N>(w, values, begin);
  if (begin == end) return;
  std::vector<T> last(values, w.end);  // no value behind the last one is read
  last.resize(last.size() + 8, T(0));
  for (values = last.data(); begin < end; ++begin) values = masked_row<N>(w, values, begin);
}

// f with the number of tokens as a constant.
template <typename F>
void with_tokens(int64_t tokens, const F& f) {
  if (tokens == 1) return f(std::integral_constant<int, 1>());
  if (tokens == 2) return f(std::integral_constant<int, 2>());
  if (tokens == 3) return f(std::integral_constant<int, 3>());
  f(std::integral_constant<int, 4>());
}

// The inputs as the kernels of n:4 read them, zeros behind the last column; w.x is then those. Unstructured, n is 0 and they stay.
template <typename T>
std::vector<float> arrange(Weight<T>& w, int64_t n) {
  if (n == 0) return {};
  const int64_t padded = n == 2 ? Groups<2>::padded(w.columns) : Groups<4>::padded(w.columns);
  std::vector<float> inputs(w.tokens * padded);
  for (int64_t t = 0; t < w.tokens; ++t) (n == 2 ? Groups<2>::arrange : Groups<4>::arrange)(w.x + t * w.columns, w.columns, inputs.data() + t * padded);
  w.x = inputs.data();
  return inputs;
}

template <typename T>
void rows_of_groups(const Weight<T>& w, int64_t n, int64_t begin, int64_t end) {
  with_tokens(w.tokens, [&](auto tokens) { n == 2 ? Groups<2>::all<tokens()>(w, begin, end) : Groups<4>::all<tokens()>(w, begin, end); });
}

template <typename T>
void rows_of_masks(const Weight<T>& w, int64_t begin, int64_t end) {
  with_tokens(w.tokens, [&](auto tokens) { all_masked<tokens()>(w, begin, end); });
}

}  // namespace snows::avx2

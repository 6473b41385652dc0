// The product of panels.h for weights and activations in bfloat16, on processors that multiply it (AVX512-BF16).

#include "panels.h"

namespace snows {

#ifdef SNOWS_BFLOAT16

namespace {

#define SNOWS_AVX512_BFLOAT16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16")))

// Two columns of a step, interleaved: 16 tokens' pairs in each register.
struct Interleaved {
  __m512bh low, high;
};
SNOWS_AVX512_BFLOAT16 inline Interleaved interleave(const float* x, const float* y) {
  __m512i one = _mm512_load_si512(x), other = _mm512_load_si512(y);
  SNOWS_KEEP("v", one);
  SNOWS_KEEP("v", other);
  return {(__m512bh)_mm512_unpacklo_epi16(one, other), (__m512bh)_mm512_unpackhi_epi16(one, other)};
}

SNOWS_AVX512_BFLOAT16 inline __m512bh twice(const float* weights) { return (__m512bh)_mm512_set1_ps(*weights); }

template <int V>
SNOWS_AVX512_BFLOAT16 void run(const Part& p) {
  const float* w = p.weights;
  const uint16_t* c = p.lines;
  for (const Pair* pair = p.pairs; pair < p.pairs + p.count; ++pair) {
    float* first = p.sums + pair->first * 32 * V;
    float* second = p.sums + pair->second * 32 * V;
    __m512 a[2 * V], b[2 * V];
    if (p.bias) {
#pragma GCC unroll 8
      for (int v = 0; v < 2 * V; ++v) a[v] = _mm512_set1_ps(p.bias[pair->first]), b[v] = _mm512_set1_ps(p.bias[pair->second]);
    } else {
#pragma GCC unroll 8
      for (int v = 0; v < 2 * V; ++v) a[v] = _mm512_load_ps(first + 16 * v), b[v] = _mm512_load_ps(second + 16 * v);
    }
    for (int i = pair->shared; i > 0; --i, w += 2, c += 2) {
      const auto all = together<uint32_t>(c);
      const float *x = p.at(all), *y = p.at(all >> 16);
      const __m512bh of_first = twice(w), of_second = twice(w + 1);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) {
        const Interleaved tokens = interleave(x + 16 * v, y + 16 * v);
        a[2 * v] = _mm512_dpbf16_ps(a[2 * v], of_first, tokens.low);
        b[2 * v] = _mm512_dpbf16_ps(b[2 * v], of_second, tokens.low);
        a[2 * v + 1] = _mm512_dpbf16_ps(a[2 * v + 1], of_first, tokens.high);
        b[2 * v + 1] = _mm512_dpbf16_ps(b[2 * v + 1], of_second, tokens.high);
      }
    }
    for (int i = pair->both; i > 0; --i, w += 2, c += 4) {
      const auto all = together<uint64_t>(c);
      const float *x = p.at(all), *y = p.at(all >> 16), *s = p.at(all >> 32), *t = p.at(all >> 48);
      const __m512bh of_first = twice(w), of_second = twice(w + 1);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) {
        const Interleaved one = interleave(x + 16 * v, y + 16 * v), other = interleave(s + 16 * v, t + 16 * v);
        a[2 * v] = _mm512_dpbf16_ps(a[2 * v], of_first, one.low);
        a[2 * v + 1] = _mm512_dpbf16_ps(a[2 * v + 1], of_first, one.high);
        b[2 * v] = _mm512_dpbf16_ps(b[2 * v], of_second, other.low);
        b[2 * v + 1] = _mm512_dpbf16_ps(b[2 * v + 1], of_second, other.high);
      }
    }
    for (int i = pair->rest; i > 0; --i, ++w, c += 2) {
      const auto all = together<uint32_t>(c);
      const float *x = p.at(all), *y = p.at(all >> 16);
      const __m512bh of_first = twice(w);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) {
        const Interleaved tokens = interleave(x + 16 * v, y + 16 * v);
        a[2 * v] = _mm512_dpbf16_ps(a[2 * v], of_first, tokens.low);
        a[2 * v + 1] = _mm512_dpbf16_ps(a[2 * v + 1], of_first, tokens.high);
      }
    }
#pragma GCC unroll 8
    for (int v = 0; v < 2 * V; ++v) _mm512_store_ps(first + 16 * v, a[v]), _mm512_store_ps(second + 16 * v, b[v]);
  }
}

}  // namespace

void multiply_bfloat16(const Part& part) {
  static constexpr void (*all[])(const Part&) = {run<1>, run<2>, run<3>, run<4>};
  all[part.vectors - 1](part);
}

SNOWS_AVX512_BFLOAT16 void part_columns(float* panel, int64_t pairs, int64_t vectors) {
  const __m512i lower_half = _mm512_set1_epi32(0xffff);
  for (int64_t i = 0; i < pairs; ++i, panel += 32 * vectors) {
    __m512i first[4], second[4];
    for (int64_t v = 0; v < vectors; ++v) {
      const __m512i low = _mm512_load_si512(panel + 32 * v), high = _mm512_load_si512(panel + 32 * v + 16);
      first[v] = _mm512_packus_epi32(_mm512_and_si512(low, lower_half), _mm512_and_si512(high, lower_half));
      second[v] = _mm512_packus_epi32(_mm512_srli_epi32(low, 16), _mm512_srli_epi32(high, 16));
    }
    for (int64_t v = 0; v < vectors; ++v) {
      _mm512_store_si512(panel + 16 * v, first[v]);
      _mm512_store_si512(panel + 16 * (vectors + v), second[v]);
    }
  }
}

SNOWS_AVX512_BFLOAT16 void round_pairs(const float* sums, int64_t stride, float* out, int64_t out_stride, int64_t pairs, int64_t tokens) {
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i beside = _mm512_or_si512(lanes, _mm512_slli_epi32(_mm512_add_epi32(lanes, _mm512_set1_epi32(16)), 16));
  for (int64_t i = 0; i < pairs; ++i, sums += 2 * stride, out += out_stride)
    for (int64_t t = 0; t < tokens; t += 16) {
      const __m512bh both = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(sums + stride + t), _mm512_loadu_ps(sums + t));
      _mm512_storeu_si512(out + t, _mm512_permutexvar_epi16(beside, (__m512i)both));
    }
}

SNOWS_AVX512_BFLOAT16 void interleave_halves(float* lines, int64_t count) {
  const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
  for (; count > 0; --count, lines += 16) _mm512_store_si512(lines, _mm512_permutexvar_epi64(order, _mm512_load_si512(lines)));
}

SNOWS_AVX512_BFLOAT16 void round_row(const float* sums, int64_t count, at::BFloat16* out) {
  for (; count > 0; count -= 16, sums += 16, out += 16) {
    const auto some = static_cast<__mmask16>(count < 16 ? (1 << count) - 1 : 0xffff);
    _mm256_mask_storeu_epi16(out, some, (__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(some, sums)));
  }
}

#else

void multiply_bfloat16(const Part&) {}
void part_columns(float*, int64_t, int64_t) {}
void round_pairs(const float*, int64_t, float*, int64_t, int64_t, int64_t) {}
void interleave_halves(float*, int64_t) {}
void round_row(const float*, int64_t, at::BFloat16*) {}

#endif

}  // namespace snows

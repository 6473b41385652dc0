// The product of product.h: its inner loop for each instruction set, chosen at run time, and what brings activations into panels.

#include "product.h"

#include <algorithm>

#include "vector.h"

namespace snows {

#define SNOWS_SET
namespace portable {
#include "panel_kernel.h"
}
#undef SNOWS_SET

#ifdef SNOWS_X86

#define SNOWS_SET SNOWS_AVX512
namespace avx512 {
#include "panel_kernel.h"
}
#undef SNOWS_SET
#define SNOWS_SET SNOWS_AVX2
namespace avx2 {
#include "panel_kernel.h"
}
#undef SNOWS_SET

#endif

namespace {

#ifdef SNOWS_X86

template <int V>
SNOWS_AVX512 void run_avx512(const Part& p) { avx512::multiply_pairs<V>(p, 16 * V, 0); }

__attribute__((target("avx2"))) void transpose_8x8(const float* in, int64_t in_stride, float* out, int64_t out_stride) {
  __m256 a[8], b[8];
  for (int i = 0; i < 8; ++i) a[i] = _mm256_loadu_ps(in + i * in_stride);
  for (int i = 0; i < 8; i += 2) {
    b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
  }
  for (int i = 0; i < 8; i += 4)
    for (int j = 0; j < 2; ++j) {
      a[i + 2 * j] = _mm256_shuffle_ps(b[i + j], b[i + j + 2], 0x44);
      a[i + 2 * j + 1] = _mm256_shuffle_ps(b[i + j], b[i + j + 2], 0xee);
    }
  for (int i = 0; i < 4; ++i) {
    _mm256_storeu_ps(out + i * out_stride, _mm256_permute2f128_ps(a[i], a[i + 4], 0x20));
    _mm256_storeu_ps(out + (i + 4) * out_stride, _mm256_permute2f128_ps(a[i], a[i + 4], 0x31));
  }
}

// Every register takes four columns of four rows in its four quarters; a 4 x 4 transposition of the quarters ends it.
template <bool Past>  // the caches: whole lines that are not read before they are written
__attribute__((target("avx512f"))) void transpose_16x4(const float* in, int64_t in_stride, float* out, int64_t out_stride) {
  __m512 a[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    a[i] = _mm512_broadcast_f32x4(_mm_loadu_ps(in + i * in_stride));
    a[i] = _mm512_mask_broadcast_f32x4(a[i], 0x00f0, _mm_loadu_ps(in + (i + 4) * in_stride));
    a[i] = _mm512_mask_broadcast_f32x4(a[i], 0x0f00, _mm_loadu_ps(in + (i + 8) * in_stride));
    a[i] = _mm512_mask_broadcast_f32x4(a[i], 0xf000, _mm_loadu_ps(in + (i + 12) * in_stride));
  }
  const __m512 b[4] = {_mm512_unpacklo_ps(a[0], a[1]), _mm512_unpackhi_ps(a[0], a[1]), _mm512_unpacklo_ps(a[2], a[3]), _mm512_unpackhi_ps(a[2], a[3])};
  const auto store = [](float* to, __m512 x) __attribute__((target("avx512f"))) { Past ? _mm512_stream_ps(to, x) : _mm512_storeu_ps(to, x); };
  store(out, _mm512_shuffle_ps(b[0], b[2], 0x44));
  store(out + out_stride, _mm512_shuffle_ps(b[0], b[2], 0xee));
  store(out + 2 * out_stride, _mm512_shuffle_ps(b[1], b[3], 0x44));
  store(out + 3 * out_stride, _mm512_shuffle_ps(b[1], b[3], 0xee));
}

// Four 4 x 4 transpositions within the quarters of registers, then one of the quarters themselves.
__attribute__((target("avx512f"), always_inline)) inline void transpose_16x16(__m512 (&a)[16]) {
  __m512 b[16];
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    const __m512 c[4] = {_mm512_unpacklo_ps(a[i], a[i + 1]), _mm512_unpackhi_ps(a[i], a[i + 1]),
                         _mm512_unpacklo_ps(a[i + 2], a[i + 3]), _mm512_unpackhi_ps(a[i + 2], a[i + 3])};
    b[i] = _mm512_shuffle_ps(c[0], c[2], 0x44), b[i + 1] = _mm512_shuffle_ps(c[0], c[2], 0xee);
    b[i + 2] = _mm512_shuffle_ps(c[1], c[3], 0x44), b[i + 3] = _mm512_shuffle_ps(c[1], c[3], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512 c[4] = {_mm512_shuffle_f32x4(b[i], b[i + 4], 0x44), _mm512_shuffle_f32x4(b[i], b[i + 4], 0xee),
                         _mm512_shuffle_f32x4(b[i + 8], b[i + 12], 0x44), _mm512_shuffle_f32x4(b[i + 8], b[i + 12], 0xee)};
    a[i] = _mm512_shuffle_f32x4(c[0], c[2], 0x88), a[i + 4] = _mm512_shuffle_f32x4(c[0], c[2], 0xdd);
    a[i + 8] = _mm512_shuffle_f32x4(c[1], c[3], 0x88), a[i + 12] = _mm512_shuffle_f32x4(c[1], c[3], 0xdd);
  }
}

// 16 words from 16 pieces, where they are: of float a number each, of bfloat16 two.
__attribute__((target("avx512f,avx512bw,bmi2"), always_inline)) inline void words_of_pieces(const Piece* pieces, int64_t at, int64_t size, __m512 (&out)[16]) {
  const int64_t most = 64 / size;
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    const int64_t begin = std::clamp<int64_t>(pieces[i].begin - at, 0, most), end = std::clamp<int64_t>(pieces[i].end - at, 0, most);
    const uint32_t mask = _bzhi_u32(~0u, end) & ~_bzhi_u32(~0u, begin);
    const char* from = static_cast<const char*>(pieces[i].from) + at * size;
    out[i] = size == 4 ? _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), from) : _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(mask, from));
  }
  transpose_16x16(out);
}

__attribute__((target("avx512f,avx512bw,bmi2"))) void lines_of_pieces_avx512(const Piece* pieces, int64_t count, int64_t size, float* lines) {
  for (int64_t at = 0; at < count; at += 64 / size) {
    const int64_t many = std::min(count - at, 64 / size);
    __m512 low[16], high[16];
    words_of_pieces(pieces, at, size, low);
    if (size == 4) {
      for (int64_t i = 0; i < many; ++i) _mm512_store_ps(lines + 16 * (at + i), low[i]);
      continue;
    }
    words_of_pieces(pieces + 16, at, size, high);
    const __m512i lower_half = _mm512_set1_epi32(0xffff);
    for (int64_t i = 0; i < many; i += 2) {  // two columns a word
      const __m512i a = _mm512_castps_si512(low[i / 2]), b = _mm512_castps_si512(high[i / 2]);
      _mm512_store_si512(lines + 16 * (at + i), _mm512_packus_epi32(_mm512_and_si512(a, lower_half), _mm512_and_si512(b, lower_half)));
      _mm512_store_si512(lines + 16 * (at + i + 1), _mm512_packus_epi32(_mm512_srli_epi32(a, 16), _mm512_srli_epi32(b, 16)));
    }
  }
}

#endif

void transpose_4x4(const float* in, int64_t in_stride, float* out, int64_t out_stride) {
  for (int64_t j = 0; j < 4; ++j, ++in, out += out_stride) portable::store(out, portable::Vector{in[0], in[in_stride], in[2 * in_stride], in[3 * in_stride]});
}

}  // namespace

void product(const Part& p) {
#ifdef SNOWS_X86
  static constexpr void (*avx512[])(const Part&) = {run_avx512<1>, run_avx512<2>, run_avx512<3>, run_avx512<4>,
                                                    run_avx512<5>, run_avx512<6>, run_avx512<7>, run_avx512<8>};
  if (simd() == Simd::avx512) return avx512[p.vectors - 1](p);
  if (simd() == Simd::avx2) return p.lanes == 8 ? avx2::multiply_parts<6, 32>(p) : avx2::multiply_parts<6, 64>(p);
#endif
#ifdef __aarch64__
  constexpr int kMost = 6;
#else
  constexpr int kMost = 2;  // 16 registers
#endif
  p.lanes == 8 ? portable::multiply_parts<kMost, 32>(p) : portable::multiply_parts<kMost, 64>(p);
}

void transpose(const float* in, int64_t in_stride, float* out, int64_t out_stride, int64_t rows, int64_t columns, bool past) {
  const int64_t side = simd() == Simd::portable ? 4 : 8, whole = columns / side * side;
  int64_t row = 0;  // whole columns of the rows before it are done
  auto tiles = [&](auto tile, int64_t high, int64_t wide) {
    const int64_t end = rows / high * high;
    for (int64_t first = 0; first < whole; first += 16)  // a cache line of every row, and no more lines written at once
      for (int64_t i = row; i < end; i += high)
        for (int64_t j = first; j < std::min(first + 16, whole); j += wide)
          tile(in + i * in_stride + j, in_stride, out + j * out_stride + i, out_stride);
    row = std::max(row, end);
  };
#ifdef SNOWS_X86
  past = past && out_stride % 16 == 0 && reinterpret_cast<uintptr_t>(out) % 64 == 0;
  if (simd() == Simd::avx512) tiles(past ? transpose_16x4<true> : transpose_16x4<false>, 16, 4);
  if (past) _mm_sfence();  // before another thread reads
  if (simd() != Simd::portable) tiles(transpose_8x8, 8, 8);
#endif
  if (simd() == Simd::portable) tiles(transpose_4x4, 4, 4);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = i < row ? whole : 0; j < columns; ++j) out[j * out_stride + i] = in[i * in_stride + j];
}

void lines_of_pieces(const Piece* pieces, int64_t count, int64_t size, float* lines) {
#ifdef SNOWS_X86
  lines_of_pieces_avx512(pieces, count, size, lines);
#endif
}

}  // namespace snows

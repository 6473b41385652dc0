// The product of panels.h: three versions of its inner loop, chosen at run time, and what surrounds it.

#include "panels.h"

#include "vector.h"

#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/relu.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

namespace snows {

namespace {

void run_portable(const Part& p) {
  const int64_t tokens = p.lanes * p.vectors;
  const float* w = p.weights;
  const uint16_t* c = p.lines;
  const auto at = [&p](uint16_t line) { return static_cast<const float*>(p.panel) + int64_t(line) * p.lanes; };
  for (const Pair* pair = p.pairs; pair < p.pairs + p.count; ++pair) {
    float* __restrict first = p.sums + pair->first * tokens;
    float* __restrict second = p.sums + pair->second * tokens;
    if (p.bias) std::fill_n(first, tokens, p.bias[pair->first]), std::fill_n(second, tokens, p.bias[pair->second]);
    auto add = [tokens](float* __restrict sum, float weight, const float* __restrict x) {
      for (int64_t t = 0; t < tokens; ++t) sum[t] += weight * x[t];
    };
    for (int i = 0; i < pair->shared; ++i, w += 2, ++c) add(first, w[0], at(c[0])), add(second, w[1], at(c[0]));
    for (int i = 0; i < pair->both; ++i, w += 2, c += 2) add(first, w[0], at(c[0])), add(second, w[1], at(c[1]));
    for (int i = 0; i < pair->rest; ++i, ++w, ++c) add(first, w[0], at(c[0]));
  }
}

#ifdef SNOWS_X86

}  // namespace

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

namespace {

template <int V>
SNOWS_AVX512 void run_avx512(const Part& p) { avx512::multiply_pairs<V>(p, 16 * V, 0); }

// 16 registers hold 6 vectors of sums for each row, two weights and what is loaded. A wider panel is cut into equal parts.
template <int Line>
SNOWS_AVX2 void run_avx2(const Part& p) {
  static constexpr void (*parts[])(const Part&, int64_t, int64_t) = {
      avx2::multiply_pairs<1, 2, Line>, avx2::multiply_pairs<2, 2, Line>, avx2::multiply_pairs<3, 1, Line>,
      avx2::multiply_pairs<4, 1, Line>, avx2::multiply_pairs<5, 1, Line>, avx2::multiply_pairs<6, 1, Line>};
  const int64_t width = p.lanes * p.vectors;
  for (int64_t token = 0, left = p.half ? 1 : width / 8, now; left > 0; left -= now, token += 8 * now) {
    const int64_t rest = (left + 5) / 6;
    now = (left + rest - 1) / rest;
    parts[now - 1](p, width, token);
  }
}

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

void run(const Part& p, bool bfloat16) {
  if (bfloat16) return multiply_bfloat16(p);
#ifdef SNOWS_X86
  static constexpr void (*avx512[])(const Part&) = {run_avx512<1>, run_avx512<2>, run_avx512<3>, run_avx512<4>,
                                                    run_avx512<5>, run_avx512<6>, run_avx512<7>, run_avx512<8>};
  if (simd() == Simd::avx512) return avx512[p.vectors - 1](p);
  if (simd() == Simd::avx2) return p.lanes == 8 ? run_avx2<32>(p) : run_avx2<64>(p);
#endif
  run_portable(p);
}

}  // namespace

Simd simd() {
  static const Simd chosen = [] {
    const std::string capability = at::get_cpu_capability();
    return capability == "AVX512" ? Simd::avx512 : capability == "AVX2" ? Simd::avx2 : Simd::portable;
  }();
  return chosen;
}

bool multiplies_bfloat16() {
#ifdef SNOWS_BFLOAT16
  static const bool known = __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw");
  return known && simd() == Simd::avx512;
#else
  return false;
#endif
}

Origin Origin::of(const at::Tensor& values, const at::Tensor& codes) {
  constexpr int64_t kSamples = 16;
  const auto mix = [](uint64_t hash, uint64_t x) { return (hash ^ x) * 0x9e3779b97f4a7c15u + (hash >> 29); };
  uint64_t sample = 0;
  for (const at::Tensor* x : {&values, &codes}) {
    const auto* bytes = static_cast<const uint8_t*>(x->const_data_ptr());
    const int64_t size = x->element_size(), count = x->numel();
    sample = mix(sample, count * 16 + size);
    for (int64_t i = 0; i < std::min(count, kSamples); ++i) {
      uint64_t number = 0;
      std::memcpy(&number, bytes + (count <= kSamples ? i : i * (count - 1) / (kSamples - 1)) * size, size);
      sample = mix(sample, number);
    }
  }
  const auto changes = [](const at::Tensor& x) { return x.is_inference() ? 0u : x.unsafeGetTensorImpl()->version_counter().current_version(); };
  const auto place = [](const at::Tensor& x) { return reinterpret_cast<uintptr_t>(x.const_data_ptr()); };
  return {sample, mix(place(values), place(codes)), uint32_t(changes(values)) * 0x10001u + uint32_t(changes(codes))};
}

int64_t Order::words() const {
  return kHeader + 2 * chunks() * blocks() + (rows + 1) / 2 * blocks() * int64_t(sizeof(Pair) / 4) + entries + (steps + 1) / 2;
}

Order Order::read(const char* op, const at::Tensor& words, const at::Tensor& values, const at::Tensor& codes, at::IntArrayRef shape) {
  check_device(op, "the order", words, values.device());
  TORCH_CHECK_VALUE(words.scalar_type() == at::kInt && words.is_contiguous() && words.numel() >= kHeader, op, ": expected an order as kernel_order makes it, got ",
                    words.sizes(), " ", words.scalar_type());
  const int32_t* p = words.const_data_ptr<int32_t>();
  Order o{p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7], nullptr, nullptr, nullptr, nullptr};
  Origin origin;
  std::memcpy(&origin.sample, p + 8, 8), std::memcpy(&origin.place, p + 10, 8), std::memcpy(&origin.changes, p + 12, 4);
  const int64_t taps = shape.size() == 4 ? shape[2] * shape[3] : 1;
  TORCH_CHECK_VALUE(o.rows == shape[0] && o.channels == shape[1] && o.taps == taps && o.block > 0 && o.vectors > 0 && o.steps >= 0 && o.entries >= 0 &&
                        o.words() == words.numel() && origin.same(Origin::of(values, codes)),
                    op, ": expected the order that kernel_order makes of this weight, got that of another, or of what it was before it changed");
  o.starts = p + kHeader;
  o.pairs = reinterpret_cast<const Pair*>(o.starts + 2 * o.chunks() * o.blocks());
  o.weights = reinterpret_cast<const float*>(o.pairs + (o.rows + 1) / 2 * o.blocks());
  o.lines = reinterpret_cast<const uint16_t*>(o.weights + o.entries);
  return o;
}

float* Scratch::floats(int64_t count) {
  if (static_cast<int64_t>(memory_.size()) < count + 16) memory_ = std::vector<float>(count + 16);
  return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory_.data()) + 63) / 64 * 64);
}

void transpose(const float* in, int64_t in_stride, float* out, int64_t out_stride, int64_t rows, int64_t columns, bool past) {
  int64_t row = 0, whole = 0;  // whole columns of the rows before `row` are done
#ifdef SNOWS_X86
  auto tiles = [&](auto tile, int64_t high, int64_t wide, int64_t end, int64_t whole_columns) {
    for (int64_t first = 0; first < whole_columns; first += 16)  // a cache line of every row, and no more lines written at once
      for (int64_t i = row; i < end; i += high)
        for (int64_t j = first; j < std::min(first + 16, whole_columns); j += wide)
          tile(in + i * in_stride + j, in_stride, out + j * out_stride + i, out_stride);
    row = std::max(row, end);
  };
  if (simd() != Simd::portable) whole = columns / 8 * 8;
  past = past && out_stride % 16 == 0 && reinterpret_cast<uintptr_t>(out) % 64 == 0;
  if (simd() == Simd::avx512) tiles(past ? transpose_16x4<true> : transpose_16x4<false>, 16, 4, rows / 16 * 16, whole);
  if (past) _mm_sfence();  // before another thread reads
  if (simd() != Simd::portable) tiles(transpose_8x8, 8, 8, rows / 8 * 8, whole);
#endif
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = i < row ? whole : 0; j < columns; ++j) out[j * out_stride + i] = in[i * in_stride + j];
}

void lines_of_pieces(const Piece* pieces, int64_t count, int64_t size, float* lines) {
#ifdef SNOWS_X86
  lines_of_pieces_avx512(pieces, count, size, lines);
#endif
}

void multiply(const Order& o, const Panels& panels, const at::Tensor& bias, c10::string_view activation) {
  constexpr int64_t kTogether = 2;  // chunks for which a block is filled once: their sums are what the second-level cache holds
  const int64_t chunks = o.chunks(), blocks = o.blocks();
  // Several threads share a panel only where there are too few for all; each then fills it for itself.
  const int64_t wanted = 8 * at::get_num_threads(), shares = std::min(chunks, std::max<int64_t>(1, wanted / std::max<int64_t>(1, panels.count)));
  const int64_t most = std::min(kTogether * Order::kChunk, o.rows) + 1;  // rows of sums; one more where their number is odd
  // Threads take the next items when they are done with theirs: one that is held up, or has wider panels, does fewer.
  const int64_t items = panels.count * shares, grain = std::max<int64_t>(1, items / wanted);
  std::atomic<int64_t> taken{0};
  at::parallel_for(0, std::min<int64_t>(at::get_num_threads(), items), 1, [&](int64_t, int64_t) {
    const int64_t lanes = panels.lanes, step = most * lanes * panels.vectors;
    static thread_local Scratch memory;
    float* sums = memory.floats(panels.strips * step + 128 + panels.scratch);  // and with it scratch aligned: no load straddles two cache lines
    float* scratch = sums + panels.strips * step + 128;
    std::vector<float> starts(most);
    for (int64_t begin; (begin = taken.fetch_add(grain)) < items;)
      for (int64_t item = begin; item < std::min(begin + grain, items); ++item) {
        const int64_t panel = item / shares, share = item % shares, end_of_share = chunks * (share + 1) / shares;
        for (int64_t from = chunks * share / shares, to; from < end_of_share; from = to) {
          to = std::min(from + kTogether, end_of_share);
          const int64_t row = from * Order::kChunk, rows = std::min(to * Order::kChunk, o.rows) - row;
          std::fill(starts.begin(), starts.end(), 0.0f);
          if (bias.defined()) std::copy_n(bias.const_data_ptr<float>() + row, rows, starts.begin());
          for (int64_t block = 0; block < blocks; ++block)
            for (int64_t strip = 0; strip < panels.strips; ++strip) {
              const Source source = panels.fill(scratch, panel, strip, block, from == chunks * share / shares);
              for (int64_t chunk = from; chunk < to && source.vectors > 0; ++chunk) {
                const int64_t at = chunk * blocks + block, before = (chunk - from) * Order::kChunk, count = o.pairs_of(chunk);
                run({o.pairs + chunk * blocks * (Order::kChunk / 2) + block * count, count, source.vectors, lanes, o.weights + o.starts[2 * at],
                     panels.lines + o.starts[2 * at + 1], source.at, sums + strip * step + before * lanes * source.vectors,
                     block == 0 ? starts.data() + before : nullptr, source.half}, o.bfloat16);
              }
            }
          for (int64_t strip = 0; strip < panels.strips; ++strip) {
            const int64_t count = rows * lanes * panels.vectors;  // where the strip is narrower, it does what nobody reads
            float* all = sums + strip * step;
            if (activation == "relu")
              for (int64_t i = 0; i < count; ++i) all[i] = all[i] < 0 ? 0 : all[i];  // NaN stays
            if (activation == "gelu") {
              at::Tensor tensor = at::from_blob(all, {count}, at::kFloat);
              at::gelu_(tensor);
            }
          }
          panels.store(sums, step, panel, row, rows);
        }
      }
  });
}

at::Tensor unpack(const at::Tensor& values, const at::Tensor& codes, at::IntArrayRef shape, int64_t n, int64_t m) {
  using Unpack = at::Tensor(const at::Tensor&, const at::Tensor&, at::IntArrayRef, int64_t, int64_t);
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("snows::unpack", "").typed<Unpack>();
  return op.call(values, codes, shape, n, m);
}

at::Tensor activate(const at::Tensor& output, c10::string_view activation) {
  if (activation == "relu") return output.relu();
  return activation == "gelu" ? at::gelu(output) : output;
}

at::Tensor widened(const std::optional<at::Tensor>& bias) { return bias.has_value() ? bias->to(at::kFloat).contiguous() : at::Tensor(); }

}  // namespace snows

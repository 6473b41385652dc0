// The product of panels.h: three versions of its inner loop, chosen at run time, and what surrounds it.

#include "panels.h"

#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/relu.h>

#include <algorithm>
#include <cstring>
#include <memory>

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#include <immintrin.h>
#define SNOWS_X86 1
#endif

namespace snows {

namespace {

// One bundle over one block: sums[row[r]] (+)= the bundle's weights times the block of the panel, `vectors` * 16 tokens.
struct Bundle {
  int64_t steps, vectors;
  const float* weights;
  const uint16_t* offsets;
  const float* panel;
  float* rows[4];         // accumulators of each row
  const float* start[4];  // where each row's sums begin: the bias, or null where they go on
};

template <int R>
void run_portable(const Bundle& b) {
  const int64_t tokens = 16 * b.vectors;
  for (int r = 0; r < R; ++r) {
    float* __restrict sum = b.rows[r];
    if (b.start[r]) std::fill(sum, sum + tokens, *b.start[r]);
    for (int64_t s = r; s < b.steps * R; s += R) {
      const float w = b.weights[s];
      const float* __restrict x = reinterpret_cast<const float*>(reinterpret_cast<const char*>(b.panel) + b.offsets[s]);
      for (int64_t t = 0; t < tokens; ++t) sum[t] += w * x[t];
    }
  }
}

#ifdef SNOWS_X86

template <int R, int V>  // 16 accumulators: enough to hide the latency, few enough for the registers
__attribute__((target("avx512f"))) void run_avx512(const Bundle& b) {
  __m512 sum[R][V];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) sum[r][v] = b.start[r] ? _mm512_set1_ps(*b.start[r]) : _mm512_loadu_ps(b.rows[r] + 16 * v);
  const char* panel = reinterpret_cast<const char*>(b.panel);
  const float* w = b.weights;
  const uint16_t* offsets = b.offsets;
  for (int64_t s = 0; s < b.steps * R; s += 4) {
    uint64_t four;  // one load for four offsets: loads are what bounds this loop
    std::memcpy(&four, offsets + s, 8);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const float* x = reinterpret_cast<const float*>(panel + (four >> 16 * i & 0xffff));
      const __m512 weight = _mm512_set1_ps(w[s + i]);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) sum[i % R][v] = _mm512_fmadd_ps(weight, _mm512_loadu_ps(x + 16 * v), sum[i % R][v]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) _mm512_storeu_ps(b.rows[r] + 16 * v, sum[r][v]);
}

template <int R, int V>  // V vectors of 8 tokens at a time, a row after the other: 16 registers hold no more
__attribute__((target("avx2,fma"))) void part_avx2(const Bundle& b, int r, int64_t token) {
  __m256 sum[V];
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) sum[v] = b.start[r] ? _mm256_set1_ps(*b.start[r]) : _mm256_loadu_ps(b.rows[r] + token + 8 * v);
  const char* panel = reinterpret_cast<const char*>(b.panel + token);
  for (int64_t s = r; s < b.steps * R; s += R) {
    const float* x = reinterpret_cast<const float*>(panel + b.offsets[s]);
    const __m256 weight = _mm256_set1_ps(b.weights[s]);
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) sum[v] = _mm256_fmadd_ps(weight, _mm256_loadu_ps(x + 8 * v), sum[v]);
  }
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) _mm256_storeu_ps(b.rows[r] + token + 8 * v, sum[v]);
}

template <int R>
void run_avx2(const Bundle& b) {
  for (int r = 0; r < R; ++r) {
    int64_t v = 0;
    for (; v + 4 <= b.vectors; v += 4) part_avx2<R, 8>(b, r, 16 * v);
    for (; v < b.vectors; ++v) part_avx2<R, 2>(b, r, 16 * v);
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

#endif

using Run = void (*)(const Bundle&);

Run choose(int64_t bundle, int64_t vectors) {
#ifdef SNOWS_X86
  static constexpr Run two[] = {run_avx512<2, 1>, run_avx512<2, 2>, run_avx512<2, 3>, run_avx512<2, 4>,
                                run_avx512<2, 5>, run_avx512<2, 6>, run_avx512<2, 7>, run_avx512<2, 8>};
  static constexpr Run four[] = {run_avx512<4, 1>, run_avx512<4, 2>, run_avx512<4, 3>, run_avx512<4, 4>};
  if (simd() == Simd::avx512) return bundle == 2 ? two[vectors - 1] : four[vectors - 1];
  if (simd() == Simd::avx2) return bundle == 2 ? run_avx2<2> : run_avx2<4>;
#endif
  return bundle == 2 ? run_portable<2> : run_portable<4>;
}

float* aligned(std::unique_ptr<float[]>& memory, int64_t size) {  // to a cache line: no load straddles two
  memory.reset(new float[size + 16]);
  return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory.get()) + 63) / 64 * 64);
}

}  // namespace

Simd simd() {
  static const Simd chosen = [] {
    const std::string capability = at::get_cpu_capability();
    return capability == "AVX512" ? Simd::avx512 : capability == "AVX2" ? Simd::avx2 : Simd::portable;
  }();
  return chosen;
}

Order Order::read(const at::Tensor& words) {
  const int32_t* p = words.const_data_ptr<int32_t>();
  Order o{p[0], p[1], p[2], p[3], p[4], p[5], nullptr, nullptr, nullptr, nullptr};
  const int64_t all = o.chunks() * o.blocks() * o.bundles();
  o.starts = p + kHeader;
  o.row = o.starts + all + 1;
  o.weights = reinterpret_cast<const float*>(o.row + all * o.bundle);
  o.offsets = reinterpret_cast<const uint16_t*>(o.weights + o.steps * o.bundle);
  return o;
}

void transpose(const float* in, int64_t in_stride, float* out, int64_t out_stride, int64_t rows, int64_t columns) {
  int64_t whole_rows = 0, whole_columns = 0;
#ifdef SNOWS_X86
  if (simd() != Simd::portable) {
    whole_rows = rows / 8 * 8, whole_columns = columns / 8 * 8;
    for (int64_t first = 0; first < whole_columns; first += 16)  // a cache line of every row, and no more lines written at once
      for (int64_t i = 0; i < whole_rows; i += 8)
        for (int64_t j = first; j < std::min(first + 16, whole_columns); j += 8)
          transpose_8x8(in + i * in_stride + j, in_stride, out + j * out_stride + i, out_stride);
  }
#endif
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = i < whole_rows ? whole_columns : 0; j < columns; ++j) out[j * out_stride + i] = in[i * in_stride + j];
}

void multiply(const Order& o, int64_t tokens, const at::Tensor& bias, c10::string_view activation, const Fill& fill, const Store& store) {
  const int64_t width = o.tokens, panels = (tokens + width - 1) / width, chunks = o.chunks();
  const int64_t blocks = o.blocks(), bundles = o.bundles();
  // Several threads share a panel only where there are too few for all; each then fills it for itself.
  const int64_t wanted = 8 * at::get_num_threads(), shares = std::min(chunks, std::max<int64_t>(1, wanted / std::max<int64_t>(1, panels)));
  at::parallel_for(0, panels * shares, 1, [&](int64_t begin, int64_t end) {
    std::unique_ptr<float[]> panel_memory, sums_memory;
    float* panel = aligned(panel_memory, o.columns * width);
    float* sums = aligned(sums_memory, (Order::kChunk + 1) * width);
    float starts[Order::kChunk + 1];
    int64_t filled = -1;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t first = item / shares * width, count = std::min(width, tokens - first), vectors = (count + 15) / 16;
      if (item / shares != filled) fill(panel, first, count, width);
      filled = item / shares;
      const Run run = choose(o.bundle, vectors);
      Bundle b;
      b.vectors = vectors;
      const int64_t share = item % shares;
      for (int64_t chunk = chunks * share / shares; chunk < chunks * (share + 1) / shares; ++chunk) {
        const int64_t row = chunk * Order::kChunk, rows = std::min(Order::kChunk, o.rows - row);
        std::fill(starts, starts + Order::kChunk + 1, 0.0f);
        if (bias.defined()) std::copy_n(bias.const_data_ptr<float>() + row, rows, starts);
        const int64_t many = (rows + o.bundle - 1) / o.bundle;
        for (int64_t block = 0; block < blocks; ++block) {
          const int32_t* step = o.starts + (chunk * blocks + block) * bundles;
          const int32_t* row_of = o.row + (chunk * blocks + block) * bundles * o.bundle;
          b.panel = panel + block * o.block * width;
          for (int64_t i = 0; i < many; ++i) {
            b.steps = step[i + 1] - step[i];
            b.weights = o.weights + step[i] * o.bundle;
            b.offsets = o.offsets + step[i] * o.bundle;
            for (int64_t r = 0; r < o.bundle; ++r, ++row_of) {
              b.rows[r] = sums + *row_of * width;
              b.start[r] = block == 0 ? starts + *row_of : nullptr;
            }
            if (b.steps > 0 || block == 0) run(b);
          }
        }
        if (activation == "relu")
          for (int64_t i = 0; i < rows * width; ++i) sums[i] = sums[i] < 0 ? 0 : sums[i];  // NaN stays
        if (activation == "gelu") {
          at::Tensor all = at::from_blob(sums, {rows, width}, at::kFloat);
          at::gelu_(all);
        }
        store(sums, row, rows, first, count, width);
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

}  // namespace snows

// Selection of n of every m, masks as bits, and packed weights made dense, on the CPU: a pass each.
// Specifications: snows/reference/masks.py, nm_mask, nm_select and masked; snows/reference/packed.py, unpack.

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <c10/util/accumulate.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cstring>
#include <type_traits>
#include <vector>

#include "checks.h"
#include "masks.h"
#include "simd.h"

namespace {

constexpr int64_t kGrain = 16384;  // entries a thread takes at the least

int64_t rows_at_once(int64_t columns) { return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, columns)); }

// ---------------------------------------------------------------- selection

void refuse_nan(bool nan, const char* op) {
  TORCH_CHECK_VALUE(!nan, op, ": expected scores without NaN, got NaN; check the weights and the calibration images");
}

at::Tensor nm_mask(const at::Tensor& scores, int64_t n, int64_t m) {
  snows::check_scores("nm_mask", scores, n, m);
  const at::Tensor x = scores.contiguous();
  at::Tensor mask = at::empty(x.sizes(), x.options().dtype(at::kBool));
  const int64_t columns = x.size(1);
  std::atomic<bool> nan{false};
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "nm_mask", [&] {
    const scalar_t* in = x.const_data_ptr<scalar_t>();
    bool* out = mask.data_ptr<bool>();
    at::parallel_for(0, x.size(0), rows_at_once(columns), [&](int64_t begin, int64_t end) {
      const int64_t step = columns % m == 0 ? end - begin : 1;
      for (int64_t r = begin; r < end; r += step)
        if (snows::select(in + r * columns, out + r * columns, step * columns, n, m)) nan = true;
    });
  });
  refuse_nan(nan, "nm_mask");
  return mask;
}

#ifdef SNOWS_X86
__attribute__((target("avx512f,avx512bw"))) void gather_bits_avx512(const uint8_t* bools, uint8_t* bits, int64_t bytes) {
  int64_t b = 0;
  for (; b + 8 <= bytes; b += 8) {
    const __m512i x = _mm512_loadu_si512(bools + 8 * b);
    const uint64_t word = _mm512_test_epi8_mask(x, x);
    std::memcpy(bits + b, &word, 8);
  }
  snows::gather_bits(bools + 8 * b, bits + b, bytes - b);
}
#endif

std::tuple<at::Tensor, at::Tensor> nm_select(const at::Tensor& scores, int64_t n, int64_t m) {
  snows::check_scores("nm_select", scores, n, m);
  const at::Tensor x = scores.contiguous();
  const int64_t rows = x.size(0), columns = x.size(1), bytes = (columns + 7) / 8;
  const bool coded = n == 2 && m == 4;
  at::Tensor bits = at::empty({rows, bytes}, x.options().dtype(at::kByte)), codes = at::empty({rows, coded ? bytes : 0}, bits.options());
  std::atomic<bool> nan{false};
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "nm_select", [&] {
    const scalar_t* in = x.const_data_ptr<scalar_t>();
    uint8_t *bit = bits.data_ptr<uint8_t>(), *code = codes.data_ptr<uint8_t>();
    at::parallel_for(0, rows, rows_at_once(columns), [&](int64_t begin, int64_t end) {
      std::vector<uint8_t> mask(8 * bytes);  // bools, zeros behind the last column
      for (int64_t r = begin; r < end; ++r) {
        if (snows::select(in + r * columns, reinterpret_cast<bool*>(mask.data()), columns, n, m)) nan = true;
#ifdef SNOWS_X86
        (snows::simd() == snows::Simd::avx512 ? gather_bits_avx512 : snows::gather_bits)(mask.data(), bit + r * bytes, bytes);
#else
        snows::gather_bits(mask.data(), bit + r * bytes, bytes);
#endif
        for (int64_t b = 0; coded && b < bytes; ++b) code[r * bytes + b] = snows::kCodes[bit[r * bytes + b]];
      }
    });
  });
  refuse_nan(nan, "nm_select");
  return {bits, codes};
}

// ---------------------------------------------------------------- a weight under a mask of bits

// F(word), an unsigned word as wide as a number of the tensor.
template <typename F>
void by_width(const at::Tensor& x, const F& f) {
  switch (x.element_size()) {
    case 1: return f(uint8_t());
    case 2: return f(uint16_t());
    case 4: return f(uint32_t());
    case 8: return f(uint64_t());
  }
  TORCH_CHECK_VALUE(false, "expected numbers of 1, 2, 4 or 8 bytes, got ", x.scalar_type());
}

at::Tensor masked(const at::Tensor& weight, const at::Tensor& bits_) {
  snows::check_device("masked", "the bits", bits_, weight.device());
  TORCH_CHECK_VALUE(bits_.scalar_type() == at::kByte && bits_.dim() == 1 && bits_.numel() >= (weight.numel() + 7) / 8, "masked: expected ", (weight.numel() + 7) / 8,
                    " bytes of bits, got ", bits_.numel(), " ", bits_.scalar_type());
  const at::Tensor x = weight.contiguous(), bits = bits_.contiguous();
  at::Tensor out = at::empty_like(x);
  const int64_t count = x.numel();
  by_width(x, [&]<typename Word>(Word) {
    const Word* from = static_cast<const Word*>(x.const_data_ptr());
    const uint8_t* bit = bits.const_data_ptr<uint8_t>();
    Word* to = static_cast<Word*>(out.mutable_data_ptr());
    at::parallel_for(0, count / 8, kGrain / 8, [=](int64_t begin, int64_t end) {
      snows::vectorised([=]() SNOWS_INLINE { snows::keep(from, bit, to, begin, end); });
    });
    for (int64_t i = count / 8 * 8; i < count; ++i) to[i] = bit[i / 8] >> i % 8 & 1 ? from[i] : 0;
  });
  return out;
}

// ---------------------------------------------------------------- a packed weight made dense

// A stream of bits, least significant first; some bytes behind it can be read.
class Stream {
 public:
  explicit Stream(const at::Tensor& codes) : bytes_(codes.numel() + 8) {
    std::copy_n(codes.const_data_ptr<uint8_t>(), codes.numel(), bytes_.data());
  }
  uint32_t bits(int64_t at, int64_t count) const {  // up to 32
    uint64_t word;
    std::memcpy(&word, bytes_.data() + at / 8, 8);
    return uint32_t(word >> at % 8 & ((uint64_t(1) << count) - 1));
  }
  int64_t ones(int64_t begin, int64_t end) const {
    int64_t sum = 0;
    for (; begin < end; begin += 32) sum += std::popcount(bits(begin, std::min<int64_t>(32, end - begin)));
    return sum;
  }

 private:
  std::vector<uint8_t> bytes_;
};

#ifdef SNOWS_X86

// Which of eight columns a byte of 2:4 codes stores, and which of sixteen a byte of 1:4 codes.
constexpr auto kMasks = [] {
  struct {
    std::array<uint16_t, 256> two{}, one{};
  } masks;
  for (unsigned byte = 0; byte < 256; ++byte)
    for (unsigned i = 0; i < 4; ++i) {
      const unsigned position = byte >> 2 * i & 3;
      masks.two[byte] |= uint16_t(1u << (i / 2 * 4 + position));
      masks.one[byte] |= uint16_t(1u << (i * 4 + position));
    }
  return masks;
}();

// One row of whole bytes of codes, sixteen columns at a time: the values are spread to where the mask's bits are set.
template <typename Mask>
__attribute__((target("avx512f,popcnt"))) inline void spread_row(const uint32_t* value, uint32_t* row, int64_t columns, const Mask& mask_of) {
  for (int64_t c = 0; c < columns; c += 16) {
    const uint16_t mask = mask_of(c);
    _mm512_storeu_si512(row + c, _mm512_maskz_expandloadu_epi32(mask, value));
    value += __builtin_popcount(mask);
  }
}

__attribute__((target("avx512f,popcnt"))) void spread(const uint32_t* value, const uint8_t* codes, uint32_t* row, int64_t columns, int64_t n, int64_t m) {
  if (n == 2 && m == 4)
    spread_row(value, row, columns, [=](int64_t c) SNOWS_INLINE { return uint16_t(kMasks.two[codes[c / 8]] | kMasks.two[codes[c / 8 + 1]] << 8); });
  else if (n == 1 && m == 4)
    spread_row(value, row, columns, [=](int64_t c) SNOWS_INLINE { return kMasks.one[codes[c / 16]]; });
  else
    spread_row(value, row, columns, [=](int64_t c) SNOWS_INLINE { return uint16_t(codes[c / 8] | codes[c / 8 + 1] << 8); });
}

#endif

at::Tensor unpack(const at::Tensor& values_, const at::Tensor& codes, at::IntArrayRef shape, int64_t n, int64_t m) {
  const bool sound = shape.size() >= 2 && (m == 0 ? n == 0 : 0 < n && n < m && m <= 32) &&
                     std::all_of(shape.begin(), shape.end(), [](int64_t x) { return 0 <= x && x < int64_t(1) << 31; });
  TORCH_CHECK_VALUE(sound, "unpack: expected a shape of 2 dimensions or more and n < m <= 32, or zeros, got ", shape, ", n = ", n, ", m = ", m);
  int64_t entries = 1;
  for (const int64_t size : shape) TORCH_CHECK_VALUE(!__builtin_mul_overflow(entries, size, &entries), "unpack: ", shape, " has too many entries");
  const at::Tensor values = values_.contiguous();
  const int64_t rows = shape[0], channels = shape[1], columns = c10::multiply_integers(shape.slice(1)), taps = channels ? columns / channels : 1;
  if (rows * columns == 0) return at::zeros(shape, values.options());
  int64_t width = 0;
  while (m > 0 && (int64_t(1) << width) < m) ++width;
  const bool positions = m > 0 && n * width <= m;
  const int64_t size = m > 0 ? m : 32, groups = (columns + size - 1) / size, bits = positions ? n * width : size;  // unstructured: 32 bits at a time
  const int64_t row_bits = m > 0 ? groups * bits : columns;
  snows::check_device("unpack", "codes", codes, values.device());
  TORCH_CHECK_VALUE(codes.dim() == 1 && codes.scalar_type() == at::kByte, "unpack: expected codes of one dimension, uint8, got ", codes.sizes(), " ",
                    codes.scalar_type());
  const at::Tensor bytes = codes.contiguous();
  TORCH_CHECK_VALUE(bytes.numel() * 8 >= rows * row_bits, "unpack: expected at least ", (rows * row_bits + 7) / 8, " bytes of codes, got ",
                    bytes.numel());
  const Stream stream(bytes);
  std::vector<int64_t> first(rows + 1);  // of each row, its first stored value
  for (int64_t r = 0; r < rows; ++r) first[r + 1] = first[r] + (positions ? groups * n : stream.ones(r * row_bits, (r + 1) * row_bits));
  TORCH_CHECK_VALUE(first[rows] == values.numel(), "unpack: expected codes for ", values.numel(), " stored values, got codes for ", first[rows]);
#ifdef SNOWS_X86
  const bool known = m == 0 || (!positions && groups * m == columns) || (m == 4 && n <= 2);  // masks as bits, or by table
  if (known && taps == 1 && columns % 16 == 0 && values.element_size() == 4 && snows::simd() == snows::Simd::avx512) {
    const uint32_t* from = static_cast<const uint32_t*>(values.const_data_ptr());
    at::Tensor out = at::empty(shape, values.options());
    uint32_t* to = static_cast<uint32_t*>(out.mutable_data_ptr());
    const uint8_t* code = bytes.const_data_ptr<uint8_t>();
    at::parallel_for(0, rows, rows_at_once(columns), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) spread(from + first[r], code + r * row_bits / 8, to + r * columns, columns, positions ? n : 0, m);
    });
    return out;
  }
#endif
  std::vector<int64_t> place(columns);  // in a row of the result, of a column of the row view
  for (int64_t c = 0; c < columns; ++c) place[c] = c % channels * taps + c / channels;
  at::Tensor out = at::zeros(shape, values.options());
  by_width(values, [&]<typename Word>(Word) {
    const Word* from = static_cast<const Word*>(values.const_data_ptr());
    Word* to = static_cast<Word*>(out.mutable_data_ptr());
    at::parallel_for(0, rows, rows_at_once(columns), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        const Word* value = from + first[r];
        Word* const row = to + r * columns;
        for (int64_t g = 0; g < groups; ++g) {
          const int64_t count = m > 0 ? bits : std::min(size, columns - g * size);
          uint32_t code = stream.bits(r * row_bits + g * bits, count);
          if (positions)
            for (int64_t i = 0; i < n; ++i, code >>= width, ++value) {
              const int64_t column = g * m + (code & ((1u << width) - 1));
              if (column < columns) row[place[column]] = *value;  // past the row's end there are only fillers
            }
          else
            for (; code; code &= code - 1, ++value) {
              const int64_t column = g * size + std::countr_zero(code);
              if (column < columns) row[place[column]] = *value;
            }
        }
      }
    });
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(snows, CPU, library) {
  library.impl("nm_mask", &nm_mask);
  library.impl("nm_select", &nm_select);
  library.impl("masked", &masked);
  library.impl("unpack", &unpack);
}

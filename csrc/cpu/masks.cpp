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
#include "simd.h"

namespace {

constexpr int64_t kGrain = 16384;  // entries a thread takes at the least

template <typename T> using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

int64_t rows_at_once(int64_t columns) { return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, columns)); }

// ---------------------------------------------------------------- selection

// An entry goes before another if it is higher, or equal with a lower index; its rank is how many go before it. True if there was a NaN.
template <typename T>
bool select_group(const T* scores, bool* mask, int64_t size, int64_t n) {
  bool nan = false;
  for (int64_t j = 0; j < size; ++j) {
    int64_t rank = 0;
    for (int64_t i = 0; i < j; ++i) rank += scores[i] >= scores[j];
    for (int64_t i = j + 1; i < size; ++i) rank += scores[i] > scores[j];
    mask[j] = rank < n;
    nan |= scores[j] != scores[j];
  }
  return nan;
}

// Groups of four side by side in vectors: six comparisons for all ranks. True if there was a NaN.
template <typename T>
SNOWS_INLINE inline bool select_fours(const T* scores, bool* mask, int64_t groups, int32_t n) {
  typedef uint32_t __attribute__((may_alias, aligned(1))) Bools;
  Bools* const words = reinterpret_cast<Bools*>(mask);  // a group's four
  int32_t nan = 0;
#pragma omp simd reduction(| : nan)
  for (int64_t g = 0; g < groups; ++g) {
    const Wide<T> a = scores[4 * g], b = scores[4 * g + 1], c = scores[4 * g + 2], d = scores[4 * g + 3];
    const int32_t ab = a >= b, ac = a >= c, ad = a >= d, bc = b >= c, bd = b >= d, cd = c >= d;
    words[g] = uint32_t(3 - ab - ac - ad < n) | uint32_t(2 + ab - bc - bd < n) << 8 | uint32_t(1 + ac + bc - cd < n) << 16 |
               uint32_t(ad + bd + cd < n) << 24;
    nan |= int32_t(a != a) | int32_t(b != b) | int32_t(c != c) | int32_t(d != d);
  }
  return nan;
}

// Any groups, 64 side by side; likewise.
template <typename T>
SNOWS_INLINE inline bool select_many(const T* scores, bool* mask, int64_t groups, int32_t n, int64_t m) {
  constexpr int64_t kSide = 64;
  Wide<T> score[32][kSide];
  int32_t rank[32][kSide], nan = 0;
  for (int64_t first = 0; first < groups; first += kSide, scores += kSide * m, mask += kSide * m) {
    const int64_t count = std::min(kSide, groups - first);
    for (int64_t j = 0; j < m; ++j)
      for (int64_t g = 0; g < kSide; ++g) score[j][g] = g < count ? Wide<T>(scores[g * m + j]) : Wide<T>(0), rank[j][g] = 0;
    for (int64_t j = 0; j < m; ++j) {
#pragma omp simd reduction(| : nan)
      for (int64_t g = 0; g < kSide; ++g) nan |= int32_t(score[j][g] != score[j][g]);
    }
    for (int64_t j = 1; j < m; ++j)
      for (int64_t i = 0; i < j; ++i) {
#pragma omp simd
        for (int64_t g = 0; g < kSide; ++g) {
          const int32_t before = score[i][g] >= score[j][g];
          rank[j][g] += before;
          rank[i][g] += 1 - before;
        }
      }
    for (int64_t g = 0; g < count; ++g)
      for (int64_t j = 0; j < m; ++j) mask[g * m + j] = rank[j][g] < n;
  }
  return nan;
}

// One row, or several that are whole groups.
template <typename T>
bool select(const T* scores, bool* mask, int64_t columns, int64_t n, int64_t m) {
  const int64_t groups = columns / m;
  bool nan = false;
  snows::vectorised([&]() SNOWS_INLINE {
    if (m == 4)
      nan = select_fours(scores, mask, groups, int32_t(n));
    else if (m <= 32)
      nan = select_many(scores, mask, groups, int32_t(n), m);
    else
      for (int64_t g = 0; g < groups; ++g) nan |= select_group(scores + g * m, mask + g * m, m, n);
  });
  return select_group(scores + groups * m, mask + groups * m, columns - groups * m, n) || nan;
}

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
        if (select(in + r * columns, out + r * columns, step * columns, n, m)) nan = true;
    });
  });
  refuse_nan(nan, "nm_mask");
  return mask;
}

// The codes of 2:4 for the eight bits of two groups; what is missing of a group is filled up with its lowest free positions.
constexpr std::array<uint8_t, 256> kCodes = [] {
  std::array<uint8_t, 256> codes{};
  for (unsigned eight = 0; eight < 256; ++eight)
    for (unsigned shift = 0; shift < 8; shift += 4) {
      unsigned full = eight >> shift & 15;
      for (unsigned i = 0; i < 4 && std::popcount(full) < 2; ++i) full |= 1u << i;
      const int first = std::countr_zero(full), second = std::countr_zero(full & (full - 1));
      codes[eight] |= uint8_t((first | second << 2) << shift);
    }
  return codes;
}();

// Bools to bits, eight of them a byte.
void gather_bits(const uint8_t* bools, uint8_t* bits, int64_t bytes) {
  for (int64_t b = 0; b < bytes; ++b) {
    uint64_t eight;
    std::memcpy(&eight, bools + 8 * b, 8);
    bits[b] = uint8_t(eight * 0x0102040810204080 >> 56);  // bool j becomes bit j
  }
}

#ifdef SNOWS_X86
__attribute__((target("avx512f,avx512bw"))) void gather_bits_avx512(const uint8_t* bools, uint8_t* bits, int64_t bytes) {
  int64_t b = 0;
  for (; b + 8 <= bytes; b += 8) {
    const __m512i x = _mm512_loadu_si512(bools + 8 * b);
    const uint64_t word = _mm512_test_epi8_mask(x, x);
    std::memcpy(bits + b, &word, 8);
  }
  gather_bits(bools + 8 * b, bits + b, bytes - b);
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
        if (select(in + r * columns, reinterpret_cast<bool*>(mask.data()), columns, n, m)) nan = true;
#ifdef SNOWS_X86
        (snows::simd() == snows::Simd::avx512 ? gather_bits_avx512 : gather_bits)(mask.data(), bit + r * bytes, bytes);
#else
        gather_bits(mask.data(), bit + r * bytes, bytes);
#endif
        for (int64_t b = 0; coded && b < bytes; ++b) code[r * bytes + b] = kCodes[bit[r * bytes + b]];
      }
    });
  });
  refuse_nan(nan, "nm_select");
  return {bits, codes};
}

// ---------------------------------------------------------------- a weight under a mask of bits

template <typename Word>
SNOWS_INLINE inline void keep(const Word* in, const uint8_t* bits, Word* out, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b) {
    const Word byte = bits[b];
#pragma omp simd
    for (int j = 0; j < 8; ++j) out[8 * b + j] = in[8 * b + j] & Word(-(byte >> j & 1));
  }
}

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
      snows::vectorised([=]() SNOWS_INLINE { keep(from, bit, to, begin, end); });
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

// The loops of masks.cpp. Know nothing of torch.

#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <cstring>

#include "simd.h"

namespace snows {

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
  vectorised([&]() SNOWS_INLINE {
    if (m == 4)
      nan = select_fours(scores, mask, groups, int32_t(n));
    else if (m <= 32)
      nan = select_many(scores, mask, groups, int32_t(n), m);
    else
      for (int64_t g = 0; g < groups; ++g) nan |= select_group(scores + g * m, mask + g * m, m, n);
  });
  return select_group(scores + groups * m, mask + groups * m, columns - groups * m, n) || nan;
}

// The codes of 2:4 for the eight bits of two groups; what is missing of a group is filled up with its lowest free positions.
inline constexpr std::array<uint8_t, 256> kCodes = [] {
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
inline void gather_bits(const uint8_t* bools, uint8_t* bits, int64_t bytes) {
  for (int64_t b = 0; b < bytes; ++b) {
    uint64_t eight;
    std::memcpy(&eight, bools + 8 * b, 8);
    bits[b] = uint8_t(eight * 0x0102040810204080 >> 56);  // bool j becomes bit j
  }
}

// Words under a mask: eight of them a byte of bits.
template <typename Word>
SNOWS_INLINE inline void keep(const Word* in, const uint8_t* bits, Word* out, int64_t begin, int64_t end) {
  for (int64_t b = begin; b < end; ++b) {
    const Word byte = bits[b];
#pragma omp simd
    for (int j = 0; j < 8; ++j) out[8 * b + j] = in[8 * b + j] & Word(-(byte >> j & 1));
  }
}

}  // namespace snows

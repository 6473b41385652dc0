// What the kernels for few tokens (few_tokens.cpp) share, which are for x86.

#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>
#include <cstring>

#include "vector.h"

namespace snows {

// A packed weight whose rows begin with a byte of codes, and what is computed of it: token t is at x + t * (how far tokens are apart), its
// outputs at y + t * rows. A row's codes are read once for all tokens.
template <typename T>
struct Weight {
  const T *values, *end;
  const uint8_t* codes;
  const float *bias, *x;  // no bias: null
  float* y;
  int64_t rows, columns, tokens;
  float bias_of(int64_t row) const { return bias ? bias[row] : 0.0f; }
};

__attribute__((target("popcnt"))) inline int64_t bits_set(const uint8_t* codes, int64_t bytes) {
  int64_t count = 0, i = 0;
  for (uint64_t word; i + 8 <= bytes; i += 8) {
    std::memcpy(&word, codes + i, 8);
    count += __builtin_popcountll(word);
  }
  for (; i < bytes; ++i) count += __builtin_popcount(codes[i]);
  return count;
}

}  // namespace snows

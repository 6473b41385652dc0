// Tokens as the input of sparse_product.cuh. Specification: snows/reference/packed.py, sparse_linear.

#pragma once

#include "sparse_product.cuh"

namespace snows {

template <bool Wide>
struct Tokens {
  static constexpr bool WIDE = Wide;  // columns % 8 == 0 and x on 16 bytes
  using Row = const uint16_t*;
  using Column = int;

  const uint16_t* x;  // (tokens, columns)
  int tokens, columns;

  Tokens<false> narrow() const { return {x, tokens, columns}; }

  __device__ Row row(int n) const { return x + int64_t(n < tokens ? n : tokens - 1) * columns; }
  __device__ Column column(int k) const { return k; }
  __device__ bool there(Row, Column k) const { return k < columns; }
  __device__ const uint16_t* at(Row row, Column k) const { return row + k; }
};

}  // namespace snows

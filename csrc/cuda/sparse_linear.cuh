// Tokens as the input of sparse_product.cuh. Specification: snows/reference/packed.py, sparse_linear.

#pragma once

#include "sparse_product.cuh"

namespace snows {

template <bool Wide>
struct Tokens {
  static constexpr bool WIDE = Wide;  // columns % 8 == 0 and x on 16 bytes
  static constexpr bool EVEN = true;

  struct Row {
    const uint16_t* begin;
    int left;  // tokens from this one on: none beyond the last
  };
  using Column = int;

  const uint16_t* x;  // (tokens, columns)
  int tokens, columns;

  Tokens<false> narrow() const { return {x, tokens, columns}; }

  __device__ Row row(int n) const { return {x + int64_t(n) * columns, tokens - n}; }
  __device__ Row later(const Row& row, int by) const { return {row.begin + int64_t(by) * columns, row.left - by}; }
  __device__ Column column(int k) const { return k; }
  __device__ bool there(const Row& row, Column k) const { return k < columns && row.left > 0; }
  __device__ const uint16_t* at(const Row& row, Column k) const { return row.begin + k; }
};

}  // namespace snows

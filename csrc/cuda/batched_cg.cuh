// One iteration of many conjugate gradients, one row each: everything but the product with the Gram matrix they share.
// Specification: snows/reference/cg.py, batched_cg_update.
//
// A block takes a row and reads it from memory once: of the second and third time, the cache answers. A row that is done
// costs one load.

#pragma once

#include "memory.cuh"

namespace snows {

// N entries of a mask in one load: entry j is bit 8 j.
template <int N>
using Kept = std::conditional_t<N == 8, uint64_t, std::conditional_t<N == 4, uint32_t, std::conditional_t<N == 2, uint16_t, uint8_t>>>;

template <typename T>
struct Rows {
  T *x, *r, *p;      // (groups * rows, columns)
  double* rz;        // (groups * rows), 0 where a row is done
  const T* product;  // p times its group's Gram matrix
  const uint8_t* mask;
  const T* inverse;  // (groups, columns)
  const double* target;
  int64_t rows, columns;  // rows of one group
};

template <typename T, int V>
__global__ void __launch_bounds__(THREADS) batched_cg_kernel(Rows<T> s) {
  const int64_t row = blockIdx.x, at = row * s.columns;
  const double rz = s.rz[row];
  if (!(rz > 0)) return;
  T *x = s.x + at, *r = s.r + at, *p = s.p + at;
  const T *product = s.product + at, *inverse = s.inverse + row / s.rows * s.columns;
  const uint8_t* mask = s.mask + at;

  double sum = 0;
  each<V>(threadIdx.x, blockDim.x, s.columns, [&](auto N, int64_t i) {
    Wide<T> a[N], b[N];
    load(p + i, a), load(product + i, b);
    const auto kept = *reinterpret_cast<const Kept<N>*>(mask + i);
#pragma unroll
    for (int j = 0; j < N; ++j) sum += kept >> 8 * j & 1 ? double(a[j]) * b[j] : 0.0;
  });
  const double curvature = block_sum(sum);

  double left = 0;  // r z after the step; 0 ends the row
  if (curvature > 0) {
    const Wide<T> alpha = rz / curvature;
    double rr = 0, next = 0;
    each<V>(threadIdx.x, blockDim.x, s.columns, [&](auto N, int64_t i) {
      Wide<T> a[N], b[N], c[N], d[N], e[N];
      load(p + i, a), load(product + i, b), load(x + i, c), load(r + i, d), load(inverse + i, e);
      const auto kept = *reinterpret_cast<const Kept<N>*>(mask + i);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        c[j] += alpha * a[j];
        d[j] -= kept >> 8 * j & 1 ? alpha * b[j] : 0;
        rr += double(d[j]) * d[j];
        next += double(d[j]) * (d[j] * e[j]);
      }
      store(x + i, c), store(r + i, d);
    });
    rr = block_sum(rr);
    next = block_sum(next);
    if (rr > s.target[row] && next > 0) left = next;
  }
  if (left > 0) {
    const Wide<T> beta = left / rz;
    each<V>(threadIdx.x, blockDim.x, s.columns, [&](auto N, int64_t i) {
      Wide<T> a[N], b[N], e[N];
      load(p + i, a), load(r + i, b), load(inverse + i, e);
#pragma unroll
      for (int j = 0; j < N; ++j) a[j] = b[j] * e[j] + beta * a[j];
      store(p + i, a);
    });
  }
  if (threadIdx.x == 0) s.rz[row] = left;
}

}  // namespace snows

// The loops of cg.cpp. Know nothing of torch.

#pragma once

#include <cstdint>

#include "simd.h"

namespace snows {

template <typename T>
SNOWS_INLINE inline double dot(const T* a, const T* b, int64_t begin, int64_t end) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = begin; i < end; ++i) sum += double(Wide<T>(a[i])) * double(Wide<T>(b[i]));
  return sum;
}

template <typename T>
SNOWS_INLINE inline double step(T* x, T* r, const T* p, const T* Ap, Wide<T> alpha, int64_t begin, int64_t end) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = begin; i < end; ++i) {
    x[i] = Wide<T>(x[i]) + alpha * Wide<T>(p[i]);
    const T rest = Wide<T>(r[i]) - alpha * Wide<T>(Ap[i]);
    r[i] = rest;
    sum += double(Wide<T>(rest)) * double(Wide<T>(rest));
  }
  return sum;
}

// p = z + beta p.
template <typename T>
SNOWS_INLINE inline void turn(T* p, const T* z, Wide<T> beta, int64_t begin, int64_t end) {
#pragma omp simd
  for (int64_t i = begin; i < end; ++i) p[i] = Wide<T>(z[i]) + beta * Wide<T>(p[i]);
}

// One row of batched_cg_update; returns its new rz, which is 0 where the row is done.
template <typename T>
double step_of_row(T* x, T* r, T* p, const T* product, const bool* mask, const T* inverse, int64_t columns, double rz, double target) {
  using W = Wide<T>;
  double curvature = 0, rr = 0, left = 0;
#pragma omp simd reduction(+ : curvature)
  for (int64_t i = 0; i < columns; ++i) curvature += mask[i] ? double(W(p[i])) * double(W(product[i])) : 0.0;
  if (curvature > 0) {
    const W alpha = rz / curvature;
#pragma omp simd reduction(+ : rr, left)
    for (int64_t i = 0; i < columns; ++i) {
      const W rest = W(r[i]) - (mask[i] ? alpha * W(product[i]) : W(0));
      x[i] = W(x[i]) + alpha * W(p[i]);
      r[i] = rest;
      rr += double(rest) * double(rest);
      left += double(rest) * double(rest * W(inverse[i]));
    }
    if (!(rr > target)) left = 0;
  }
  if (left > 0) {
    const W beta = left / rz;
#pragma omp simd
    for (int64_t i = 0; i < columns; ++i) p[i] = W(r[i]) * W(inverse[i]) + beta * W(p[i]);
  }
  return left > 0 ? left : 0;
}

}  // namespace snows

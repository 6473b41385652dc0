// The vector part of conjugate gradients, two cooperative launches an iteration. Specification: snows/reference/cg.py, cg_update
// and cg_direction. Scalars live on the device, in `State`; once it says stop, nothing is written any more.
//
// A launch reduces, waits for all blocks, and goes over its vectors with the scalar: cg_update moves 8 words an entry
// (p, Ap; then p, Ap, x, r in, x, r out), cg_direction 5 (r, z; then z, p in, p out). Vectors that fit the cache are read from
// memory once. Every sum is taken in one order, in double: a run repeats to the last bit.

#pragma once

#include "memory.cuh"

#include <cmath>

namespace snows {

enum Status { RUNNING, CONVERGED, NEGATIVE_CURVATURE, NOT_FINITE, ZERO };  // as in snows/reference/cg.py

struct State {  // the tensor's numbers, in order
  double status, iterations, rz, rr, bb;
};

template <typename T, int V>
__global__ void __launch_bounds__(THREADS)
cg_update_kernel(T* x, T* r, const T* p, const T* Ap, int64_t n, State* state, double rtol, double* partials) {
  State s = *state;
  if (s.status != RUNNING) return;  // all threads of all blocks alike
  const int64_t thread = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, threads = int64_t(gridDim.x) * blockDim.x;

  double sum = 0;
  each<V>(thread, threads, n, [&](auto N, int64_t i) {
    Wide<T> a[N], b[N];
    load(p + i, a), load(Ap + i, b);
#pragma unroll
    for (int j = 0; j < N; ++j) sum += double(a[j]) * b[j];
  });
  const double curvature = grid_sum(sum, partials);

  s.iterations += 1;
  double step = 0, across = 0;  // of x along p, of r along Ap
  if (!isfinite(curvature)) {
    s.status = NOT_FINITE;
  } else if (curvature <= 0) {
    s.status = NEGATIVE_CURVATURE;
    step = s.iterations == 1;  // x is still zero: the first direction itself
  } else {
    step = across = s.rz / curvature;
  }
  if (step != 0) {
    const Wide<T> alpha = step, beta = across;
    sum = 0;
    each<V>(thread, threads, n, [&](auto N, int64_t i) {
      Wide<T> a[N], b[N], c[N], d[N];
      load(p + i, a), load(Ap + i, b), load(x + i, c), load(r + i, d);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        c[j] += alpha * a[j];
        d[j] -= beta * b[j];
        sum += double(d[j]) * d[j];
      }
      store(x + i, c), store(r + i, d);
    });
    const double rr = grid_sum(sum, partials + gridDim.x);
    if (s.status == RUNNING) {
      s.rr = rr;
      if (rr <= rtol * rtol * s.bb) s.status = CONVERGED;
    }
  }
  if (thread == 0) *state = s;  // every block has passed a barrier since it read the state
}

template <typename T, int V>
__global__ void __launch_bounds__(THREADS)
cg_direction_kernel(T* p, const T* r, const T* z, int64_t n, State* state, double* partials) {
  const State s = *state;
  if (s.status != RUNNING) return;
  const int64_t thread = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, threads = int64_t(gridDim.x) * blockDim.x;
  double sum = 0;
  each<V>(thread, threads, n, [&](auto N, int64_t i) {
    Wide<T> a[N], b[N];
    load(r + i, a), load(z + i, b);
#pragma unroll
    for (int j = 0; j < N; ++j) sum += double(a[j]) * b[j];
  });
  const double rz = grid_sum(sum, partials);
  const Wide<T> beta = rz / s.rz;  // 0 for the first direction: rz begins at infinity
  each<V>(thread, threads, n, [&](auto N, int64_t i) {
    Wide<T> a[N], b[N];
    load(z + i, a), load(p + i, b);
#pragma unroll
    for (int j = 0; j < N; ++j) b[j] = a[j] + beta * b[j];
    store(p + i, b);
  });
  if (thread == 0) state->rz = rz;
}

}  // namespace snows

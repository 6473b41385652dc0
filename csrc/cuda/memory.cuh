// How kernels touch memory: 16 bytes at a time where the pointers allow it, arithmetic in float, or double for double;
// sums over a block in an order that never changes.

#pragma once

#ifdef __CUDACC__
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace snows {

constexpr int THREADS = 256;

template <typename T> constexpr int WIDTH = 16 / sizeof(T);  // numbers in one access

template <typename T> using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

__device__ inline double widen(double x) { return x; }
__device__ inline float widen(float x) { return x; }
template <typename T> __device__ T narrow(Wide<T> x) { return x; }
#ifdef __CUDACC__
__device__ inline float widen(__half x) { return __half2float(x); }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
template <> __device__ inline __half narrow(float x) { return __float2half_rn(x); }
template <> __device__ inline __nv_bfloat16 narrow(float x) { return __float2bfloat16_rn(x); }

// All blocks of a cooperative launch wait for each other; what they wrote before is seen after.
__device__ inline void grid_barrier() { cooperative_groups::this_grid().sync(); }
#endif

struct alignas(16) Line {
  uint32_t word[4];
};

// N numbers from `from`: in lines of 16 bytes where they fill one, for which `from` is aligned.
template <int N, typename T>
__device__ void load(const T* from, Wide<T> (&out)[N]) {
  if constexpr (N % WIDTH<T> == 0) {
#pragma unroll
    for (int i = 0; i < N; i += WIDTH<T>) {
      const Line line = *reinterpret_cast<const Line*>(from + i);
      T part[WIDTH<T>];
      memcpy(part, &line, sizeof line);
#pragma unroll
      for (int j = 0; j < WIDTH<T>; ++j) out[i + j] = widen(part[j]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) out[i] = widen(from[i]);
  }
}

template <int N, typename T>
__device__ void store(T* to, const Wide<T> (&in)[N]) {
  if constexpr (N % WIDTH<T> == 0) {
#pragma unroll
    for (int i = 0; i < N; i += WIDTH<T>) {
      T part[WIDTH<T>];
#pragma unroll
      for (int j = 0; j < WIDTH<T>; ++j) part[j] = narrow<T>(in[i + j]);
      Line line;
      memcpy(&line, part, sizeof line);
      *reinterpret_cast<Line*>(to + i) = line;
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) to[i] = narrow<T>(in[i]);
  }
}

template <int N> struct Count {
  __device__ constexpr operator int() const { return N; }
};

// Call f(Count<N>, offset) for this thread's share of n numbers: N = V at a time, the rest one by one.
template <int V, typename F>
__device__ void each(int64_t thread, int64_t threads, int64_t n, F f) {
  for (int64_t i = thread; i < n / V; i += threads) f(Count<V>(), i * V);
  if constexpr (V > 1)
    for (int64_t i = n / V * V + thread; i < n; i += threads) f(Count<1>(), i);
}

// The sum over a block's threads (a power of two of them), given to each: always the same tree.
__device__ inline double block_sum(double value) {
  __shared__ double part[THREADS];
  part[threadIdx.x] = value;
  __syncthreads();
  for (unsigned half = blockDim.x / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) part[threadIdx.x] += part[threadIdx.x + half];
    __syncthreads();
  }
  const double sum = part[0];
  __syncthreads();  // before the next sum overwrites it
  return sum;
}

// The sum over all threads of a cooperative launch, given to each: by block into `partials` (one a block), then over those.
__device__ inline double grid_sum(double value, double* partials) {
  const double own = block_sum(value);
  if (threadIdx.x == 0) partials[blockIdx.x] = own;
  grid_barrier();
  double rest = 0;
  for (unsigned i = threadIdx.x; i < gridDim.x; i += blockDim.x) rest += partials[i];
  return block_sum(rest);
}

}  // namespace snows

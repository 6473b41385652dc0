// A 2:4 weight times activations on sparse tensor cores, the main loop of sparse_linear and sparse_conv2d:
// out[n][m] = activation(bias[m] + sum over k of weight[m][k] input[n][k]), summed in float32.
//
// The weight, in the order of kernel_order.cuh, is mma.sp's sparse operand and goes through shared memory as it lies; tokens (or output
// pixels) are its columns, eight at a time. Every step of 64 columns of the weight is copied STAGES - 1 steps before its use. A token's
// part of a step is one row of eight lines, line j standing at j ^ (n % 8): the eight rows that ldmatrix reads at once are then on
// different banks, and so are the eight lines written at once.

#pragma once

#include <cmath>

#include "kernel_order.cuh"
#include "tensor_core.cuh"

namespace snows {

enum Activation { NONE, RELU, GELU };

// What a block computes, M x N of the weight's rows x tokens, and how its warps divide that: each WM x WN.
template <int M_, int N_, int WM_, int WN_, int STAGES_>
struct Shape {
  static constexpr int M = M_, N = N_, WM = WM_, WN = WN_, STAGES = STAGES_;
  static constexpr int WARPS_M = M / WM, THREADS = 32 * WARPS_M * (N / WN);
  static constexpr int A_LINES = M / TILE * 2 * TILE_LINES, LINES = A_LINES + 8 * N;  // of a stage: weights and codes, tokens
  static constexpr int PITCH = M + 4;                                                 // floats between tokens when sums are turned
  static constexpr int BYTES = STAGES * LINES * int(sizeof(Line));
  static_assert(BYTES >= 4 * PITCH * N && WM % TILE == 0 && WN % 8 == 0 && THREADS % 64 == 0);
};
using Large = Shape<128, 128, 64, 64, 3>;  // many tokens: 25 KB a stage, 6.25 KB of shared memory read for 64 x 64 x 32
using Medium = Shape<64, 64, 32, 32, 4>;
using Small = Shape<64, 16, 32, 16, 6>;    // up to 16 tokens: bound by reading the weight once

template <typename T>
struct Product {
  const Line* order;
  int rows, columns, tokens;
  const T* bias;   // (rows) or null
  T* out;          // (tokens, rows)
  float* partial;  // (splits, tokens, rows) where the columns are split among blocks, else null
  int splits, activation;
};

template <typename T>
__device__ void put(T* to, const float (&v)[8], int count, bool whole) {
  if (whole) {
    store(to, v);
  } else {
    for (int j = 0; j < 8 && j < count; ++j) to[j] = narrow<T>(v[j]);
  }
}

// Bias, activation and the store of eight sums of a token.
template <typename T>
__device__ void finish(const Product<T>& p, int n, int m, float (&v)[8]) {
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    if (p.bias != nullptr && m + j < p.rows) v[j] += widen(p.bias[m + j]);
    if (p.activation == RELU) v[j] = v[j] < 0 ? 0 : v[j];  // NaN stays
    if (p.activation == GELU) v[j] = 0.5f * v[j] * (1 + erff(v[j] * 0.70710678f));
  }
  put(p.out + int64_t(n) * p.rows + m, v, p.rows - m, p.rows % 8 == 0);
}

// The end of a block: the sums of lane 4 g + t are rows g and g + 8, tokens 2 t and 2 t + 1 of each 16 x 8; turn them in shared memory, so
// that whole lines are stored.
template <typename T, typename S>
__device__ void store_sums(const Product<T>& p, Line* memory, const float (&sum)[S::WM / TILE][2][S::WN / 8][4], int m0, int n0, int split) {
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int warp_m = warp % S::WARPS_M * S::WM, warp_n = warp / S::WARPS_M * S::WN;
  __syncthreads();
  float* const turned = reinterpret_cast<float*>(memory);
#pragma unroll
  for (int i = 0; i < 2 * S::WM / TILE; ++i)
#pragma unroll
    for (int j = 0; j < S::WN / 8; ++j)
#pragma unroll
      for (int r = 0; r < 4; ++r)
        turned[(warp_n + 8 * j + lane % 4 * 2 + r % 2) * S::PITCH + warp_m + 16 * i + r / 2 * 8 + lane / 4] = sum[i / 2][i % 2][j][r];
  __syncthreads();
  for (int i = thread; i < S::N * S::M / 8; i += S::THREADS) {
    const int n = i / (S::M / 8), m = m0 + i % (S::M / 8) * 8;
    if (n0 + n >= p.tokens || m >= p.rows) continue;
    float v[8];
    load(turned + n * S::PITCH + m - m0, v);
    if (p.partial == nullptr) finish(p, n0 + n, m, v);
    else put(p.partial + (int64_t(split) * p.tokens + n0 + n) * p.rows + m, v, p.rows - m, p.rows % 8 == 0);
  }
}

// Eight consecutive numbers of a token, `column` being the first one's, to shared memory.
template <typename Input>
__device__ void fetch(const Input& input, Line* to, const typename Input::Row& row, int k, const typename Input::Column& column) {
  if constexpr (Input::WIDE) {
    copy_async(to, input.at(row, column), input.there(row, column));
  } else {
    Line line = {};
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const auto one = input.column(k + j);
      if (input.there(row, one)) line.word[j / 2] |= uint32_t(*input.at(row, one)) << 16 * (j % 2);
    }
    *to = line;
  }
}

// `Input` finds the numbers: row(n) is computed once, column(k) once a step; at(row, column) is their address, if they are there(row,
// column), else they count as zeros. Tokens beyond the last may be any: they are not stored.
// WIDE: eight consecutive columns from a multiple of eight are one line in memory, or all zeros.
// EVEN: rows lie at one distance, later(row, by) is the one `by` on; they are not kept in shared memory then, whose reads stood in the way
// of every step's copies.
template <typename T, typename S, typename Input>
__device__ void sparse_product(const Product<T>& p, const Input& input) {
  __shared__ typename Input::Row tokens[Input::EVEN ? 1 : S::N];
  Line* const memory = shared_memory();
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int warp_m = warp % S::WARPS_M * S::WM, warp_n = warp / S::WARPS_M * S::WN;
  const int down = tiles_down(p.rows), steps = tiles_across(p.columns) / 2;
  const unsigned blocks_m = (p.rows + S::M - 1) / S::M, blocks_n = (p.tokens + S::N - 1) / S::N, block = blockIdx.x;
  const int m0 = block % blocks_m * S::M, n0 = block / blocks_m % blocks_n * S::N;  // rows fastest: tokens are read from memory once
  const int split = block / blocks_m / blocks_n, each = (steps + p.splits - 1) / p.splits;
  const int first = split * each, last = first + each < steps ? first + each : steps;  // none, where others have them all: zeros

  if constexpr (!Input::EVEN) {
    for (int n = thread; n < S::N; n += S::THREADS) tokens[n] = input.row(n0 + n);
    __syncthreads();
  }

  // What a thread copies of every step: of one tile row of the weights, and of every (THREADS / 8)-th token, whose line stands alike.
  constexpr int SHARE = S::THREADS / (S::M / TILE), EVERY = S::THREADS / 8;
  static_assert(SHARE >= 32 && EVERY % 8 == 0 && S::N % EVERY == 0);
  const int own = thread % SHARE, own_tile = thread / SHARE, part = thread % 8, token = thread / 8;
  const int tile = m0 / TILE + own_tile < down ? m0 / TILE + own_tile : down - 1;  // rows beyond are not stored
  const Line* from = p.order + (int64_t(tile) * steps + first) * (2 * TILE_LINES) + own;
  const int to_a = own_tile * 2 * TILE_LINES + own, to_b = S::A_LINES + 8 * token + (part ^ token % 8);
  [[maybe_unused]] const auto row = input.row(n0 + token);
  int k = 2 * TILE * first + 8 * part;  // of the next step to be copied; so are its stage and how many are left
  int filling = 0, left = last - first;
  auto fill = [&] {
    if (left > 0) {
      Line* const stage = memory + filling * S::LINES;
#pragma unroll
      for (int i = 0; i < 2 * TILE_LINES; i += SHARE)
        if (i + SHARE <= 2 * TILE_LINES || own < 2 * TILE_LINES - i) copy_async(stage + to_a + i, from + i);
      const auto column = input.column(k);
#pragma unroll
      for (int i = 0; i < S::N / EVERY; ++i) {
        Line* const to = stage + to_b + i * S::THREADS;
        if constexpr (Input::EVEN) fetch(input, to, input.later(row, i * EVERY), k, column);
        else fetch(input, to, tokens[token + i * EVERY], k, column);
      }
      from += 2 * TILE_LINES, k += 2 * TILE, --left;
      filling = filling + 1 < S::STAGES ? filling + 1 : 0;
    }
    commit();  // an empty group at the end, so that their number is right
  };

  float sum[S::WM / TILE][2][S::WN / 8][4] = {};
  for (int s = 0; s < S::STAGES - 1; ++s) fill();
  for (int step = first, reading = 0; step < last; ++step, reading = reading + 1 < S::STAGES ? reading + 1 : 0) {
    wait<S::STAGES - 2>();
    __syncthreads();  // the step's lines of all threads are there, and the last step's have been read
    fill();
    const Line *a = memory + reading * S::LINES + warp_m / TILE * 2 * TILE_LINES, *b = memory + reading * S::LINES + S::A_LINES + 8 * warp_n;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      Line values[S::WM / TILE][2];
      uint32_t codes[S::WM / TILE];
#pragma unroll
      for (int i = 0; i < S::WM / TILE; ++i) {
        const Line* tile = a + (2 * i + half) * TILE_LINES;
        values[i][0] = tile[lane];
        values[i][1] = tile[32 + lane];
        codes[i] = reinterpret_cast<const uint32_t*>(tile + 64)[lane];
      }
#pragma unroll
      for (int j = 0; j < S::WN / 8; ++j) {
        const Line x = load_matrices(b + 8 * (8 * j + lane % 8) + ((4 * half + lane / 8) ^ lane % 8));
#pragma unroll
        for (int i = 0; i < S::WM / TILE; ++i) {
          mma_sp<T, 0>(sum[i][0][j], values[i][0], x, codes[i]);
          mma_sp<T, 1>(sum[i][1][j], values[i][1], x, codes[i]);
        }
      }
    }
  }

  store_sums<T, S>(p, memory, sum, m0, n0, split);
}

template <typename T, typename S, typename Input>
__global__ void __launch_bounds__(S::THREADS) sparse_product_kernel(Product<T> p, Input input) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  sparse_product<T, S>(p, input);
#endif
}

// The sum over splits, in order, so that a run repeats to the last bit.
template <typename T>
__global__ void __launch_bounds__(THREADS) sum_splits_kernel(Product<T> p) {
  const int across = (p.rows + 7) / 8;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < int64_t(p.tokens) * across; i += int64_t(gridDim.x) * blockDim.x) {
    const int n = i / across, m = i % across * 8;
    float v[8] = {}, part[8];
    for (int s = 0; s < p.splits; ++s) {
      const float* from = p.partial + (int64_t(s) * p.tokens + n) * p.rows + m;
      if (p.rows % 8 == 0) load(from, part);
      else for (int j = 0; j < 8; ++j) part[j] = m + j < p.rows ? from[j] : 0;
#pragma unroll
      for (int j = 0; j < 8; ++j) v[j] += part[j];
    }
    finish(p, n, m, v);
  }
}

// Which shape a product takes, and among how many blocks its columns are split: enough blocks for the processors, with four steps each
// at least. A first guess, to be measured.
struct Choice {
  enum { LARGE, MEDIUM, SMALL } shape;
  int64_t blocks;
  int splits;
};

template <typename S> int64_t blocks_of(int64_t rows, int64_t tokens) { return (rows + S::M - 1) / S::M * ((tokens + S::N - 1) / S::N); }

inline Choice choose(int64_t rows, int64_t columns, int64_t tokens, bool wide, int processors) {
  Choice c{Choice::LARGE, blocks_of<Large>(rows, tokens), 1};
  if (wide && c.blocks >= 2 * processors) return c;  // two of Large run on a processor at a time
  c = tokens <= Small::N && wide ? Choice{Choice::SMALL, blocks_of<Small>(rows, tokens), 1} : Choice{Choice::MEDIUM, blocks_of<Medium>(rows, tokens), 1};
  const int64_t most = tiles_across(columns) / 2 / 4, wanted = c.blocks > 0 ? 2 * processors / c.blocks : 1;
  c.splits = wanted < most ? wanted : most;
  if (c.splits < 1) c.splits = 1;
  c.blocks *= c.splits;
  return c;
}

// Have `launch` run the kernels of a choice, with (kernel, blocks, threads, bytes of shared memory, arguments...).
template <typename T, typename Input, typename Launch>
void sparse_product_by(const Choice& c, const Product<T>& p, const Input& input, bool wide, Launch launch) {
  auto with = [&](auto shape, auto in) {
    using S = decltype(shape);
    launch(sparse_product_kernel<T, S, decltype(in)>, unsigned(c.blocks), S::THREADS, S::BYTES, p, in);
  };
  if (!wide) with(Medium(), input.narrow());
  else if (c.shape == Choice::LARGE) with(Large(), input);
  else if (c.shape == Choice::MEDIUM) with(Medium(), input);
  else with(Small(), input);
  if (c.splits > 1) {
    const int64_t blocks = (int64_t(p.tokens) * ((p.rows + 7) / 8) + THREADS - 1) / THREADS;
    launch(sum_splits_kernel<T>, unsigned(blocks < 65536 ? blocks : 65536), THREADS, 0, p);
  }
}

}  // namespace snows

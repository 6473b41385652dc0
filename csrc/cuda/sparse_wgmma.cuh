// A 2:4 weight times many tokens by Hopper's warpgroups: what sparse_product.cuh computes, with wgmma.mma_async.sp.
//
// The instruction takes the sparse operand from registers, and a warp's 16 rows of it, values and codes, as mma.sp does: so it reads the
// same order (kernel_order.cuh), each lane straight from memory, one step ahead. Of a tile of 32 rows, one a warp, the instruction takes the
// first 16 with selector 0 and the others, in a second product, with selector 1. Tokens lie in shared memory as for ldmatrix, eight rows of
// eight lines, line j at j ^ (n % 8): the instruction's 128-byte swizzle, where they begin on 1024 bytes.
//
// Products run while the step after is prepared. A barrier says that a step's tokens are there and that the products of two steps ago are
// done, whose stage is then filled again.

#pragma once

#include "sparse_linear.cuh"

namespace snows {

constexpr bool WGMMA_BY_DEFAULT = false;  // for many tokens on Hopper, in place of Large: to be measured (bench/kernels_sparse.py)

struct Warpgroups {  // as Shape
  static constexpr int M = 256, N = 128, WM = TILE, WN = N, STAGES = 8;
  static constexpr int WARPS_M = M / WM, THREADS = 32 * WARPS_M, LINES = 8 * N, PITCH = M + 4;
  static constexpr int ALIGNMENT = 1024, BYTES = ALIGNMENT + 4 * PITCH * N;
  static_assert(STAGES * LINES * int(sizeof(Line)) <= 4 * PITCH * N);
};

struct Fragments {  // of a warp's tile row for a step of 64 columns, by 32 columns
  Line values[2][2];
  uint32_t codes[2];

  __device__ void load(const Line* tiles, int lane) {
#pragma unroll
    for (int half = 0; half < 2; ++half, tiles += TILE_LINES) {
      values[half][0] = tiles[lane];
      values[half][1] = tiles[32 + lane];
      codes[half] = reinterpret_cast<const uint32_t*>(tiles + 64)[lane];
    }
  }
};

// What tells wgmma where 32 columns of the tokens are: the address, the bytes from eight tokens to the next eight, the swizzle's number.
__device__ inline uint64_t tokens_at(const Line* from) {
  return uint64_t(1) << 62 | uint64_t(8 * 128 / 16) << 32 | uint64_t((shared_address(from) & 0x3FFFF) / 16);
}

template <typename T>
__device__ void wgmma_product(const Product<T>& p, const Tokens<true>& input) {
  using S = Warpgroups;
  Line* const memory = shared_memory() + (0u - shared_address(shared_memory())) % S::ALIGNMENT / sizeof(Line);
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int steps = tiles_across(p.columns) / 2, down = tiles_down(p.rows);
  const int blocks_m = (p.rows + S::M - 1) / S::M, m0 = blockIdx.x % blocks_m * S::M, n0 = blockIdx.x / blocks_m * S::N;  // rows fastest

  constexpr int EVERY = S::THREADS / 8;
  const int part = thread % 8, token = thread / 8, to = 8 * token + (part ^ token % 8);
  const Tokens<true>::Row row = input.row(n0 + token);
  int filled = 0, filling = 0;  // steps; a stage
  auto fill = [&] {
    if (filled < steps) {
      const int k = 2 * TILE * filled + 8 * part;
#pragma unroll
      for (int i = 0; i < S::N / EVERY; ++i) fetch(input, memory + filling * S::LINES + to + i * S::THREADS, input.later(row, i * EVERY), k, input.column(k));
      ++filled, filling = filling + 1 < S::STAGES ? filling + 1 : 0;
    }
    commit();  // an empty group at the end, so that their number is right
  };

  const int tile = m0 / TILE + warp < down ? m0 / TILE + warp : down - 1;  // rows beyond are not stored
  const Line* from = p.order + int64_t(tile) * steps * (2 * TILE_LINES);
  float sum[1][2][S::N / 8][4] = {};
  int step = 0, reading = 0;
  auto advance = [&](const Fragments& now, Fragments& next) {
    wait<S::STAGES - 3>();
    publish();
    __syncthreads();
    registers_ready();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint64_t b = tokens_at(memory + reading * S::LINES + 4 * half);
      wgmma_sp<T, 0>(sum[0][0], now.values[half][0], b, now.codes[half]);
      wgmma_sp<T, 1>(sum[0][1], now.values[half][1], b, now.codes[half]);
    }
    commit_products();
    fill();
    wait_products<1>();  // those of the last step, which read `next`
    if (++step < steps) from += 2 * TILE_LINES;
    next.load(from, lane);
    reading = reading + 1 < S::STAGES ? reading + 1 : 0;
  };

  Fragments even, odd;  // not one and a copy of it: products still read the one while the other is loaded
  even.load(from, lane);
  for (int s = 0; s < S::STAGES - 2; ++s) fill();
  while (step < steps) {
    advance(even, odd);
    if (step < steps) advance(odd, even);
  }
  wait_products<0>();
  store_sums<T, S>(p, memory, sum, m0, n0, 0);
}

template <typename T>
__global__ void __launch_bounds__(Warpgroups::THREADS, 1) wgmma_product_kernel(Product<T> p, Tokens<true> input) {
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  wgmma_product(p, input);
#endif
}

// Whether there are enough blocks for the processors; fewer are for sparse_product.cuh, which also splits the columns.
inline bool wgmma_takes(int64_t rows, int64_t tokens, bool wide, int processors) {
  return wide && blocks_of<Warpgroups>(rows, tokens) >= processors;
}

// As sparse_product_by.
template <typename T, typename Launch>
void wgmma_product_by(const Product<T>& p, const Tokens<true>& input, Launch launch) {
  launch(wgmma_product_kernel<T>, unsigned(blocks_of<Warpgroups>(p.rows, p.tokens)), Warpgroups::THREADS, Warpgroups::BYTES, p, input);
}

}  // namespace snows

// N:M selection in one pass: the mask as bytes, as bits, and 2:4's codes, whichever are asked for.
// Specification: snows/reference/masks.py, nm_mask and nm_select.
//
// A thread ranks whole groups in registers, comparing every pair once, and the block collects the chosen bits of its tile in
// shared memory; from there each output is written in order. Reads rows * columns scores; writes a byte for each (mask), or
// an eighth of one (bits, codes).

#pragma once

#include "memory.cuh"

namespace snows {

template <typename T>
struct Selection {
  const T* scores;  // (rows, columns)
  int64_t rows, columns;
  int n, m;
  uint8_t* mask;   // (rows, columns), 0 or 1; null where not wanted, like the others
  uint8_t* bits;   // (rows, ceil(columns / 8)): bit j of byte b is column 8 b + j
  uint8_t* codes;  // likewise, a nibble a group: first kept index | second << 2; for 2:4 alone
};

// The n best of M as bits: an earlier entry goes before a later one unless the later is higher.
template <int M, typename S>
__device__ uint32_t best(const S* s, int n) {
  int rank[M] = {};
  uint32_t chosen = 0;
#pragma unroll
  for (int j = 1; j < M; ++j)
#pragma unroll
    for (int i = 0; i < j; ++i) {
      const bool later = s[j] > s[i];
      rank[i] += later;
      rank[j] += !later;
    }
#pragma unroll
  for (int i = 0; i < M; ++i) chosen |= uint32_t(rank[i] < n) << i;
  return chosen;
}

// A group's code by its bits: the table's nibble of that index. A group beyond the row's end counts as its first two.
__device__ inline uint32_t code_of(uint32_t bits) { return 0x444E4DC449844444ull >> 4 * bits & 15; }

// `Whole`: groups of exactly M columns, scores aligned to 16 bytes, columns a multiple of UNIT. Otherwise m <= M, and what is
// missing of a group counts as -inf, which loses every tie.
template <typename T, int M, bool Whole>
struct Tiling {
  static constexpr int UNIT = Whole && M < WIDTH<T> ? WIDTH<T> : M;                           // scores loaded together
  static constexpr int UNITS = Whole && UNIT * sizeof(T) < 64 ? 64 / (UNIT * sizeof(T)) : 1;  // a thread: 64 bytes in flight
  static __host__ __device__ int64_t width(int m) { return THREADS * UNITS * (Whole ? UNIT : m); }  // columns in a tile
};

template <typename T, int M, bool Whole>
__global__ void __launch_bounds__(THREADS, M == 32 ? 2 : 4) nm_select_kernel(Selection<T> s) {
  using Tile = Tiling<T, M, Whole>;
  constexpr int UNIT = Tile::UNIT, UNITS = Tile::UNITS, WORDS = THREADS * UNITS * UNIT / 32;
  __shared__ uint32_t chosen[WORDS];
  const int stride = Whole ? UNIT : s.m, thread = threadIdx.x;
  const int64_t width = Tile::width(s.m), across = (s.columns + width - 1) / width, bytes = (s.columns + 7) / 8;
  for (int64_t tile = blockIdx.x; tile < s.rows * across; tile += gridDim.x) {
    const int64_t row = tile / across, start = tile % across * width;
    const int left = s.columns - start < width ? s.columns - start : width;
    const T* scores = s.scores + row * s.columns + start;
    for (int i = thread; i < WORDS; i += THREADS) chosen[i] = 0;
    Wide<T> value[UNITS][UNIT];
#pragma unroll
    for (int u = 0; u < UNITS; ++u) {
      const int first = (u * THREADS + thread) * stride;
      if constexpr (Whole) {
        if (first < left) load(scores + first, value[u]);
      } else {
#pragma unroll
        for (int j = 0; j < M; ++j) value[u][j] = j < s.m && first + j < left ? widen(scores[first + j]) : Wide<T>(-INFINITY);
      }
    }
    __syncthreads();
#pragma unroll
    for (int u = 0; u < UNITS; ++u) {
      const int first = (u * THREADS + thread) * stride, word = first / 32, shift = first % 32;
      if (first >= left) continue;
      uint32_t bits = 0;
#pragma unroll
      for (int g = 0; g < UNIT; g += M) bits |= best<M>(value[u] + g, s.n) << g;
      atomicOr(&chosen[word], bits << shift);  // integers: the order does not matter
      if (!Whole && shift + s.m > 32) atomicOr(&chosen[word + 1], bits >> (32 - shift));
    }
    __syncthreads();
    if (s.mask != nullptr) {
      uint8_t* out = s.mask + row * s.columns + start;
      for (int c = 16 * thread; c < left; c += 16 * THREADS) {
        const uint32_t bits = chosen[c / 32] >> c % 32;
        if (c + 16 <= left && reinterpret_cast<uintptr_t>(out + c) % sizeof(Line) == 0) {
          Line line;  // a nibble's four bits go to four bytes by one product
#pragma unroll
          for (int q = 0; q < 4; ++q) line.word[q] = (bits >> 4 * q & 15) * 0x00204081u & 0x01010101u;
          *reinterpret_cast<Line*>(out + c) = line;
        } else {
          for (int j = 0; j < 16 && c + j < left; ++j) out[c + j] = bits >> j & 1;
        }
      }
    }
    for (int b = thread; 8 * b < left; b += THREADS) {
      const uint32_t bits = chosen[b / 4] >> 8 * (b % 4) & 255;
      const int64_t to = row * bytes + start / 8 + b;
      if (s.bits != nullptr) s.bits[to] = left - 8 * b < 8 ? bits & ((1u << (left - 8 * b)) - 1) : bits;
      if (s.codes != nullptr) s.codes[to] = code_of(bits & 15) | code_of(bits >> 4) << 4;
    }
    __syncthreads();  // before the next tile's bits
  }
}

template <typename T, int M, typename Launch>
void nm_select_by(const Selection<T>& s, Launch launch) {
  const bool whole = s.m == M && reinterpret_cast<uintptr_t>(s.scores) % sizeof(Line) == 0 && s.columns % Tiling<T, M, true>::UNIT == 0;
  const int64_t width = whole ? Tiling<T, M, true>::width(M) : Tiling<T, M, false>::width(s.m);
  const int64_t tiles = s.rows * ((s.columns + width - 1) / width);
  const unsigned blocks = tiles < INT32_MAX ? tiles : INT32_MAX;
  if (blocks > 0) launch(whole ? nm_select_kernel<T, M, true> : nm_select_kernel<T, M, false>, blocks, THREADS, s);
}

// Choose the kernel for m <= 32 and have `launch` run it with (kernel, blocks, threads, selection).
template <typename T, typename Launch>
void nm_select(Selection<T> s, Launch launch) {
  const bool packed = s.bits != nullptr || s.codes != nullptr;
  if (s.columns % s.m == 0 && (!packed || s.columns % 8 == 0)) {  // no group and no byte spans two rows: one long row
    s.columns *= s.rows;
    s.rows = s.columns > 0;
  }
  s.m <= 2 ? nm_select_by<T, 2>(s, launch) : s.m <= 4 ? nm_select_by<T, 4>(s, launch) : s.m <= 8 ? nm_select_by<T, 8>(s, launch)
    : s.m <= 16 ? nm_select_by<T, 16>(s, launch) : nm_select_by<T, 32>(s, launch);
}

}  // namespace snows

// A packed 2:4 weight of 16-bit numbers in the order in which mma.sp reads it. Specification: snows/reference/packed.py, kernel_order.
//
// The row view is cut into tiles of 32 x 32, padded with +0.0 (and legal codes) to whole tiles, of which a row has an even number.
// A tile is 72 lines of 16 bytes, and every lane finds its operands at its own number:
//
//   lines  0..31   rows  0..15: line l is all four registers of lane l's fragment of the 16x16 stored values
//   lines 32..63   rows 16..31: likewise
//   lines 64..71   32 words of codes: word l is lane l's. Lane 4 g + 2 h + k has rows 16 h + g (low half) and 16 h + g + 8 (high half),
//                  columns 16 k .. 16 k + 15; so one load serves both halves of the rows, mma.sp's selector being h.
//
// Tiles of 32 rows stand one after another along the columns: what a block of threads reads is contiguous.

#pragma once

#include "memory.cuh"

namespace snows {

constexpr int TILE = 32, TILE_LINES = 72, TILE_WORDS = 4 * TILE_LINES;

inline __host__ __device__ int64_t tiles_down(int64_t rows) { return (rows + TILE - 1) / TILE; }
inline __host__ __device__ int64_t tiles_across(int64_t columns) { return (columns + 2 * TILE - 1) / (2 * TILE) * 2; }

struct Stored {  // as snows/packing.py writes it
  const uint16_t* values;  // (rows, 2 groups)
  const uint8_t* codes;    // a nibble a group, lower first
  int64_t rows, columns;

  __device__ int64_t groups() const { return (columns + 3) / 4; }
  __device__ uint32_t value(int64_t row, int64_t at) const { return row < rows && at < 2 * groups() ? values[row * 2 * groups() + at] : 0; }
  __device__ uint32_t code(int64_t row, int64_t group) const {
    if (row >= rows || group >= groups()) return 4;  // first and second
    const int64_t i = row * groups() + group;
    return codes[i / 2] >> 4 * (i % 2) & 15;
  }
};

// A thread writes a word. It reads with little regard for order: this runs once a weight.
__global__ void __launch_bounds__(THREADS) kernel_order_kernel(Stored s, uint32_t* order) {
  const int64_t across = tiles_across(s.columns), words = tiles_down(s.rows) * across * TILE_WORDS;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < words; i += int64_t(gridDim.x) * blockDim.x) {
    const int64_t tile = i / TILE_WORDS, row = tile / across * TILE, column = tile % across * TILE;
    const int in = i % TILE_WORDS;
    uint32_t word = 0;
    if (in < 256) {
      const int lane = in / 4 % 32, reg = in % 4;  // registers: rows g and g + 8, then the same of the right half
      const int64_t r = row + in / 128 * 16 + reg % 2 * 8 + lane / 4, at = column / 2 + reg / 2 * 8 + lane % 4 * 2;
      word = s.value(r, at) | s.value(r, at + 1) << 16;
    } else {
      const int lane = in - 256;
      const int64_t r = row + lane % 4 / 2 * 16 + lane / 4, group = column / 4 + lane % 2 * 4;
      for (int j = 0; j < 4; ++j) word |= s.code(r, group + j) << 4 * j | s.code(r + 8, group + j) << (16 + 4 * j);
    }
    order[i] = word;
  }
}

}  // namespace snows

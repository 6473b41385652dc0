// A packed weight times a panel of activations. Knows nothing of torch.
//
// The activations of up to 128 tokens (or output pixels) stand in a panel: a few cache lines of 16 numbers for each column of
// the weight, wherever the caller put them. A stored weight is then one broadcast, and one fused multiply-add a line.
// What bounds this is loads: the processor does two multiply-adds a cycle and two loads, and each of these would need one
// load of its own. So rows go in pairs, chosen to have many columns in common: such a column's vectors are loaded once for
// both. Sums stay in registers over a block of columns, whose part of the panel stays in the first-level cache.
//
// Where the processor multiplies bfloat16, weights and activations of that type stay as they are: a line holds 32 tokens, a step takes
// two columns, and one instruction adds both products to 16 sums. The two lines are interleaved in registers, so any two columns will do;
// for the sums of 32 tokens to come out in order, a line holds them as 0..3, 16..19, 4..7, 20..23 and so on.

#pragma once

#include <cstdint>
#include <cstring>

#include "order.h"
#include "simd.h"

namespace snows {

// All pairs of a chunk over one block: sums[row] (+)= the weights times the block of the panel.
struct Part {
  const Pair* pairs;
  int64_t count, vectors, lanes;
  const float* weights;
  const uint16_t* lines;
  const void* panel;
  float* sums;        // a line's tokens times vectors for each row
  const float* bias;  // a row's sums begin with it; null where they go on
  bool half;          // see Source
  const float* at(uint16_t line) const { return static_cast<const float*>(panel) + int64_t(line) * 16; }  // a whole cache line
};

// What the product reads of a chunk over one block of the order; its lines may be those of another layout. Where activations and sums
// stand is the caller's to say.
inline Part part_of(const Order& o, int64_t chunk, int64_t block, const uint16_t* lines) {
  const int64_t at = chunk * o.blocks() + block, count = o.pairs_of(chunk);
  const Pair* const pairs = o.pairs + chunk * o.blocks() * (Order::kChunk / 2) + block * count;
  return {pairs, count, o.vectors, o.lanes(), o.weights + o.starts[2 * at], lines + o.starts[2 * at + 1], nullptr, nullptr, nullptr, false};
}

// A step's lines by one load, each 16 bits above the one before.
template <typename T>
SNOWS_INLINE inline T together(const uint16_t* lines) {
  T all;
  std::memcpy(&all, lines, sizeof all);
  SNOWS_KEEP("r", all);
  return all;
}

// In float32, by the instructions that `simd()` names.
void product(const Part& part);

// Part of a row of an image: its numbers from `begin` to `end`, of which number i is at from[i]; there are zeros before and after.
struct Piece {
  const void* from;
  int64_t begin, end;
};

// Number i of all pieces in line i, where AVX-512 is (elsewhere nothing): 16 pieces of float, or 32 of bfloat16 in the order of a panel's lines.
void lines_of_pieces(const Piece* pieces, int64_t count, int64_t size, float* lines);

// out[j * out_stride + i] = in[i * in_stride + j] for i < rows, j < columns; past the caches where that is wanted and possible.
void transpose(const float* in, int64_t in_stride, float* out, int64_t out_stride, int64_t rows, int64_t columns, bool past = false);

}  // namespace snows

// A packed weight in the order that the product reads (product.h), and how it is made of values and codes. Knows nothing of torch.

#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace snows {

// Two rows of a chunk over one block. Their weights and lines follow each other in three runs of steps. In bfloat16 a step has two
// columns wherever another has one, and a weight's word is the two that belong to them, the first in its lower half.
struct Pair {
  int32_t shared;         // steps of a column that both have: two weights, one column
  int32_t both;           // steps of a column each: two weights, two columns
  int32_t rest;           // what only the first has still: one weight, one column
  int32_t first, second;  // which rows of the chunk
};

// The weight as the kernels read it. In memory (int32 words): the fields of the header, then the four arrays.
struct Order {
  int64_t rows, channels;
  int64_t taps;     // of a convolution's kernel, 1 for a linear layer: column tap * channels + channel
  int64_t block;    // channels in a block, which holds them for every tap
  int64_t vectors;  // cache lines of tokens: the widest panel of which a block fits in the first-level cache
  int64_t steps, entries;  // numbers of lines and of words of weights
  int64_t bfloat16;        // 1 where weights and panels are

  static constexpr int64_t kHeader = 16;  // eight fields, five words of the origin, the rest zero
  static constexpr int64_t kChunk = 512;  // rows among which pairs are chosen

  const int32_t* starts;    // (chunk, block): its first weight and its first step
  const Pair* pairs;        // (chunk, block, pairs(chunk))
  const float* weights;     // entries; in bfloat16 pairs of them
  const uint16_t* lines;    // steps: where a column's lines begin in an unfolded panel, (tap * block + channel of the block) * vectors

  int64_t lanes() const { return bfloat16 ? 32 : 16; }  // tokens in a cache line
  int64_t chunks() const { return (rows + kChunk - 1) / kChunk; }
  int64_t blocks() const { return (channels + block - 1) / block; }
  int64_t pairs_of(int64_t chunk) const { return (std::min(kChunk, rows - chunk * kChunk) + 1) / 2; }
  int64_t words() const;  // in memory, the header included
  static Order of_header(const int32_t* words);
  Order& with_arrays(const int32_t* words);  // the header's numbers are those of so many words
};

// A packed weight in float32, sized (rows, channels) of a linear layer, or (rows, channels, height, width) of a convolution.
struct Packed {
  const float* values;
  const uint8_t* codes;
  int64_t stored, bytes;  // how many values, and codes
  int64_t rows, channels, height, width;
  bool convolves;
  int64_t n, m;
  int64_t columns() const { return channels * height * width; }
};

// The words of its order, zeros where the origin belongs; none for codes that are not sound, or where a block has too many lines.
std::vector<int32_t> make_order(const Packed& weight, bool bfloat16);

}  // namespace snows

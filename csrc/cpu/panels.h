// A packed weight times a matrix of activations, shared by the linear layer and the convolution.
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

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>

#include "checks.h"
#include "simd.h"

namespace snows {

// Two rows of a chunk over one block. Their weights and lines follow each other in three runs of steps. In bfloat16 a step has two
// columns wherever another has one, and a weight's word is the two that belong to them, the first in its lower half.
struct Pair {
  int32_t shared;         // steps of a column that both have: two weights, one column
  int32_t both;           // steps of a column each: two weights, two columns
  int32_t rest;           // what only the first has still: one weight, one column
  int32_t first, second;  // which rows of the chunk
};

// Which weight an order was made of: some of its numbers, and where they lay, how often they had been changed then. Two weights may lie in
// copies (a compiled program's constants), so the place alone tells nothing; changes are counted at one place.
struct Origin {
  uint64_t sample, place;
  uint32_t changes;
  static Origin of(const at::Tensor& values, const at::Tensor& codes);
  bool same(const Origin& now) const { return sample == now.sample && (place != now.place || changes == now.changes); }
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
  // The order of this weight, whose arguments were checked; an error if the words are another's, or of what the weight was before it changed.
  static Order read(const char* op, const at::Tensor& words, const at::Tensor& values, const at::Tensor& codes, at::IntArrayRef shape);
};

// Where a block's part of a strip stands; without vectors there is no such strip.
struct Source {
  const void* at;
  int64_t vectors;
  bool half = false;  // no more than 8 tokens: the rest of a line, and of its sums, is anything
};

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
  const float* at(uint16_t line) const { return static_cast<const float*>(panel) + int64_t(line) * 16; }
};

// A step's lines by one load, each 16 bits above the one before.
template <typename T>
SNOWS_INLINE inline T together(const uint16_t* lines) {
  T all;
  std::memcpy(&all, lines, sizeof all);
#ifdef SNOWS_X86
  SNOWS_KEEP("r", all);
#endif
  return all;
}

// How a layer gives its activations and takes its sums. A panel is one strip, or several that are stored together.
// Both functions run on many threads.
struct Panels {
  int64_t count;
  int64_t strips;         // of a panel, the most
  int64_t vectors;        // of a strip, the most
  int64_t lanes;          // tokens of a vector: the order's, or 8, half a cache line
  int64_t scratch;        // floats of it that `fill` gets, aligned to a cache line
  const uint16_t* lines;  // the order's, or the same in a panel of another layout: a column's vectors begin lines[i] of them behind the block's part
  // `first` says that the scratch memory holds nothing of this panel yet.
  std::function<Source(float* scratch, int64_t panel, int64_t strip, int64_t block, bool first)> fill;
  // sums[strip * step + r * lanes * (the strip's vectors) + i] belongs to row + r and token i of the strip. 8 vectors behind them
  // are readable.
  std::function<void(const float* sums, int64_t step, int64_t panel, int64_t row, int64_t rows)> store;
};

// Memory that a thread keeps from call to call, so that it is in a near cache and no page of it is new.
class Scratch {
 public:
  float* floats(int64_t count);  // at least so many, aligned to a cache line

 private:
  std::vector<float> memory_;
};

// Over all panels: fill, multiply, add the bias, apply the activation, store.
void multiply(const Order& order, const Panels& panels, const at::Tensor& bias, c10::string_view activation);

// The dense weight, for what no kernel takes.
at::Tensor unpack(const at::Tensor& values, const at::Tensor& codes, at::IntArrayRef shape, int64_t n, int64_t m);
at::Tensor activate(const at::Tensor& output, c10::string_view activation);

// A bias in float32, contiguous; undefined without one. Kernels compute in float32, whatever 16 bits come in and go out.
at::Tensor widened(const std::optional<at::Tensor>& bias);

// Where the processor has the instructions (bfloat16.cpp): all pairs of a chunk over one block, for panels of bfloat16.
void multiply_bfloat16(const Part& part);

// Lines of bfloat16 from the transposed pairs of columns that a panel's memory holds: `pairs` times `vectors` lines for 32 tokens, which
// become two columns' lines.
void part_columns(float* panel, int64_t pairs, int64_t vectors);

// Two rows of sums each, rounded, beside each other in one row of words: out[i * out_stride + t] is token t of rows 2 i and 2 i + 1.
void round_pairs(const float* sums, int64_t stride, float* out, int64_t out_stride, int64_t pairs, int64_t tokens);

// Lines of 32 numbers in order, to the order of a panel's lines.
void interleave_halves(float* lines, int64_t count);

// Sums, rounded.
void round_row(const float* sums, int64_t count, at::BFloat16* out);

// Part of a row of an image: its numbers from `begin` to `end`, of which number i is at from[i]; there are zeros before and after.
struct Piece {
  const void* from;
  int64_t begin, end;
};

// Number i of all pieces in line i, where AVX-512 is: 16 pieces of float, or 32 of bfloat16 in the order of a panel's lines.
void lines_of_pieces(const Piece* pieces, int64_t count, int64_t size, float* lines);

// out[j * out_stride + i] = in[i * in_stride + j] for i < rows, j < columns; past the caches where that is wanted and possible.
void transpose(const float* in, int64_t in_stride, float* out, int64_t out_stride, int64_t rows, int64_t columns, bool past = false);

// The input times the packed weight plus bias, in float32, for few tokens; undefined where there is no kernel for it. Values (of 32 or 16 bits),
// codes and bias, which may be undefined, are contiguous.
at::Tensor few_tokens(const at::Tensor& input, const at::Tensor& values, const at::Tensor& codes, const at::Tensor& bias, int64_t rows, int64_t n, int64_t m);

}  // namespace snows

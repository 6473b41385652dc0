// A packed weight times a matrix of activations, shared by the linear layer and the convolution.

#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <vector>

#include "checks.h"
#include "order.h"
#include "product.h"

namespace snows {

// Which weight an order was made of: some of its numbers, and where they lay, how often they had been changed then. Two weights may lie in
// copies (a compiled program's constants), so the place alone tells nothing; changes are counted at one place.
struct Origin {
  uint64_t sample, place;
  uint32_t changes;
  static Origin of(const at::Tensor& values, const at::Tensor& codes);
  bool same(const Origin& now) const { return sample == now.sample && (place != now.place || changes == now.changes); }
};

// The order of this weight, whose arguments were checked; an error if the words are another's, or of what the weight was before it changed.
Order read_order(const char* op, const at::Tensor& words, const at::Tensor& values, const at::Tensor& codes, at::IntArrayRef shape);

// Where a block's part of a strip stands; without vectors there is no such strip.
struct Source {
  const void* at;
  int64_t vectors;
  bool half = false;  // no more than 8 tokens: the rest of a line, and of its sums, is anything
};

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

// Up to how many tokens a kernel for few of them takes, of a weight with so many columns, values and entries; 0 where none does.
int64_t most_tokens(int64_t columns, int64_t n, int64_t m, int64_t stored, int64_t all);

// The input times the packed weight plus bias, in float32, for few tokens; undefined where there is no kernel for it. Values (of 32 or 16 bits),
// codes and bias, which may be undefined, are contiguous.
at::Tensor few_tokens(const at::Tensor& input, const at::Tensor& values, const at::Tensor& codes, const at::Tensor& bias, int64_t rows, int64_t n, int64_t m);

}  // namespace snows

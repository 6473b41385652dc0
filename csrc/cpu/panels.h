// A packed weight times a matrix of activations, shared by the linear layer and the convolution.
//
// The activations of up to `tokens` tokens (or output pixels) stand in a panel, one row of tokens a column of the weight:
// panel[column][token]. A stored weight is then one broadcast, and one fused multiply-add for each vector of tokens.
// What bounds it is loads: for R rows and V vectors the accumulators stay in registers over a block of columns whose part
// of the panel (32 KiB) stays in the first-level cache; a chunk of rows' accumulators stays in the second.

#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>

namespace snows {

// The weight as the kernels read it. In memory (int32 words): the fields of the header, then the four arrays.
struct Order {
  int64_t rows, columns;
  int64_t block;   // columns in a block
  int64_t tokens;  // tokens in a panel
  int64_t bundle;  // rows whose weights are interleaved, R
  int64_t steps;   // in all: one stored weight of each row of a bundle

  static constexpr int64_t kHeader = 8;
  static constexpr int64_t kChunk = 256;         // rows whose accumulators are kept together

  const int32_t* starts;    // (chunk, block, bundle): its first step; and one past the last
  const int32_t* row;       // (chunk, block, bundle, R): which row of the chunk; kChunk where there is none
  const float* weights;     // (steps, R)
  const uint16_t* offsets;  // (steps, R): bytes from the block's first column to this weight's

  int64_t chunks() const { return (rows + kChunk - 1) / kChunk; }
  int64_t blocks() const { return (columns + block - 1) / block; }
  int64_t bundles() const { return kChunk / bundle; }  // in a chunk, the last one's missing rows included
  static Order read(const at::Tensor& words);
};

using Fill = std::function<void(float* panel, int64_t first, int64_t count, int64_t stride)>;
using Store = std::function<void(const float* sums, int64_t row, int64_t rows, int64_t first, int64_t count, int64_t stride)>;

// Over all tokens: fill a panel, multiply, add the bias, apply the activation, store. Both functions run on many threads.
// `fill` writes panel[column * stride + i] for tokens first + i, i < count, and zeros up to the next multiple of 16.
// `store` gets sums[r * stride + i] for rows row + r.
void multiply(const Order& order, int64_t tokens, const at::Tensor& bias, c10::string_view activation, const Fill& fill, const Store& store);

// snows/ops.py, kernel_order: the words that Order::read reads, or none.
at::Tensor kernel_order(const at::Tensor& values, const at::Tensor& codes, at::IntArrayRef shape, int64_t n, int64_t m);

// The dense weight, for what no kernel takes.
at::Tensor unpack(const at::Tensor& values, const at::Tensor& codes, at::IntArrayRef shape, int64_t n, int64_t m);
at::Tensor activate(const at::Tensor& output, c10::string_view activation);

// out[j * out_stride + i] = in[i * in_stride + j] for i < rows, j < columns.
void transpose(const float* in, int64_t in_stride, float* out, int64_t out_stride, int64_t rows, int64_t columns);

// y = x times the packed weight plus bias (or null), for one token; false where there is no kernel for it.
bool one_token(const float* x, const float* values, const uint8_t* codes, const float* bias, float* y, int64_t rows, int64_t columns, int64_t n, int64_t m);

enum class Simd { portable, avx2, avx512 };
Simd simd();  // as PyTorch chose for this process: ATEN_CPU_CAPABILITY is heard

}  // namespace snows

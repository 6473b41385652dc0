// Packed linear layer on the CPU: tokens transposed into panels, block by block, products of panels.h, sums transposed back.
// Specification: snows/reference/packed.py, sparse_linear.

#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <torch/library.h>

#include <algorithm>

#include "panels.h"

namespace {

// In bfloat16 two columns of the input, and two rows of the output, are a word, and words are what is transposed.
at::Tensor pairs_of_columns(const snows::Order& o, const at::Tensor& x, at::Tensor y, const at::Tensor& bias, c10::string_view activation) {
  const int64_t columns = o.channels, words = columns / 2, tokens = x.numel() / columns, width = o.lanes() * o.vectors;
  const float* in = static_cast<const float*>(x.const_data_ptr());
  float* out = static_cast<float*>(y.mutable_data_ptr());
  const bool whole = words * width * 4 <= 384 << 10;
  const int64_t ahead = whole ? o.blocks() : 2, of_block = o.block / 2;
  const bool past = y.nbytes() >= 4 << 20;
  snows::Panels panels{(tokens + width - 1) / width, 1, o.vectors, o.lanes(), ahead * of_block * width, o.lines, nullptr, nullptr};
  panels.fill = [&](float* scratch, int64_t panel, int64_t, int64_t block, bool first_time) {
    const int64_t first = panel * width, count = std::min(width, tokens - first), padded = (count + 31) / 32 * 32;
    float* const to = scratch + block % ahead * of_block * width;
    if (block % ahead > 0 || (whole && !first_time)) return snows::Source{to, padded / 32};
    const int64_t word = block * of_block, many = std::min(ahead * of_block, words - word);
    for (int64_t t = 0; t < count; t += 16)
      snows::transpose(in + (first + t) * words + word, words, scratch + t, width, std::min<int64_t>(16, count - t), many);
    for (int64_t i = 0; i < many && padded > count; ++i) std::fill(scratch + i * width + count, scratch + i * width + padded, 0.0f);
    snows::part_columns(scratch, many, o.vectors);
    return snows::Source{to, padded / 32};
  };
  panels.store = [&](const float* sums, int64_t, int64_t panel, int64_t row, int64_t many) {
    const int64_t first = panel * width, count = std::min(width, tokens - first), stride = (count + 31) / 32 * 32;
    alignas(64) float pairs[16 * 128];
    for (int64_t r = 0; r < many; r += 32) {
      const int64_t high = std::min<int64_t>(32, many - r) / 2;
      snows::round_pairs(sums + r * stride, stride, pairs, stride, high, stride);
      snows::transpose(pairs, stride, out + first * (o.rows / 2) + (row + r) / 2, o.rows / 2, high, count, past);
    }
  };
  snows::multiply(o, panels, bias, activation);
  return y;
}

at::Tensor sparse_linear(const at::Tensor& input, const at::Tensor& values_, const at::Tensor& codes_, const std::optional<at::Tensor>& bias_,
                         at::IntArrayRef shape, int64_t n, int64_t m, c10::string_view activation, const std::optional<at::Tensor>& order_) {
  snows::check_packed("sparse_linear", values_, codes_, shape, n, m, 2);
  snows::check_bias("sparse_linear", bias_, shape[0], values_);
  snows::check_channels("sparse_linear", input, -1, 0, shape[1], values_);
  snows::check_activation("sparse_linear", activation);
  const at::Tensor values = values_.contiguous(), codes = codes_.contiguous();
  const at::Tensor order = order_.value_or(at::Tensor());  // an exported program has none: to make one takes longer than to unpack
  if (!order.defined() || order.numel() == 0 || input.scalar_type() != values.scalar_type())
    return snows::activate(at::linear(input, snows::unpack(values, codes, shape, n, m), bias_), activation).contiguous();

  const snows::Order o = snows::read_order("sparse_linear", order, values, codes, shape);
  const int64_t rows = shape[0], columns = shape[1], tokens = input.numel() / columns;
  auto sizes = input.sizes().vec();
  sizes.back() = rows;
  const at::Tensor bias = snows::widened(bias_);
  if (const at::Tensor y = snows::few_tokens(input, values, codes, bias, rows, n, m); y.defined()) return snows::activate(y, activation).to(input.scalar_type());
  if (o.bfloat16) return pairs_of_columns(o, input.contiguous(), at::empty(sizes, input.options()), bias, activation);
  const at::Tensor x = input.to(at::kFloat).contiguous(), y = at::empty(sizes, x.options());
  const float* in = x.const_data_ptr<float>();
  float* out = y.mutable_data_ptr<float>();
  const int64_t width = 16 * o.vectors;  // of a panel
  const bool whole = columns * width * 4 <= 384 << 10;  // a panel stays beside its sums in the second-level cache, for all rows
  const int64_t ahead = whole ? o.blocks() : 4;         // blocks transposed at a time
  const bool past = y.nbytes() >= 4 << 20;              // more than the next layer would find in a cache anyway
  snows::Panels panels{(tokens + width - 1) / width, 1, o.vectors, o.lanes(), ahead * o.block * width, o.lines, nullptr, nullptr};
  panels.fill = [&](float* scratch, int64_t panel, int64_t, int64_t block, bool first_time) {
    const int64_t first = panel * width, count = std::min(width, tokens - first), padded = (count + 15) / 16 * 16;
    float* const to = scratch + block % ahead * o.block * width;
    if (block % ahead > 0 || (whole && !first_time)) return snows::Source{to, padded / 16, count <= 8};
    const int64_t column = block * o.block, many = std::min(ahead * o.block, columns - column);
    for (int64_t t = 0; t < count; t += 16)  // the processor fetches ahead in 16 long rows, in more it loses its thread
      snows::transpose(in + (first + t) * columns + column, columns, scratch + t, width, std::min<int64_t>(16, count - t), many);
    for (int64_t c = 0; c < many && padded > count; ++c) std::fill(scratch + c * width + count, scratch + c * width + padded, 0.0f);
    return snows::Source{to, padded / 16, count <= 8};
  };
  panels.store = [&](const float* sums, int64_t, int64_t panel, int64_t row, int64_t many) {
    const int64_t first = panel * width, count = std::min(width, tokens - first);
    snows::transpose(sums, (count + 15) / 16 * 16, out + first * rows + row, rows, many, count, past);
  };
  snows::multiply(o, panels, bias, activation);
  return y.to(input.scalar_type());
}

}  // namespace

TORCH_LIBRARY_IMPL(snows, CPU, library) { library.impl("sparse_linear", &sparse_linear); }

// Packed linear layer on the CPU: tokens transposed into panels, block by block, products of panels.h, sums transposed back.
// Specification: snows/reference/packed.py, sparse_linear.

#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <torch/library.h>

#include <algorithm>

#include "panels.h"

namespace {

at::Tensor sparse_linear(const at::Tensor& input, const at::Tensor& values_, const at::Tensor& codes_, const std::optional<at::Tensor>& bias_,
                         at::IntArrayRef shape, int64_t n, int64_t m, c10::string_view activation, const std::optional<at::Tensor>& order_) {
  const at::Tensor values = values_.contiguous(), codes = codes_.contiguous();
  const at::Tensor order = order_.value_or(at::Tensor());  // an exported program has none: to make one takes longer than to unpack
  if (!order.defined() || order.numel() == 0 || input.scalar_type() != values.scalar_type())
    return snows::activate(at::linear(input, snows::unpack(values, codes, shape, n, m), bias_), activation).contiguous();

  const at::Tensor x = input.to(at::kFloat).contiguous(), bias = snows::widened(bias_);
  const int64_t rows = shape[0], columns = shape[1], tokens = x.numel() / columns;
  auto sizes = x.sizes().vec();
  sizes.back() = rows;
  at::Tensor y = at::empty(sizes, x.options());
  const float* in = x.const_data_ptr<float>();
  float* out = y.mutable_data_ptr<float>();
  if (tokens == 1 && snows::one_token(in, values, codes.const_data_ptr<uint8_t>(), bias.defined() ? bias.const_data_ptr<float>() : nullptr, out,
                                      rows, columns, n, m))
    return snows::activate(y, activation).to(input.scalar_type());
  const snows::Order o = snows::Order::read(order);
  const int64_t width = 16 * o.vectors;  // of a panel
  const bool whole = columns * width * 4 <= 384 << 10;  // a panel stays beside its sums in the second-level cache, for all rows
  const int64_t ahead = whole ? o.blocks() : 4;         // blocks transposed at a time
  const bool past = y.nbytes() >= 4 << 20;              // more than the next layer would find in a cache anyway
  snows::Panels panels{(tokens + width - 1) / width, 1, o.vectors, ahead * o.block * width, o.lines, nullptr, nullptr};
  panels.fill = [&](float* scratch, int64_t panel, int64_t, int64_t block, bool first_time) {
    const int64_t first = panel * width, count = std::min(width, tokens - first), padded = (count + 15) / 16 * 16;
    float* const to = scratch + block % ahead * o.block * width;
    if (block % ahead > 0 || (whole && !first_time)) return snows::Source{to, padded / 16};
    const int64_t column = block * o.block, many = std::min(ahead * o.block, columns - column);
    for (int64_t t = 0; t < count; t += 16)  // the processor fetches ahead in 16 long rows, in more it loses its thread
      snows::transpose(in + (first + t) * columns + column, columns, scratch + t, width, std::min<int64_t>(16, count - t), many);
    for (int64_t c = 0; c < many && padded > count; ++c) std::fill(scratch + c * width + count, scratch + c * width + padded, 0.0f);
    return snows::Source{to, padded / 16};
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

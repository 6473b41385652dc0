// Packed linear layer on the CPU: tokens transposed into panels, products of panels.h, sums transposed back.
// Specification: snows/reference.py, sparse_linear.

#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <torch/library.h>

#include <algorithm>

#include "panels.h"

namespace {

at::Tensor sparse_linear(const at::Tensor& input, const at::Tensor& values_, const at::Tensor& codes_, const std::optional<at::Tensor>& bias_,
                         at::IntArrayRef shape, int64_t n, int64_t m, c10::string_view activation, const std::optional<at::Tensor>& order_) {
  const at::Tensor values = values_.contiguous(), codes = codes_.contiguous();
  const at::Tensor bias = bias_.has_value() ? bias_->contiguous() : at::Tensor();
  const at::Tensor order = order_.has_value() ? *order_ : snows::kernel_order(values, codes, shape, n, m);
  if (order.numel() == 0 || input.scalar_type() != at::kFloat)
    return snows::activate(at::linear(input, snows::unpack(values, codes, shape, n, m), bias_), activation).contiguous();

  const at::Tensor x = input.contiguous();
  const int64_t rows = shape[0], columns = shape[1], tokens = x.numel() / columns;
  auto sizes = x.sizes().vec();
  sizes.back() = rows;
  at::Tensor y = at::empty(sizes, x.options());
  const float* in = x.const_data_ptr<float>();
  float* out = y.mutable_data_ptr<float>();
  if (tokens == 1 && snows::one_token(in, values.const_data_ptr<float>(), codes.const_data_ptr<uint8_t>(),
                                      bias.defined() ? bias.const_data_ptr<float>() : nullptr, out, rows, columns, n, m))
    return snows::activate(y, activation);
  snows::multiply(
      snows::Order::read(order), tokens, bias, activation,
      [&](float* panel, int64_t first, int64_t count, int64_t stride) {
        snows::transpose(in + first * columns, columns, panel, stride, count, columns);
        const int64_t padded = (count + 15) / 16 * 16;
        for (int64_t c = 0; c < columns && padded > count; ++c) std::fill(panel + c * stride + count, panel + c * stride + padded, 0.0f);
      },
      [&](const float* sums, int64_t row, int64_t many, int64_t first, int64_t count, int64_t stride) {
        snows::transpose(sums, stride, out + first * rows + row, rows, many, count);
      });
  return y;
}

}  // namespace

TORCH_LIBRARY_IMPL(snows, CPU, library) { library.impl("sparse_linear", &sparse_linear); }

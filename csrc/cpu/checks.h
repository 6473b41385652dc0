// What the ops ask of their arguments before a pointer is taken. The public functions in snows/ops say it better; this is for whoever calls
// the ops themselves, so that no call reads or writes past a tensor's end. For CPU and CUDA tensors.

#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <optional>

namespace snows {

inline void check_device(const char* op, const char* name, const at::Tensor& x, c10::Device device) {
  TORCH_CHECK_VALUE(x.defined() && x.layout() == at::kStrided && x.device() == device, op, ": expected ", name, " to be an ordinary tensor on ", device);
}

// This shape and type, and contiguous.
inline void check_like(const char* op, const char* name, const at::Tensor& x, at::IntArrayRef sizes, at::ScalarType type, c10::Device device) {
  check_device(op, name, x, device);
  TORCH_CHECK_VALUE(x.sizes() == sizes && x.scalar_type() == type && x.is_contiguous(), op, ": expected ", name, " to be ", sizes, " ", type,
                    ", contiguous, got ", x.sizes(), " ", x.scalar_type(), x.is_contiguous() ? "" : ", not contiguous");
}

// Scores of (rows, columns), n of m.
inline void check_scores(const char* op, const at::Tensor& scores, int64_t n, int64_t m) {
  TORCH_CHECK_VALUE(scores.dim() == 2, op, ": expected scores of (rows, columns), got ", scores.sizes());
  TORCH_CHECK_VALUE(0 <= n && n <= m && 0 < m && m < INT32_MAX, op, ": expected 0 <= n <= m with m above 0, got n = ", n, " and m = ", m);
}

// A packed weight: (out, in) or (out, in, kernel height, kernel width), as many values and codes as its pattern has.
inline void check_packed(const char* op, const at::Tensor& values, const at::Tensor& codes, at::IntArrayRef shape, int64_t n, int64_t m, size_t dimensions) {
  TORCH_CHECK_VALUE(shape.size() == dimensions || (dimensions == 0 && (shape.size() == 2 || shape.size() == 4)), op, ": expected the shape of a weight, of ",
                    dimensions ? std::to_string(dimensions) : std::string("2 or 4"), " dimensions, got ", shape);
  TORCH_CHECK_VALUE(m == 0 ? n == 0 : 0 < n && n < m && m <= 32, op, ": expected 0 < n < m <= 32, or zeros, got n = ", n, " and m = ", m);
  int64_t entries = 1;
  for (const int64_t size : shape)
    TORCH_CHECK_VALUE(0 <= size && size < INT32_MAX && !__builtin_mul_overflow(entries, size, &entries) && entries < int64_t(1) << 48, op,
                      ": expected a weight that fits into memory, got the shape ", shape);
  check_device(op, "values", values, values.device());
  check_device(op, "codes", codes, values.device());
  TORCH_CHECK_VALUE(codes.scalar_type() == at::kByte && codes.dim() == 1, op, ": expected codes of one dimension, uint8, got ", codes.sizes(), " ",
                    codes.scalar_type());
  const int64_t rows = shape[0], columns = rows ? entries / rows : 0, groups = m ? (columns + m - 1) / m : 0;
  int64_t width = 0;
  while (m > 0 && (int64_t(1) << width) < m) ++width;
  const int64_t stored = m ? rows * groups * n : entries, bits = m ? rows * groups * std::min(n * width, m) : entries;
  TORCH_CHECK_VALUE(m ? values.numel() == stored : values.numel() <= stored, op, ": expected ", m ? "" : "at most ", stored, " values of a weight of ", shape,
                    ", got ", values.numel());
  TORCH_CHECK_VALUE(codes.numel() >= (bits + 7) / 8, op, ": expected ", (bits + 7) / 8, " bytes of codes, got ", codes.numel());
}

inline void check_bias(const char* op, const std::optional<at::Tensor>& bias, int64_t rows, const at::Tensor& values) {
  if (!bias.has_value() || !bias->defined()) return;
  check_device(op, "the bias", *bias, values.device());
  TORCH_CHECK_VALUE(bias->dim() == 1 && bias->numel() == rows && bias->scalar_type() == values.scalar_type(), op, ": expected a bias of ", rows, " ",
                    values.scalar_type(), ", got ", bias->sizes(), " ", bias->scalar_type());
}

// An input of (..., channels) or (images, channels, height, width), and the pairs of a convolution.
inline void check_channels(const char* op, const at::Tensor& input, int64_t axis, size_t dimensions, int64_t channels, const at::Tensor& values) {
  check_device(op, "the input", input, values.device());
  TORCH_CHECK_VALUE((dimensions ? input.dim() == int64_t(dimensions) : input.dim() >= 1) && input.size(axis) == channels, op, ": expected an input with ",
                    channels, " channels", dimensions ? " and 4 dimensions" : "", ", got ", input.sizes());
}

inline void check_pairs(const char* op, const at::Tensor& input, at::IntArrayRef shape, at::IntArrayRef stride, at::IntArrayRef padding,
                        at::IntArrayRef dilation) {
  const auto pair = [&](const char* name, at::IntArrayRef x, int64_t least) {
    TORCH_CHECK_VALUE(x.size() == 2 && std::min(x[0], x[1]) >= least && std::max(x[0], x[1]) < INT32_MAX, op, ": expected ", name, " of two numbers of at least ",
                      least, ", got ", x);
  };
  pair("a stride", stride, 1), pair("a padding", padding, 0), pair("a dilation", dilation, 1);
  for (int i = 0; i < 2; ++i) {
    const int64_t extent = (shape[2 + i] - 1) * dilation[i] + 1, padded = input.size(2 + i) + 2 * padding[i];
    TORCH_CHECK_VALUE(shape[2 + i] > 0 && extent <= padded, op, ": expected a padded input no smaller than the kernel's extent of ", extent, ", got ",
                      input.sizes(), " with padding ", padding);
  }
}

inline void check_activation(const char* op, c10::string_view activation) {
  TORCH_CHECK_VALUE(activation == "none" || activation == "relu" || activation == "gelu", op, ": expected an activation of none, relu or gelu, got ", activation);
}

// The vectors of conjugate gradients: of one shape, type and device, contiguous.
inline void check_alike(const char* op, const at::Tensor& first, std::initializer_list<const at::Tensor*> others) {
  check_like(op, "each vector", first, first.sizes(), first.scalar_type(), first.device());
  for (const at::Tensor* x : others) check_like(op, "each vector", *x, first.sizes(), first.scalar_type(), first.device());
}

inline void check_batched_cg(const at::Tensor& x, const at::Tensor& r, const at::Tensor& p, const at::Tensor& rz, const at::Tensor& product,
                             const at::Tensor& mask, const at::Tensor& inverse, const at::Tensor& target) {
  const char* const op = "batched_cg_update";
  TORCH_CHECK_VALUE(x.dim() == 3, op, ": expected x of (groups, rows, columns), got ", x.sizes());
  check_alike(op, x, {&r, &p, &product});
  check_like(op, "rz", rz, {x.size(0), x.size(1)}, at::kDouble, x.device());
  check_like(op, "target", target, {x.size(0), x.size(1)}, at::kDouble, x.device());
  check_like(op, "mask", mask, x.sizes(), at::kBool, x.device());
  check_like(op, "inverse", inverse, {x.size(0), x.size(2)}, x.scalar_type(), x.device());
}

}  // namespace snows

// The order of a packed weight (order.h) as a tensor. It holds float32, for weights of 16 bits too; anything else, or a weight whose codes are
// not sound, gets an empty order.

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "panels.h"

namespace {

// snows/ops/packed.py, kernel_order: the words that read_order reads, or none.
at::Tensor kernel_order(const at::Tensor& values_, const at::Tensor& codes_, at::IntArrayRef shape, int64_t n, int64_t m) {
  snows::check_packed("kernel_order", values_, codes_, shape, n, m, 0);
  const int64_t rows = shape[0], columns = c10::multiply_integers(shape.slice(1));
  const at::Tensor values = values_.contiguous(), codes = codes_.contiguous(), wide = values.to(at::kFloat);
  const auto options = values.options().dtype(at::kInt);
  const auto kind = values_.scalar_type();
  if ((kind != at::kFloat && kind != at::kHalf && kind != at::kBFloat16) || rows * columns == 0) return at::empty({0}, options);
  const bool convolves = shape.size() == 4, pairs = kind == at::kBFloat16 && (convolves || (rows % 2 == 0 && columns % 2 == 0)) && snows::multiplies_bfloat16();
  const std::vector<int32_t> words = snows::make_order(
      {wide.const_data_ptr<float>(), codes.const_data_ptr<uint8_t>(), wide.numel(), codes.numel(), rows, shape[1], convolves ? shape[2] : 1,
       convolves ? shape[3] : 1, convolves, n, m}, pairs);
  at::Tensor order = at::empty({int64_t(words.size())}, options);
  if (words.empty()) return order;
  int32_t* p = order.mutable_data_ptr<int32_t>();
  std::copy(words.begin(), words.end(), p);
  const snows::Origin origin = snows::Origin::of(values, codes);
  std::memcpy(p + 8, &origin.sample, 8), std::memcpy(p + 10, &origin.place, 8), std::memcpy(p + 12, &origin.changes, 4);
  return order;
}

}  // namespace

TORCH_LIBRARY_IMPL(snows, CPU, library) { library.impl("kernel_order", &kernel_order); }

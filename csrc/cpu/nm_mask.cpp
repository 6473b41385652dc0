// N:M selection on the CPU: one pass over the scores, an entry's rank in its group by counting.
// Reads rows * columns scores, writes as many bytes. Specification: snows/reference/masks.py, nm_mask.

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>

namespace {

template <typename scalar_t>
void select_group(const scalar_t* scores, bool* mask, int64_t size, int64_t n) {
  for (int64_t j = 0; j < size; ++j) {
    const scalar_t s = scores[j];
    int64_t rank = 0;  // of those that go first: higher, or equal with a lower index
    for (int64_t i = 0; i < j; ++i) rank += scores[i] >= s;
    for (int64_t i = j + 1; i < size; ++i) rank += scores[i] > s;
    mask[j] = rank < n;
  }
}

at::Tensor nm_mask(const at::Tensor& scores, int64_t n, int64_t m) {
  const at::Tensor x = scores.contiguous();
  at::Tensor mask = at::empty(x.sizes(), x.options().dtype(at::kBool));
  const int64_t rows = x.size(0), columns = x.size(1);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "nm_mask", [&] {
    const scalar_t* in = x.const_data_ptr<scalar_t>();
    bool* out = mask.data_ptr<bool>();
    const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, columns));
    at::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r)
        for (int64_t c = 0; c < columns; c += m)
          select_group(in + r * columns + c, out + r * columns + c, std::min(m, columns - c), n);
    });
  });
  return mask;
}

}  // namespace

TORCH_LIBRARY_IMPL(snows, CPU, library) { library.impl("nm_mask", &nm_mask); }

// One token, or a few with AVX2, times a packed weight: the weight is read once, so its bytes rule, and it is read as it is packed. Sums are in
// float32; 16-bit values are widened in registers, and half as many bytes are read. The kernels are in few_tokens_avx512.h and few_tokens_avx2.h.

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <type_traits>
#include <vector>

#include "panels.h"

#ifdef SNOWS_X86

#include "few_tokens_avx2.h"
#include "few_tokens_avx512.h"

namespace snows {

namespace {

template <typename T>
void all_rows(Weight<T> w, int64_t n, int64_t m) {
  std::vector<float> arranged;
  if (simd() == Simd::avx2) arranged = avx2::arrange(w, m == 0 ? 0 : n);
  at::parallel_for(0, w.rows, std::max<int64_t>(1, 65536 / w.columns), [&](int64_t begin, int64_t end) {
    if (simd() == Simd::avx2)
      m == 0 ? avx2::rows_of_masks(w, begin, end) : avx2::rows_of_groups(w, n, begin, end);
    else
      m == 0 ? avx512::rows_of_masks(w, begin, end) : avx512::rows_of_groups(w, n, begin, end);
  });
}

}  // namespace

// Rows must begin with a byte of codes, and end with a whole step of AVX-512.
int64_t most_tokens(int64_t columns, int64_t n, int64_t m, int64_t stored, int64_t all) {
  const bool avx512 = simd() == Simd::avx512;
  if (simd() == Simd::portable || !(m == 0 || (m == 4 && n <= 2))) return 0;
  const int64_t step = m == 0 ? (avx512 ? 16 : 8) : (avx512 ? 64 : 16) / n;
  if (columns % step != 0) return 0;
  return avx512 ? 1 : avx2::most_tokens(m == 0 ? 0 : n, stored, all);
}

at::Tensor few_tokens(const at::Tensor& input, const at::Tensor& values, const at::Tensor& codes, const at::Tensor& bias, int64_t rows, int64_t n, int64_t m) {
  const int64_t columns = input.size(-1), tokens = input.numel() / columns;
  if (tokens == 0 || tokens > most_tokens(columns, n, m, values.numel(), rows * columns)) return {};
  auto sizes = input.sizes().vec();
  sizes.back() = rows;
  const at::Tensor x = input.to(at::kFloat).contiguous(), y = at::empty(sizes, x.options());
  const auto run = [&](const auto* stored) {
    using T = std::remove_cvref_t<decltype(*stored)>;
    all_rows(Weight<T>{stored, stored + values.numel(), codes.const_data_ptr<uint8_t>(), bias.defined() ? bias.const_data_ptr<float>() : nullptr,
                       x.const_data_ptr<float>(), y.mutable_data_ptr<float>(), rows, columns, tokens}, n, m);
  };
  if (values.scalar_type() == at::kFloat)
    run(values.const_data_ptr<float>());
  else
    AT_DISPATCH_REDUCED_FLOATING_TYPES(values.scalar_type(), "few_tokens", [&] { run(values.const_data_ptr<scalar_t>()); });
  return y;
}

}  // namespace snows

#else

int64_t snows::most_tokens(int64_t, int64_t, int64_t, int64_t, int64_t) { return 0; }
at::Tensor snows::few_tokens(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, int64_t, int64_t, int64_t) { return {}; }

#endif

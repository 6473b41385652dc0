// One token, or a few with AVX2, times a packed weight: the weight is read once, so its bytes rule, and it is read as it is packed. Sums are in
// float32; 16-bit values are widened in registers, and half as many bytes are read. The kernels are in few_tokens_avx512.h and few_tokens_avx2.h.

#include "few_tokens.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include <vector>

#include "few_tokens_avx2.h"
#include "few_tokens_avx512.h"
#include "panels.h"

namespace snows {

#ifdef SNOWS_X86

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

bool few_tokens(const float* x, int64_t tokens, const at::Tensor& values, const uint8_t* codes, const float* bias, float* y, int64_t rows,
                int64_t columns, int64_t n, int64_t m) {
  // Rows must begin with a byte of codes; with AVX-512 they end with a whole step.
  const bool avx512 = simd() == Simd::avx512;
  const int64_t step = avx512 ? (m == 0 ? 16 : 64 / n) : (m == 0 ? 8 : 16 / n), most = avx512 ? 1 : avx2::most_tokens(m == 0 ? 0 : n, values.numel(), rows * columns);
  if (simd() == Simd::portable || tokens > most || columns % step != 0 || !(m == 0 || (m == 4 && n <= 2))) return false;
  const auto run = [&](const auto* stored) {
    all_rows(Weight<std::remove_cvref_t<decltype(*stored)>>{stored, stored + values.numel(), codes, bias, x, y, rows, columns, tokens}, n, m);
  };
  if (values.scalar_type() == at::kFloat)
    run(values.const_data_ptr<float>());
  else
    AT_DISPATCH_REDUCED_FLOATING_TYPES(values.scalar_type(), "few_tokens", [&] { run(values.const_data_ptr<scalar_t>()); });
  return true;
}

#else

bool few_tokens(const float*, int64_t, const at::Tensor&, const uint8_t*, const float*, float*, int64_t, int64_t, int64_t, int64_t) { return false; }

#endif

}  // namespace snows

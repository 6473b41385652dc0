// GELU with its slope, and its second derivative times g, on the CPU: one pass, without cancellation in either tail.
// Specification: snows/reference/nonlinear.py, gelu and gelu_curve, which do what is not the exact GELU in float32; and gelu without
// AVX, where PyTorch's two passes are faster.

#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <bit>
#include <tuple>
#include <utility>

#include "simd.h"

namespace {

constexpr int64_t kGrain = 16384;

// The op's reference, which stands behind every device's key, for what a kernel does not take.
template <typename Signature, typename... Args>
auto reference(const char* op, Args&&... args) {
  static const auto handle = c10::Dispatcher::singleton().findSchemaOrThrow(op, "").typed<Signature>();
  return handle.redispatch(c10::DispatchKeySet(c10::DispatchKey::Meta), std::forward<Args>(args)...);
}

// exp(-x² / 2) to two units in the last place: the square is split, so that its rounding does not grow with it.
SNOWS_INLINE inline float bell(float x) {
  const float high = std::bit_cast<float>(std::bit_cast<uint32_t>(x) & 0xfffff000), low = (x - high) * (x + high);
  const float whole = high * high * -0.5f;
  const float shifted = whole * 1.44269504f + 12582912.0f;  // the nearest whole number stands in its last bits
  const float n = shifted - 12582912.0f;
  const float f = whole - n * 0.693359375f - (n * -2.12194440e-4f + low * 0.5f);
  float p = 1.98756916e-4f;
  p = p * f + 1.39819994e-3f;
  p = p * f + 8.33345205e-3f;
  p = p * f + 4.16657962e-2f;
  p = p * f + 1.66666657e-1f;
  p = p * f + 0.5f;
  p = p * f * f + f + 1.0f;
  const float power = std::bit_cast<float>((std::bit_cast<uint32_t>(shifted) << 23) + 0x3f800000);
  return whole < -87.0f ? 0.0f : p * power;
}

// Φ(-|x|) / bell(x): a polynomial in t = (|x| - 4) / (|x| + 4), fitted on [0, 14.5] to 1e-8, over |x| + 4.
SNOWS_INLINE inline float tail(float x) {
  const float r = 1.0f / (std::abs(x) + 4.0f), t = 1.0f - 8.0f * r;
  float p = -1.31971925e-4f;
  p = p * t + 1.79353947e-4f;
  p = p * t + 1.56992341e-3f;
  p = p * t - 3.51255374e-3f;
  p = p * t - 7.52527124e-3f;
  p = p * t + 6.04038310e-2f;
  p = p * t - 1.86523441e-1f;
  p = p * t + 3.87136901e-1f;
  p = p * t - 6.07896588e-1f;
  p = p * t + 7.55285135e-1f;
  return p * r;
}

constexpr float kDensity = 0.398942280f;  // 1 / sqrt(2π)

bool takes(const at::Tensor& x, c10::string_view approximate) {
  return x.scalar_type() == at::kFloat && approximate == "none" && x.is_non_overlapping_and_dense();
}

using Two = std::tuple<at::Tensor, at::Tensor>;

Two gelu(const at::Tensor& x_, c10::string_view approximate) {
  if (!takes(x_, approximate) || snows::simd() == snows::Simd::portable)
    return reference<Two(const at::Tensor&, c10::string_view)>("snows::gelu", x_, approximate);
  at::Tensor value_ = at::empty_like(x_), slope_ = at::empty_like(x_);
  const float* x = x_.const_data_ptr<float>();
  float *value = value_.mutable_data_ptr<float>(), *slope = slope_.mutable_data_ptr<float>();
  at::parallel_for(0, x_.numel(), kGrain, [=](int64_t begin, int64_t end) {
    snows::vectorised([=]() SNOWS_INLINE {
#pragma omp simd
      for (int64_t i = begin; i < end; ++i) {
        const float at = x[i], density = bell(at), beyond = density * tail(at), share = at > 0 ? 1.0f - beyond : beyond;
        value[i] = at * share;
        slope[i] = share + at * (kDensity * density);
      }
    });
  });
  return {value_, slope_};
}

at::Tensor gelu_curve(const at::Tensor& x_, const at::Tensor& g_, c10::string_view approximate) {
  if (!takes(x_, approximate) || !takes(g_, approximate) || g_.sizes() != x_.sizes() || g_.strides() != x_.strides())
    return reference<at::Tensor(const at::Tensor&, const at::Tensor&, c10::string_view)>("snows::gelu_curve", x_, g_, approximate);
  at::Tensor out_ = at::empty_like(x_);
  const float *x = x_.const_data_ptr<float>(), *g = g_.const_data_ptr<float>();
  float* out = out_.mutable_data_ptr<float>();
  at::parallel_for(0, x_.numel(), kGrain, [=](int64_t begin, int64_t end) {
    snows::vectorised([=]() SNOWS_INLINE {
#pragma omp simd
      for (int64_t i = begin; i < end; ++i) out[i] = kDensity * bell(x[i]) * (2.0f - x[i] * x[i]) * g[i];
    });
  });
  return out_;
}

}  // namespace

TORCH_LIBRARY_IMPL(snows, CPU, library) {
  library.impl("gelu", &gelu);
  library.impl("gelu_curve", &gelu_curve);
}

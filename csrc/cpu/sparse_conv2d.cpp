// Packed convolution on the CPU: a panel of output pixels is gathered from the images (padding, stride and dilation
// happen there), multiplied by panels.h, and stored. Only one panel a thread is ever unfolded, in the second-level cache.
// Specification: snows/reference.py, sparse_conv2d.

#include <ATen/ops/conv2d.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "panels.h"

namespace {

// Pixels that lie side by side in the panel and, `step` apart, in a row of an image; those outside of it are zeros.
struct Span {
  int64_t at, count, source;  // source is negative for zeros
};

struct Shape {
  int64_t channels, height, width, kernel_h, kernel_w, out_h, out_w;
  int64_t stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;

  // The spans of one tap of the kernel, for output pixels first .. first + count of all images.
  void spans(int64_t tap_h, int64_t tap_w, int64_t first, int64_t count, std::vector<Span>& out) const {
    out.clear();
    for (int64_t t = 0; t < count;) {
      const int64_t image = (first + t) / (out_h * out_w), pixel = (first + t) % (out_h * out_w), h = pixel / out_w, w = pixel % out_w;
      const int64_t many = std::min(out_w - w, count - t);
      const int64_t row = h * stride_h - pad_h + tap_h * dilation_h, left = w * stride_w - pad_w + tap_w * dilation_w;
      // Of these pixels, those from `begin` up to `end` see the inside of the image.
      int64_t begin = left < 0 ? std::min(many, (-left + stride_w - 1) / stride_w) : 0;
      int64_t end = left < width ? std::min(many, (width - left + stride_w - 1) / stride_w) : 0;
      if (row < 0 || row >= height || end <= begin) begin = end = many;
      if (begin > 0) out.push_back({t, begin, -1});
      if (end > begin) out.push_back({t + begin, end - begin, (image * channels * height + row) * width + left + begin * stride_w});
      if (many > end) out.push_back({t + end, many - end, -1});
      t += many;
    }
  }
};

at::Tensor sparse_conv2d(const at::Tensor& input, const at::Tensor& values, const at::Tensor& codes, const std::optional<at::Tensor>& bias_,
                         at::IntArrayRef shape, int64_t n, int64_t m, at::IntArrayRef stride, at::IntArrayRef padding,
                         at::IntArrayRef dilation, c10::string_view activation, const std::optional<at::Tensor>& order_) {
  const at::Tensor bias = bias_.has_value() ? bias_->contiguous() : at::Tensor();
  const at::Tensor order = order_.has_value() ? *order_ : snows::kernel_order(values, codes, shape, n, m);
  const auto last = at::MemoryFormat::ChannelsLast;
  const auto format = input.is_contiguous(last) && !input.is_contiguous() ? last : at::MemoryFormat::Contiguous;
  if (order.numel() == 0 || input.scalar_type() != at::kFloat)
    return snows::activate(at::conv2d(input.contiguous(format), snows::unpack(values, codes, shape, n, m), bias_, stride, padding, dilation),
                           activation).contiguous(format);
  const at::Tensor x = input.contiguous();

  Shape s{x.size(1), x.size(2), x.size(3), shape[2], shape[3], 0, 0, stride[0], stride[1], padding[0], padding[1], dilation[0], dilation[1]};
  s.out_h = (s.height + 2 * s.pad_h - (s.kernel_h - 1) * s.dilation_h - 1) / s.stride_h + 1;
  s.out_w = (s.width + 2 * s.pad_w - (s.kernel_w - 1) * s.dilation_w - 1) / s.stride_w + 1;
  const int64_t rows = shape[0], pixels = s.out_h * s.out_w, plane = s.height * s.width;
  at::Tensor y = at::empty({x.size(0), rows, s.out_h, s.out_w}, x.options());
  const float* in = x.const_data_ptr<float>();
  float* out = y.mutable_data_ptr<float>();
  snows::multiply(
      snows::Order::read(order), x.size(0) * pixels, bias, activation,
      [&](float* panel, int64_t first, int64_t count, int64_t panel_stride) {
        std::vector<Span> spans;
        for (int64_t tap = 0; tap < s.kernel_h * s.kernel_w; ++tap) {
          s.spans(tap / s.kernel_w, tap % s.kernel_w, first, count, spans);
          if (count % 16) spans.push_back({count, 16 - count % 16, -1});
          float* to = panel + tap * s.channels * panel_stride;
          for (int64_t c = 0; c < s.channels; ++c, to += panel_stride)
            for (const Span& span : spans) {
              const float* from = in + span.source + c * plane;
              if (span.source < 0)
                std::fill_n(to + span.at, span.count, 0.0f);
              else if (s.stride_w == 1)
                std::copy_n(from, span.count, to + span.at);
              else
                for (int64_t i = 0; i < span.count; ++i) to[span.at + i] = from[i * s.stride_w];
            }
        }
      },
      [&](const float* sums, int64_t row, int64_t many, int64_t first, int64_t count, int64_t sums_stride) {
        for (int64_t t = 0; t < count;) {
          const int64_t image = (first + t) / pixels, pixel = (first + t) % pixels, length = std::min(pixels - pixel, count - t);
          for (int64_t r = 0; r < many; ++r)
            std::copy_n(sums + r * sums_stride + t, length, out + (image * rows + row + r) * pixels + pixel);
          t += length;
        }
      });
  return y.contiguous(format);
}

}  // namespace

TORCH_LIBRARY_IMPL(snows, CPU, library) { library.impl("sparse_conv2d", &sparse_conv2d); }

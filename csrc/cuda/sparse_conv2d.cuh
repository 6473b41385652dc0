// Output pixels as the input of sparse_product.cuh: a convolution as a product with patches that are never written out.
// Specification: snows/reference.py, sparse_conv2d.
//
// Images lie channels last, so a patch's columns are the weight's row view, input channel fastest: with channels % 8 == 0 eight columns
// are 16 bytes of one pixel, or of the padding.

#pragma once

#include "sparse_product.cuh"

namespace snows {

template <bool Wide>
struct Pixels {
  static constexpr bool WIDE = Wide;  // channels % 8 == 0 and x on 16 bytes
  static constexpr int OUTSIDE = -(1 << 30);

  struct Row {  // an output pixel: its image's first pixel, and where in it the kernel begins
    int64_t image;
    int h, w;
  };
  struct Column {  // of a patch: from where the kernel begins to this tap
    int h, w, channel;
  };

  const uint16_t* x;  // (images, height, width, channels)
  int pixels;         // of the output, in all images
  int channels, height, width, kernel_h, kernel_w, out_h, out_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;

  Pixels<false> narrow() const {
    return {x, pixels, channels, height, width, kernel_h, kernel_w, out_h, out_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w};
  }
  __device__ Row row(int n) const {
    if (n >= pixels) return {0, OUTSIDE, 0};
    const int image = n / (out_h * out_w), pixel = n % (out_h * out_w);
    return {int64_t(image) * height * width, pixel / out_w * stride_h - pad_h, pixel % out_w * stride_w - pad_w};
  }
  __device__ Column column(int k) const {
    const int tap = k / channels, h = tap / kernel_w;
    return {h < kernel_h ? h * dilation_h : OUTSIDE, (tap - h * kernel_w) * dilation_w, k - tap * channels};
  }
  __device__ const uint16_t* at(const Row& row, const Column& column) const {
    const int h = row.h + column.h, w = row.w + column.w;
    if (h < 0 || h >= height || w < 0 || w >= width) return nullptr;
    return x + (row.image + int64_t(h) * width + w) * channels + column.channel;
  }
};

}  // namespace snows

// Output pixels as the input of sparse_product.cuh: a convolution as a product with patches that are never written out.
// Specification: snows/reference/packed.py, sparse_conv2d.
//
// Images lie channels last, so a patch's columns are the weight's row view, input channel fastest: with channels % 8 == 0 eight columns
// are 16 bytes of one pixel, or of the padding.

#pragma once

#include "sparse_product.cuh"

namespace snows {

template <bool Wide>
struct Pixels {
  static constexpr bool WIDE = Wide;  // channels % 8 == 0 and x on 16 bytes
  static constexpr bool EVEN = false;
  static constexpr int OUTSIDE = -(1 << 30);

  struct Row {  // an output pixel: where in its image the kernel begins, perhaps outside
    const uint16_t* begin;
    int h, w;
  };
  struct Column {  // of a patch: from where the kernel begins to this tap
    int offset, h, w;
  };

  const uint16_t* x;  // (images, height, width, channels)
  int pixels;         // of the output, in all images
  int channels, height, width, kernel_h, kernel_w, out_h, out_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;

  Pixels<false> narrow() const {
    return {x, pixels, channels, height, width, kernel_h, kernel_w, out_h, out_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w};
  }
  __device__ Row row(int n) const {
    if (n >= pixels) return {x, OUTSIDE, 0};
    const int image = n / (out_h * out_w), pixel = n % (out_h * out_w);
    const int h = pixel / out_w * stride_h - pad_h, w = pixel % out_w * stride_w - pad_w;
    return {x + ((int64_t(image) * height + h) * width + w) * channels, h, w};
  }
  __device__ Column column(int k) const {
    const int tap = k / channels, up = tap / kernel_w, h = up * dilation_h, w = (tap - up * kernel_w) * dilation_w;
    return {(h * width + w) * channels + k - tap * channels, up < kernel_h ? h : OUTSIDE, w};
  }
  __device__ bool there(const Row& row, const Column& column) const {
    return unsigned(row.h + column.h) < unsigned(height) && unsigned(row.w + column.w) < unsigned(width);  // below zero is beyond
  }
  __device__ const uint16_t* at(const Row& row, const Column& column) const { return row.begin + column.offset; }
};

}  // namespace snows

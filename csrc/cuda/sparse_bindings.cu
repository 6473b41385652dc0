// The packed layers for CUDA tensors. 2:4 in float16 or bfloat16 on sm_80 and up runs on the sparse tensor cores; anything else has an
// empty order, is unpacked and multiplied densely, as on the CPU.

#include "../cpu/panels.h"
#include "sparse_conv2d.cuh"
#include "sparse_linear.cuh"
#include "sparse_wgmma.cuh"

#include <ATen/Dispatch.h>
#include <ATen/ops/conv2d.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdlib>

namespace {

using c10::IntArrayRef;
using OptionalTensor = std::optional<at::Tensor>;

template <typename T> struct Native { using type = __half; };
template <> struct Native<at::BFloat16> { using type = __nv_bfloat16; };

int attribute(cudaDeviceAttr which) {
  int device, value;
  C10_CUDA_CHECK(cudaGetDevice(&device));
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, device));
  return value;
}

bool small(int64_t size) { return size < INT32_MAX - 256; }  // room for a block beyond the end

at::Tensor kernel_order(const at::Tensor& values_, const at::Tensor& codes_, IntArrayRef shape, int64_t n, int64_t m) {
  snows::check_packed("kernel_order", values_, codes_, shape, n, m, 0);
  const c10::cuda::CUDAGuard guard(values_.device());
  const at::Tensor values = values_.contiguous(), codes = codes_.contiguous();
  const int64_t rows = shape[0], columns = c10::multiply_integers(shape.slice(1)), groups = (columns + 3) / 4;
  const bool taken = n == 2 && m == 4 && (values.scalar_type() == at::kHalf || values.scalar_type() == at::kBFloat16) && rows > 0 &&
                     columns > 0 && small(rows) && small(columns) && values.numel() == rows * 2 * groups && codes.numel() * 2 >= rows * groups &&
                     attribute(cudaDevAttrComputeCapabilityMajor) >= 8;
  const int64_t words = taken ? snows::tiles_down(rows) * snows::tiles_across(columns) * snows::TILE_WORDS : 0;
  at::Tensor order = at::empty({words}, values.options().dtype(at::kInt));
  if (!taken) return order;
  const snows::Stored stored{static_cast<const uint16_t*>(values.const_data_ptr()), codes.const_data_ptr<uint8_t>(), rows, columns};
  const unsigned blocks = std::min<int64_t>((words + snows::THREADS - 1) / snows::THREADS, 65536);
  snows::kernel_order_kernel<<<blocks, snows::THREADS, 0, c10::cuda::getCurrentCUDAStream()>>>(
      stored, reinterpret_cast<uint32_t*>(order.mutable_data_ptr<int32_t>()));
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return order;
}

// The order to run with, or an empty one.
at::Tensor order_of(const char* op, const at::Tensor& input, const at::Tensor& values, const at::Tensor& codes, IntArrayRef shape, int64_t n,
                    int64_t m, const OptionalTensor& given) {
  if (input.scalar_type() != values.scalar_type()) return at::empty({0}, values.options().dtype(at::kInt));  // the dense product complains
  const at::Tensor order = (given.has_value() ? *given : kernel_order(values, codes, shape, n, m)).contiguous();
  const int64_t words = snows::tiles_down(shape[0]) * snows::tiles_across(c10::multiply_integers(shape.slice(1))) * snows::TILE_WORDS;
  TORCH_CHECK_VALUE(order.numel() == 0 || (order.numel() == words && order.scalar_type() == at::kInt && order.device() == input.device()), op,
                    ": expected an order of ", words, " int32 on ", input.device(), ", as kernel_order makes it there, got ", order.numel(), " ",
                    order.scalar_type(), " on ", order.device());
  return order;
}

bool on_lines(const at::Tensor& x, int64_t width) { return width % 8 == 0 && reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0; }

// Whether wgmma is wanted and there: a kernel compiled for anything but sm_90a is empty, and one that is not has 128 sums a thread.
// SNOWS_WGMMA=1 or 0 decides, for comparisons (bench/kernels_sparse.py), and may change between calls.
template <typename T> bool wgmma() {
  const char* const asked = std::getenv("SNOWS_WGMMA");
  if (asked != nullptr ? *asked != '1' : !snows::WGMMA_BY_DEFAULT) return false;
  cudaFuncAttributes found;
  C10_CUDA_CHECK(cudaFuncGetAttributes(&found, snows::wgmma_product_kernel<T>));
  const bool there = found.numRegs > 128;
  TORCH_CHECK(there || asked == nullptr, "SNOWS_WGMMA=1: expected a GPU of compute capability 9.0 and kernels built for it (",
              "TORCH_CUDA_ARCH_LIST=9.0a), got another of the two");
  return there;
}

// y, which lies as (tokens, rows), from the input.
template <typename Input>
void multiply(const at::Tensor& order, const OptionalTensor& bias_, c10::string_view activation, at::Tensor& y, int rows, int columns,
              int tokens, const Input& input, bool wide) {
  const at::Tensor bias = bias_.has_value() ? bias_->contiguous() : at::Tensor();
  const int processors = attribute(cudaDevAttrMultiProcessorCount);
  const snows::Choice choice = snows::choose(rows, columns, tokens, wide, processors);
  TORCH_CHECK_VALUE(choice.blocks <= INT32_MAX, "sparse product: expected at most 2^31 - 1 blocks, got ", choice.blocks);
  const at::Tensor partial = at::empty({choice.splits > 1 ? choice.splits : 0, tokens, rows}, y.options().dtype(at::kFloat), at::MemoryFormat::Contiguous);
  AT_DISPATCH_REDUCED_FLOATING_TYPES(y.scalar_type(), "sparse_product", [&] {
    using T = typename Native<scalar_t>::type;
    const snows::Product<T> product{
        static_cast<const snows::Line*>(order.const_data_ptr()), rows, columns, tokens,
        bias.defined() ? static_cast<const T*>(bias.const_data_ptr()) : nullptr, static_cast<T*>(y.mutable_data_ptr()),
        choice.splits > 1 ? partial.mutable_data_ptr<float>() : nullptr, choice.splits,
        activation == "relu" ? snows::RELU : activation == "gelu" ? snows::GELU : snows::NONE};
    const auto launch = [](auto kernel, unsigned blocks, int threads, int bytes, auto... arguments) {
      if (bytes > 48 * 1024) C10_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
      kernel<<<blocks, threads, bytes, c10::cuda::getCurrentCUDAStream()>>>(arguments...);
      C10_CUDA_KERNEL_LAUNCH_CHECK();
    };
    if constexpr (std::is_same_v<Input, snows::Tokens<true>>)
      if (snows::wgmma_takes(rows, tokens, wide, processors) && wgmma<T>()) return snows::wgmma_product_by(product, input, launch);
    snows::sparse_product_by(choice, product, input, wide, launch);
  });
}

at::Tensor sparse_linear(const at::Tensor& input, const at::Tensor& values, const at::Tensor& codes, const OptionalTensor& bias, IntArrayRef shape,
                         int64_t n, int64_t m, c10::string_view activation, const OptionalTensor& given) {
  snows::check_packed("sparse_linear", values, codes, shape, n, m, 2);
  snows::check_bias("sparse_linear", bias, shape[0], values);
  snows::check_channels("sparse_linear", input, -1, 0, shape[1], values);
  snows::check_activation("sparse_linear", activation);
  const c10::cuda::CUDAGuard guard(input.device());
  const at::Tensor order = order_of("sparse_linear", input, values, codes, shape, n, m, given);
  const int64_t tokens = shape[1] > 0 ? input.numel() / shape[1] : 0;
  if (order.numel() == 0 || !small(tokens))
    return snows::activate(at::linear(input, snows::unpack(values, codes, shape, n, m), bias), activation).contiguous();
  const at::Tensor x = input.contiguous();
  auto sizes = x.sizes().vec();
  sizes.back() = shape[0];
  at::Tensor y = at::empty(sizes, x.options());
  if (tokens == 0) return y;
  const snows::Tokens<true> from{static_cast<const uint16_t*>(x.const_data_ptr()), int(tokens), int(shape[1])};
  multiply(order, bias, activation, y, shape[0], shape[1], tokens, from, on_lines(x, shape[1]));
  return y;
}

at::Tensor sparse_conv2d(const at::Tensor& input, const at::Tensor& values, const at::Tensor& codes, const OptionalTensor& bias, IntArrayRef shape,
                         int64_t n, int64_t m, IntArrayRef stride, IntArrayRef padding, IntArrayRef dilation, c10::string_view activation,
                         const OptionalTensor& given) {
  snows::check_packed("sparse_conv2d", values, codes, shape, n, m, 4);
  snows::check_bias("sparse_conv2d", bias, shape[0], values);
  snows::check_channels("sparse_conv2d", input, 1, 4, shape[1], values);
  snows::check_pairs("sparse_conv2d", input, shape, stride, padding, dilation);
  snows::check_activation("sparse_conv2d", activation);
  const c10::cuda::CUDAGuard guard(input.device());
  const auto last = at::MemoryFormat::ChannelsLast;
  const auto format = input.is_contiguous(last) && !input.is_contiguous() ? last : at::MemoryFormat::Contiguous;
  const bool inner = input.size(0) % 16 == 0 && input.permute({1, 2, 3, 0}).is_contiguous() && !input.is_contiguous();
  const auto laid_out = [&](const at::Tensor& y) {  // as the input is
    return inner ? y.permute({1, 2, 3, 0}).contiguous().permute({3, 0, 1, 2}) : y.contiguous(format);
  };
  const at::Tensor order = order_of("sparse_conv2d", input, values, codes, shape, n, m, given);
  int64_t size[2];
  for (int i = 0; i < 2; ++i) size[i] = (input.size(2 + i) + 2 * padding[i] - (shape[2 + i] - 1) * dilation[i] - 1) / stride[i] + 1;
  const int64_t pixels = input.size(0) * size[0] * size[1], reach = std::max(input.size(2) + 2 * padding[0], input.size(3) + 2 * padding[1]);
  const int64_t patch = ((shape[2] * dilation[0] + 1) * input.size(3) + shape[3] * dilation[1]) * shape[1];  // from its first number to its last
  if (order.numel() == 0 || !small(pixels) || !small(patch) || reach >= -snows::Pixels<true>::OUTSIDE)
    return laid_out(snows::activate(
        at::conv2d(input.contiguous(format), snows::unpack(values, codes, shape, n, m), bias, stride, padding, dilation), activation));
  const at::Tensor x = input.contiguous(last);
  at::Tensor y = at::empty({input.size(0), shape[0], size[0], size[1]}, x.options(), last);
  if (pixels == 0) return laid_out(y);
  const snows::Pixels<true> from{
      static_cast<const uint16_t*>(x.const_data_ptr()), int(pixels), int(shape[1]), int(x.size(2)), int(x.size(3)), int(shape[2]), int(shape[3]),
      int(size[0]), int(size[1]), int(stride[0]), int(stride[1]), int(padding[0]), int(padding[1]), int(dilation[0]), int(dilation[1])};
  multiply(order, bias, activation, y, shape[0], shape[1] * shape[2] * shape[3], pixels, from, on_lines(x, shape[1]));
  return laid_out(y);
}

}  // namespace

TORCH_LIBRARY_IMPL(snows, CUDA, library) {
  library.impl("kernel_order", &kernel_order);
  library.impl("sparse_linear", &sparse_linear);
  library.impl("sparse_conv2d", &sparse_conv2d);
}

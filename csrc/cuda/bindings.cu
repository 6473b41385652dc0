// The kernels as implementations of the ops for CUDA tensors. Scores come contiguous from snows/ops, or are made so.

#include "../cpu/checks.h"
#include "batched_cg.cuh"
#include "cg.cuh"
#include "nm_select.cuh"

#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>

namespace {

template <typename T> struct Native { using type = T; };
template <> struct Native<at::Half> { using type = __half; };
template <> struct Native<at::BFloat16> { using type = __nv_bfloat16; };

#define DISPATCH(tensor, name, ...)                                                              \
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, (tensor).scalar_type(), name, [&] { \
    using T = typename Native<scalar_t>::type;                                                   \
    __VA_ARGS__();                                                                               \
  })

template <typename T> T* data(const at::Tensor& tensor) { return static_cast<T*>(tensor.data_ptr()); }

bool aligned(std::initializer_list<const at::Tensor*> tensors) {
  return std::all_of(tensors.begin(), tensors.end(), [](const at::Tensor* t) {
    return reinterpret_cast<uintptr_t>(t->data_ptr()) % sizeof(snows::Line) == 0;
  });
}

template <typename... P, typename... A>
void launch(void (*kernel)(P...), unsigned blocks, int threads, A... arguments) {
  kernel<<<blocks, threads, 0, c10::cuda::getCurrentCUDAStream()>>>(arguments...);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

// As many blocks as run at once, no more than `wanted`, so that they can wait for each other.
template <typename... P>
unsigned together(void (*kernel)(P...), int64_t wanted) {
  int device, processors, each;
  C10_CUDA_CHECK(cudaGetDevice(&device));
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  C10_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, snows::THREADS, 0));
  return std::max<int64_t>(1, std::min<int64_t>(wanted, int64_t(processors) * each));
}

template <typename... P>
void launch_together(void (*kernel)(P...), unsigned blocks, P... arguments) {
  void* pointers[] = {&arguments...};
  C10_CUDA_CHECK(cudaLaunchCooperativeKernel(reinterpret_cast<void*>(kernel), dim3(blocks), dim3(snows::THREADS), pointers, 0,
                                             c10::cuda::getCurrentCUDAStream()));
}

// Which outputs are wanted is what differs between the ops.
void select(const at::Tensor& scores, int64_t n, int64_t m, uint8_t* mask, uint8_t* bits, uint8_t* codes) {
  const c10::cuda::CUDAGuard guard(scores.device());
  DISPATCH(scores, "nm_select", [&] {
    const snows::Selection<T> selection{data<T>(scores), scores.size(0), scores.size(1), int(n), int(m), mask, bits, codes};
    snows::nm_select(selection, [](auto kernel, unsigned blocks, int threads, auto s) { launch(kernel, blocks, threads, s); });
  });
}

at::Tensor nm_mask(const at::Tensor& given, int64_t n, int64_t m) {
  snows::check_scores("nm_mask", given, n, m);
  const at::Tensor scores = given.contiguous();
  at::Tensor mask = at::empty(scores.sizes(), scores.options().dtype(at::kBool));
  select(scores, n, m, data<uint8_t>(mask), nullptr, nullptr);
  return mask;
}

std::tuple<at::Tensor, at::Tensor> nm_select(const at::Tensor& given, int64_t n, int64_t m) {
  snows::check_scores("nm_select", given, n, m);
  const at::Tensor scores = given.contiguous();
  const bool coded = n == 2 && m == 4;
  const int64_t rows = scores.size(0), bytes = (scores.size(1) + 7) / 8;
  at::Tensor bits = at::empty({rows, bytes}, scores.options().dtype(at::kByte));
  at::Tensor codes = at::empty({rows, coded ? bytes : 0}, bits.options());
  select(scores, n, m, nullptr, data<uint8_t>(bits), coded ? data<uint8_t>(codes) : nullptr);
  return {bits, codes};
}

void cg_update(at::Tensor& x, at::Tensor& r, const at::Tensor& p, const at::Tensor& Ap, at::Tensor& state, double rtol) {
  snows::check_alike("cg_update", x, {&r, &p, &Ap});
  snows::check_like("cg_update", "the state", state, {5}, at::kDouble, x.device());
  const c10::cuda::CUDAGuard guard(x.device());
  DISPATCH(x, "cg_update", [&] {
    constexpr int V = snows::WIDTH<T>;
    const bool wide = aligned({&x, &r, &p, &Ap});
    const auto kernel = wide ? snows::cg_update_kernel<T, V> : snows::cg_update_kernel<T, 1>;
    const int64_t n = x.numel();
    const unsigned blocks = together(kernel, n / (snows::THREADS * (wide ? V : 1)) + 1);
    const at::Tensor partials = at::empty({2, blocks}, state.options());
    launch_together<T*, T*, const T*, const T*, int64_t, snows::State*, double, double*>(
        kernel, blocks, data<T>(x), data<T>(r), data<T>(p), data<T>(Ap), n, data<snows::State>(state), rtol, data<double>(partials));
  });
}

void cg_direction(at::Tensor& p, const at::Tensor& r, const at::Tensor& z, at::Tensor& state) {
  snows::check_alike("cg_direction", p, {&r, &z});
  snows::check_like("cg_direction", "the state", state, {5}, at::kDouble, p.device());
  const c10::cuda::CUDAGuard guard(p.device());
  DISPATCH(p, "cg_direction", [&] {
    constexpr int V = snows::WIDTH<T>;
    const bool wide = aligned({&p, &r, &z});
    const auto kernel = wide ? snows::cg_direction_kernel<T, V> : snows::cg_direction_kernel<T, 1>;
    const int64_t n = p.numel();
    const unsigned blocks = together(kernel, n / (snows::THREADS * (wide ? V : 1)) + 1);
    const at::Tensor partials = at::empty({blocks}, state.options());
    launch_together<T*, const T*, const T*, int64_t, snows::State*, double*>(
        kernel, blocks, data<T>(p), data<T>(r), data<T>(z), n, data<snows::State>(state), data<double>(partials));
  });
}

void batched_cg_update(at::Tensor& x, at::Tensor& r, at::Tensor& p, at::Tensor& rz, const at::Tensor& product,
                       const at::Tensor& mask, const at::Tensor& inverse, const at::Tensor& target) {
  snows::check_batched_cg(x, r, p, rz, product, mask, inverse, target);
  const c10::cuda::CUDAGuard guard(x.device());
  const int64_t rows = x.size(0) * x.size(1), columns = x.size(2);
  TORCH_CHECK_VALUE(rows <= INT32_MAX, "batched_cg_update: expected x to have at most 2^31 - 1 rows in all groups, got ", rows);
  if (rows == 0) return;
  DISPATCH(x, "batched_cg_update", [&] {
    constexpr int V = snows::WIDTH<T>;
    const bool wide = columns % V == 0 && aligned({&x, &r, &p, &product, &mask, &inverse});
    int threads = 32;
    while (threads < snows::THREADS && threads * (wide ? V : 1) < columns) threads *= 2;
    const snows::Rows<T> system{data<T>(x), data<T>(r), data<T>(p), data<double>(rz), data<T>(product), data<uint8_t>(mask),
                                data<T>(inverse), data<double>(target), x.size(1), columns};
    launch(wide ? snows::batched_cg_kernel<T, V> : snows::batched_cg_kernel<T, 1>, unsigned(rows), threads, system);
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(snows, CUDA, library) {
  library.impl("nm_mask", &nm_mask);
  library.impl("nm_select", &nm_select);
  library.impl("cg_update", &cg_update);
  library.impl("cg_direction", &cg_direction);
  library.impl("batched_cg_update", &batched_cg_update);
}

// The kernels of the packed layers on the host, for tests/test_cuda_sparse.py.

#include "tensor_core_on_host.h"

#include "kernel_order.cuh"
#include "sparse_conv2d.cuh"
#include "sparse_linear.cuh"
#include "sparse_wgmma.cuh"

using namespace snows;

// `bf16`, `shape` (as Choice, or 3: wgmma), `splits`, `wide`: what is to run, of what the layers choose from by themselves.
template <typename T, typename Input>
static void run(const int* how, const void* order, int rows, int columns, int tokens, const void* bias, void* out, float* partial, int activation,
                const Input& input, size_t numbers) {
  const int splits = how[2];
  Choice c{decltype(Choice::shape)(how[1]), 0, splits};
  c.blocks = (c.shape == Choice::LARGE ? blocks_of<Large>(rows, tokens) : c.shape == Choice::SMALL ? blocks_of<Small>(rows, tokens)
              : blocks_of<Medium>(rows, tokens)) * splits;
  const size_t lines = tiles_down(rows) * tiles_across(columns) * TILE_LINES;
  emulation::readable = {{order, lines * sizeof(Line)}, {input.x, numbers * sizeof(T)}};
  const Product<T> p{static_cast<const Line*>(order), rows, columns, tokens, static_cast<const T*>(bias), static_cast<T*>(out),
                     splits > 1 ? partial : nullptr, splits, activation};
  const auto launch = [](auto kernel, unsigned blocks, int threads, int bytes, auto... a) { launch_apart(kernel, blocks, threads, bytes, a...); };
  if constexpr (std::is_same_v<Input, Tokens<true>>)
    if (how[1] == 3) return wgmma_product_by(p, input, launch);
  sparse_product_by(c, p, input, how[3], launch);
}

extern "C" {

void adversary(int late, int backwards) {
  emulation::late = late;
  emulation::backwards = backwards;
}

void kernel_order(const uint16_t* values, const uint8_t* codes, int64_t rows, int64_t columns, uint32_t* order) {
  launch_apart(kernel_order_kernel, 3, THREADS, 0, Stored{values, codes, rows, columns}, order);
}

void sparse_linear(const int* how, const void* order, int rows, int columns, const void* bias, void* out, float* partial, int activation,
                   const uint16_t* x, int tokens) {
  const Tokens<true> input{x, tokens, columns};
  const size_t numbers = size_t(tokens) * columns;
  how[0] ? run<__nv_bfloat16>(how, order, rows, columns, tokens, bias, out, partial, activation, input, numbers)
         : run<__half>(how, order, rows, columns, tokens, bias, out, partial, activation, input, numbers);
}

// `sizes`: as the fields of Pixels, from channels on.
void sparse_conv2d(const int* how, const void* order, int rows, const void* bias, void* out, float* partial, int activation, const uint16_t* x,
                   int images, const int* sizes) {
  Pixels<true> input{x, 0};
  memcpy(&input.channels, sizes, 13 * sizeof(int));
  input.pixels = images * input.out_h * input.out_w;
  const int columns = input.kernel_h * input.kernel_w * input.channels;
  const size_t numbers = size_t(images) * input.height * input.width * input.channels;
  how[0] ? run<__nv_bfloat16>(how, order, rows, columns, input.pixels, bias, out, partial, activation, input, numbers)
         : run<__half>(how, order, rows, columns, input.pixels, bias, out, partial, activation, input, numbers);
}

// What the layers choose by themselves: shape, blocks, splits.
void choose(int64_t rows, int64_t columns, int64_t tokens, int wide, int processors, int64_t* found) {
  const Choice c = snows::choose(rows, columns, tokens, wide, processors);
  found[0] = c.shape, found[1] = c.blocks, found[2] = c.splits;
}

int wgmma_takes(int64_t rows, int64_t tokens, int wide, int processors) { return snows::wgmma_takes(rows, tokens, wide, processors); }
}

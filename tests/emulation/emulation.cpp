// The kernels of csrc/cuda on the host, for tests/test_cuda.py.

#include "cuda_on_host.h"

#include "batched_cg.cuh"
#include "cg.cuh"
#include "nm_select.cuh"

using namespace snows;

template <typename T>
static void select(const T* scores, int64_t rows, int64_t columns, int n, int m, uint8_t* mask, uint8_t* bits, uint8_t* codes) {
  nm_select(Selection<T>{scores, rows, columns, n, m, mask, bits, codes}, [](auto kernel, unsigned blocks, int threads, auto s) {
    launch(kernel, blocks < 3 ? blocks : 3, threads, s);  // fewer blocks than tiles: they take turns
  });
}

extern "C" {

void select_float(const float* s, int64_t rows, int64_t columns, int n, int m, uint8_t* mask, uint8_t* bits, uint8_t* codes) {
  select(s, rows, columns, n, m, mask, bits, codes);
}

void select_double(const double* s, int64_t rows, int64_t columns, int n, int m, uint8_t* mask, uint8_t* bits, uint8_t* codes) {
  select(s, rows, columns, n, m, mask, bits, codes);
}

void cg_update(float* x, float* r, const float* p, const float* Ap, int64_t n, double* state, double rtol, int wide, int blocks) {
  std::vector<double> partials(2 * blocks, NAN);
  launch(wide ? cg_update_kernel<float, 4> : cg_update_kernel<float, 1>, blocks, THREADS, x, r, p, Ap, n, reinterpret_cast<State*>(state),
         rtol, partials.data());
}

void cg_direction(float* p, const float* r, const float* z, int64_t n, double* state, int wide, int blocks) {
  std::vector<double> partials(blocks, NAN);
  launch(wide ? cg_direction_kernel<float, 4> : cg_direction_kernel<float, 1>, blocks, THREADS, p, r, z, n,
         reinterpret_cast<State*>(state), partials.data());
}

void batched_cg_update(float* x, float* r, float* p, double* rz, const float* product, const uint8_t* mask, const float* inverse,
                       const double* target, int64_t groups, int64_t rows, int64_t columns, int wide, int threads) {
  const Rows<float> system{x, r, p, rz, product, mask, inverse, target, rows, columns};
  launch(wide ? batched_cg_kernel<float, 4> : batched_cg_kernel<float, 1>, groups * rows, threads, system);
}
}

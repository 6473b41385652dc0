// The vector part of conjugate gradients on the CPU, single and batched. Specification: snows/reference/cg.py, cg_update,
// cg_direction and batched_cg_update. Each pass reads its vectors once; sums go by chunks of fixed size and then over those in
// order, so that they do not depend on the number of threads.

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "cg.h"
#include "checks.h"
#include "simd.h"

namespace {

constexpr double RUNNING = 0, CONVERGED = 1, NEGATIVE_CURVATURE = 2, NOT_FINITE = 3;  // as in snows/reference/cg.py

struct State {  // the tensor's numbers, in order
  double status, iterations, rz, rr, bb;
};

constexpr int64_t CHUNK = 8192;

// The sum of f(begin, end) over chunks of n.
template <typename F>
double sum_chunks(int64_t n, F f) {
  std::vector<double> partial((n + CHUNK - 1) / CHUNK);
  at::parallel_for(0, partial.size(), 1, [&](int64_t begin, int64_t end) {
    snows::vectorised([&]() SNOWS_INLINE {
      for (int64_t c = begin; c < end; ++c) partial[c] = f(c * CHUNK, std::min(n, (c + 1) * CHUNK));
    });
  });
  double sum = 0;
  for (double value : partial) sum += value;
  return sum;
}

template <typename scalar_t>
void update(at::Tensor& x_, at::Tensor& r_, const at::Tensor& p_, const at::Tensor& Ap_, State& s, double rtol) {
  scalar_t *x = x_.data_ptr<scalar_t>(), *r = r_.data_ptr<scalar_t>();
  const scalar_t *p = p_.const_data_ptr<scalar_t>(), *Ap = Ap_.const_data_ptr<scalar_t>();
  const int64_t n = x_.numel();
  const double curvature = sum_chunks(n, [=](int64_t begin, int64_t end) SNOWS_INLINE { return snows::dot(p, Ap, begin, end); });
  s.iterations += 1;
  if (!std::isfinite(curvature)) {
    s.status = NOT_FINITE;
  } else if (curvature <= 0) {
    s.status = NEGATIVE_CURVATURE;
    if (s.iterations == 1) std::copy(p, p + n, x);  // x was zero: the first direction itself
  } else {
    const snows::Wide<scalar_t> alpha = s.rz / curvature;
    s.rr = sum_chunks(n, [=](int64_t begin, int64_t end) SNOWS_INLINE { return snows::step(x, r, p, Ap, alpha, begin, end); });
    if (s.rr <= rtol * rtol * s.bb) s.status = CONVERGED;
  }
}

template <typename scalar_t>
void direct(at::Tensor& p_, const at::Tensor& r_, const at::Tensor& z_, State& s) {
  scalar_t* p = p_.data_ptr<scalar_t>();
  const scalar_t *r = r_.const_data_ptr<scalar_t>(), *z = z_.const_data_ptr<scalar_t>();
  const double rz = sum_chunks(p_.numel(), [=](int64_t begin, int64_t end) SNOWS_INLINE { return snows::dot(r, z, begin, end); });
  const snows::Wide<scalar_t> beta = rz / s.rz;  // 0 for the first direction: rz begins at infinity
  at::parallel_for(0, p_.numel(), CHUNK, [=](int64_t begin, int64_t end) {
    snows::vectorised([=]() SNOWS_INLINE {
      snows::turn(p, z, beta, begin, end);
    });
  });
  s.rz = rz;
}

template <typename scalar_t>
void update_rows(at::Tensor& x_, at::Tensor& r_, at::Tensor& p_, at::Tensor& rz_, const at::Tensor& product_,
                 const at::Tensor& mask_, const at::Tensor& inverse_, const at::Tensor& target_) {
  const int64_t rows = x_.size(1), columns = x_.size(2);
  at::parallel_for(0, x_.size(0) * rows, std::max<int64_t>(1, CHUNK / std::max<int64_t>(1, columns)), [&](int64_t from, int64_t to) {
    for (int64_t row = from; row < to; ++row) {
      double& rz = rz_.data_ptr<double>()[row];
      if (!(rz > 0)) continue;
      scalar_t *x = x_.data_ptr<scalar_t>() + row * columns, *r = r_.data_ptr<scalar_t>() + row * columns;
      scalar_t* p = p_.data_ptr<scalar_t>() + row * columns;
      const scalar_t* product = product_.const_data_ptr<scalar_t>() + row * columns;
      const scalar_t* inverse = inverse_.const_data_ptr<scalar_t>() + row / rows * columns;
      const bool* mask = mask_.const_data_ptr<bool>() + row * columns;
      rz = snows::step_of_row(x, r, p, product, mask, inverse, columns, rz, target_.const_data_ptr<double>()[row]);
    }
  });
}

void cg_update(at::Tensor& x, at::Tensor& r, const at::Tensor& p, const at::Tensor& Ap, at::Tensor& state, double rtol) {
  snows::check_alike("cg_update", x, {&r, &p, &Ap});
  snows::check_like("cg_update", "the state", state, {5}, at::kDouble, x.device());
  State& s = *static_cast<State*>(state.data_ptr());
  if (s.status == RUNNING)
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "cg_update", [&] { update<scalar_t>(x, r, p, Ap, s, rtol); });
}

void cg_direction(at::Tensor& p, const at::Tensor& r, const at::Tensor& z, at::Tensor& state) {
  snows::check_alike("cg_direction", p, {&r, &z});
  snows::check_like("cg_direction", "the state", state, {5}, at::kDouble, p.device());
  State& s = *static_cast<State*>(state.data_ptr());
  if (s.status == RUNNING)
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, p.scalar_type(), "cg_direction", [&] { direct<scalar_t>(p, r, z, s); });
}

void batched_cg_update(at::Tensor& x, at::Tensor& r, at::Tensor& p, at::Tensor& rz, const at::Tensor& product,
                       const at::Tensor& mask, const at::Tensor& inverse, const at::Tensor& target) {
  snows::check_batched_cg(x, r, p, rz, product, mask, inverse, target);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "batched_cg_update", [&] {
    update_rows<scalar_t>(x, r, p, rz, product, mask, inverse, target);
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(snows, CPU, library) {
  library.impl("cg_update", &cg_update);
  library.impl("cg_direction", &cg_direction);
  library.impl("batched_cg_update", &batched_cg_update);
}

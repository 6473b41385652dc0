// Packed layers where nothing is differentiated: straight to the kernel. The derivative is registered in Python (snows/ops/derivatives.py), and
// its kernel would be asked at every call, which takes as long as a small layer.

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <torch/library.h>

#include <algorithm>

namespace {

void differentiate_if_asked(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
  const auto arguments = torch::jit::last(*stack, op.schema().arguments().size());
  const auto any = [&arguments](const auto& says) {
    return std::any_of(arguments.begin(), arguments.end(), [&](const c10::IValue& x) { return x.isTensor() && x.toTensor().defined() && says(x.toTensor()); });
  };
  TORCH_CHECK_NOT_IMPLEMENTED(!any([](const at::Tensor& x) { return x._fw_grad(0).defined(); }), op.schema().name(),
                              ": expected no forward-mode derivative, which packed layers do not have; use reverse mode, or the dense layer");
  const bool asked = c10::GradMode::is_enabled() && any([](const at::Tensor& x) { return x.requires_grad(); });
  // Python's kernel stands for every autograd key that has none of its own.
  if (asked) return op.redispatchBoxed((keys & c10::after_autograd_keyset).add(c10::DispatchKey::AutogradOther), stack);
  at::AutoDispatchBelowAutograd guard;
  op.redispatchBoxed(keys & c10::after_autograd_keyset, stack);
}

}  // namespace

TORCH_LIBRARY_IMPL(snows, AutogradCPU, library) {
  for (const char* name : {"sparse_linear", "sparse_conv2d"}) library.impl(name, torch::CppFunction::makeFromBoxedFunction<&differentiate_if_asked>());
}

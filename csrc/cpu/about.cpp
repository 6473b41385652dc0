// Which kernels of packed layers run on this processor, for people.

#include <torch/library.h>

#include <string>
#include <vector>

#include "panels.h"
#include "tiles.h"

namespace {

std::vector<std::string> packed_kernels() {
  using snows::Simd, snows::simd;
  const std::string set = simd() == Simd::avx512 ? "AVX-512" : simd() == Simd::avx2 ? "AVX2" : "vectors of 16 bytes";
  std::string few;
  struct {
    const char* name;
    int64_t n, m, stored;
  } patterns[] = {{"2:4", 2, 4, 512}, {"1:4", 1, 4, 256}, {"unstructured, half kept", 0, 0, 512}};
  for (const auto& p : patterns)
    if (const int64_t most = snows::most_tokens(1024, p.n, p.m, p.stored, 1024)) few += (few.empty() ? "" : "; ") + (std::string(p.name) + " up to " + std::to_string(most));
  return {
      set + (snows::multiplies_bfloat16() ? ", bfloat16 multiplied as it is" : ", 16-bit types in float32"),
      few.empty() ? "the kernel of many tokens" : few + " tokens",
      "multiples of " + std::to_string(snows::together_of(8) == 8 ? 8 : 16) + " images",
  };
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(snows, library) { library.def("packed_kernels() -> str[]", &packed_kernels); }

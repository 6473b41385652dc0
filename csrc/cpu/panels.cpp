// What surrounds the product: panels shared out among threads, sums begun with the bias and ended by the activation.

#include "panels.h"

#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/relu.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

namespace snows {

Simd simd() {
  static const Simd chosen = [] {
    const std::string capability = at::get_cpu_capability();
    return capability == "AVX512" ? Simd::avx512 : capability == "AVX2" ? Simd::avx2 : Simd::portable;
  }();
  return chosen;
}

bool multiplies_bfloat16() {
#ifdef SNOWS_BFLOAT16
  static const bool known = __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw");
  return known && simd() == Simd::avx512;
#else
  return false;
#endif
}

Origin Origin::of(const at::Tensor& values, const at::Tensor& codes) {
  constexpr int64_t kSamples = 16;
  const auto mix = [](uint64_t hash, uint64_t x) { return (hash ^ x) * 0x9e3779b97f4a7c15u + (hash >> 29); };
  uint64_t sample = 0;
  for (const at::Tensor* x : {&values, &codes}) {
    const auto* bytes = static_cast<const uint8_t*>(x->const_data_ptr());
    const int64_t size = x->element_size(), count = x->numel();
    sample = mix(sample, count * 16 + size);
    for (int64_t i = 0; i < std::min(count, kSamples); ++i) {
      uint64_t number = 0;
      std::memcpy(&number, bytes + (count <= kSamples ? i : i * (count - 1) / (kSamples - 1)) * size, size);
      sample = mix(sample, number);
    }
  }
  const auto changes = [](const at::Tensor& x) { return x.is_inference() ? 0u : x.unsafeGetTensorImpl()->version_counter().current_version(); };
  const auto place = [](const at::Tensor& x) { return reinterpret_cast<uintptr_t>(x.const_data_ptr()); };
  return {sample, mix(place(values), place(codes)), uint32_t(changes(values)) * 0x10001u + uint32_t(changes(codes))};
}

Order read_order(const char* op, const at::Tensor& words, const at::Tensor& values, const at::Tensor& codes, at::IntArrayRef shape) {
  check_device(op, "the order", words, values.device());
  TORCH_CHECK_VALUE(words.scalar_type() == at::kInt && words.is_contiguous() && words.numel() >= Order::kHeader, op, ": expected an order as kernel_order makes it, got ",
                    words.sizes(), " ", words.scalar_type());
  const int32_t* p = words.const_data_ptr<int32_t>();
  Order o = Order::of_header(p);
  Origin origin;
  std::memcpy(&origin.sample, p + 8, 8), std::memcpy(&origin.place, p + 10, 8), std::memcpy(&origin.changes, p + 12, 4);
  const int64_t taps = shape.size() == 4 ? shape[2] * shape[3] : 1;
  TORCH_CHECK_VALUE(o.rows == shape[0] && o.channels == shape[1] && o.taps == taps && o.block > 0 && o.vectors > 0 && o.steps >= 0 && o.entries >= 0 &&
                        o.words() == words.numel() && origin.same(Origin::of(values, codes)),
                    op, ": expected the order that kernel_order makes of this weight, got that of another, or of what it was before it changed");
  return o.with_arrays(p);
}

float* Scratch::floats(int64_t count) {
  if (static_cast<int64_t>(memory_.size()) < count + 16) memory_ = std::vector<float>(count + 16);
  return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory_.data()) + 63) / 64 * 64);
}

void multiply(const Order& o, const Panels& panels, const at::Tensor& bias, c10::string_view activation) {
  constexpr int64_t kTogether = 2;  // chunks for which a block is filled once: their sums are what the second-level cache holds
  const int64_t chunks = o.chunks(), blocks = o.blocks();
  // Several threads share a panel only where there are too few for all; each then fills it for itself.
  const int64_t wanted = 8 * at::get_num_threads(), shares = std::min(chunks, std::max<int64_t>(1, wanted / std::max<int64_t>(1, panels.count)));
  const int64_t most = std::min(kTogether * Order::kChunk, o.rows) + 1;  // rows of sums; one more where their number is odd
  // Threads take the next items when they are done with theirs: one that is held up, or has wider panels, does fewer.
  const int64_t items = panels.count * shares, grain = std::max<int64_t>(1, items / wanted);
  std::atomic<int64_t> taken{0};
  at::parallel_for(0, std::min<int64_t>(at::get_num_threads(), items), 1, [&](int64_t, int64_t) {
    const int64_t lanes = panels.lanes, step = most * lanes * panels.vectors;
    static thread_local Scratch memory;
    float* sums = memory.floats(panels.strips * step + 128 + panels.scratch);  // and with it scratch aligned: no load straddles two cache lines
    float* scratch = sums + panels.strips * step + 128;
    std::vector<float> starts(most);
    for (int64_t begin; (begin = taken.fetch_add(grain)) < items;)
      for (int64_t item = begin; item < std::min(begin + grain, items); ++item) {
        const int64_t panel = item / shares, share = item % shares, end_of_share = chunks * (share + 1) / shares;
        for (int64_t from = chunks * share / shares, to; from < end_of_share; from = to) {
          to = std::min(from + kTogether, end_of_share);
          const int64_t row = from * Order::kChunk, rows = std::min(to * Order::kChunk, o.rows) - row;
          std::fill(starts.begin(), starts.end(), 0.0f);
          if (bias.defined()) std::copy_n(bias.const_data_ptr<float>() + row, rows, starts.begin());
          for (int64_t block = 0; block < blocks; ++block)
            for (int64_t strip = 0; strip < panels.strips; ++strip) {
              const Source source = panels.fill(scratch, panel, strip, block, from == chunks * share / shares);
              for (int64_t chunk = from; chunk < to && source.vectors > 0; ++chunk) {
                const int64_t before = (chunk - from) * Order::kChunk;
                Part part = part_of(o, chunk, block, panels.lines);
                part.vectors = source.vectors, part.lanes = lanes, part.panel = source.at, part.half = source.half;
                part.sums = sums + strip * step + before * lanes * source.vectors, part.bias = block == 0 ? starts.data() + before : nullptr;
                o.bfloat16 ? multiply_bfloat16(part) : product(part);
              }
            }
          for (int64_t strip = 0; strip < panels.strips; ++strip) {
            const int64_t count = rows * lanes * panels.vectors;  // where the strip is narrower, it does what nobody reads
            float* all = sums + strip * step;
            if (activation == "relu")
              for (int64_t i = 0; i < count; ++i) all[i] = all[i] < 0 ? 0 : all[i];  // NaN stays
            if (activation == "gelu") {
              at::Tensor tensor = at::from_blob(all, {count}, at::kFloat);
              at::gelu_(tensor);
            }
          }
          panels.store(sums, step, panel, row, rows);
        }
      }
  });
}

at::Tensor unpack(const at::Tensor& values, const at::Tensor& codes, at::IntArrayRef shape, int64_t n, int64_t m) {
  using Unpack = at::Tensor(const at::Tensor&, const at::Tensor&, at::IntArrayRef, int64_t, int64_t);
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("snows::unpack", "").typed<Unpack>();
  return op.call(values, codes, shape, n, m);
}

at::Tensor activate(const at::Tensor& output, c10::string_view activation) {
  if (activation == "relu") return output.relu();
  return activation == "gelu" ? at::gelu(output) : output;
}

at::Tensor widened(const std::optional<at::Tensor>& bias) { return bias.has_value() ? bias->to(at::kFloat).contiguous() : at::Tensor(); }

}  // namespace snows

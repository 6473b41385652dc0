// From the packed weight to the order of panels.h: decode the positions, and in each block of columns put rows with about
// as many stored weights side by side. Anything but a float32 weight with sound codes gets an empty order.

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <numeric>
#include <vector>

#include "panels.h"

namespace {

using snows::Order;

class Bits {
 public:
  explicit Bits(const at::Tensor& codes) : bytes_(codes.const_data_ptr<uint8_t>()) {}
  int64_t next(int64_t count) {
    int64_t number = 0;
    for (int64_t i = 0; i < count; ++i, ++at_) number |= int64_t(bytes_[at_ / 8] >> at_ % 8 & 1) << i;
    return number;
  }

 private:
  const uint8_t* bytes_;
  int64_t at_ = 0;
};

struct Stored {
  int64_t column;
  float value;
};

// The stored weights row by row, columns ascending; false if the codes are not those of so many values.
bool decode(const at::Tensor& values, const at::Tensor& codes, int64_t rows, int64_t columns, int64_t n, int64_t m, std::vector<std::vector<Stored>>& out) {
  int64_t width = 0;
  while (m > 1 && (int64_t(1) << width) < m) ++width;
  const bool positions = m > 0 && n * width <= m;
  const int64_t size = m > 0 ? m : columns, groups = m > 0 ? (columns + m - 1) / m : 1;
  const int64_t bits = rows * groups * (positions ? n * width : size);
  if (codes.numel() * 8 < bits) return false;
  Bits stream(codes);
  const float* value = values.const_data_ptr<float>();
  const float* const end = value + values.numel();
  out.resize(rows);
  for (auto& row : out)
    for (int64_t first = 0; first < groups * size; first += size) {
      auto take = [&](int64_t column) {
        if (value == end || column >= first + size) return false;
        if (column < columns) row.push_back({column, *value});  // past the row's end there are only fillers
        ++value;
        return true;
      };
      for (int64_t i = 0; positions && i < n; ++i)
        if (!take(first + stream.next(width))) return false;
      for (int64_t i = 0; !positions && i < size; ++i)
        if (stream.next(1) && !take(first + i)) return false;
      if (positions && !std::is_sorted(row.begin(), row.end(), [](const Stored& a, const Stored& b) { return a.column < b.column; })) return false;
    }
  return value == end;
}

}  // namespace

at::Tensor snows::kernel_order(const at::Tensor& values_, const at::Tensor& codes_, at::IntArrayRef shape, int64_t n, int64_t m) {
  const int64_t rows = shape[0], columns = c10::multiply_integers(shape.slice(1));
  std::vector<std::vector<Stored>> stored;
  const auto options = values_.options().dtype(at::kInt);
  if (values_.scalar_type() != at::kFloat || rows * columns == 0) return at::empty({0}, options);
  if (!decode(values_.contiguous(), codes_.contiguous(), rows, columns, n, m, stored)) return at::empty({0}, options);

  // Either way 24 KiB of a panel and 16 vectors of sums. Long vectors of tokens share a weight's broadcast; where a row
  // has few weights in a block, long blocks pay more, for sums are then loaded and stored less often.
  const bool dense = values_.numel() * 5 >= rows * columns * 2;
  Order o{rows, columns, dense ? 48 : 96, dense ? 128 : 64, dense ? 2 : 4, 0, nullptr, nullptr, nullptr, nullptr};
  std::vector<int32_t> starts{0}, row_of;
  std::vector<float> weights;
  std::vector<uint16_t> offsets;
  std::vector<int64_t> cursor(rows, 0), count(rows);
  const int64_t together = 4 / o.bundle;  // the kernels read four offsets at once
  for (int64_t chunk = 0; chunk < o.chunks(); ++chunk)
    for (int64_t block = 0; block < o.blocks(); ++block) {
      const int64_t first = chunk * Order::kChunk, last = std::min(first + Order::kChunk, rows);
      for (int64_t r = first; r < last; ++r) {
        count[r] = 0;
        for (size_t i = cursor[r]; i < stored[r].size() && stored[r][i].column < (block + 1) * o.block; ++i) ++count[r];
      }
      std::vector<int64_t> sorted(last - first);
      std::iota(sorted.begin(), sorted.end(), first);
      std::stable_sort(sorted.begin(), sorted.end(), [&](int64_t a, int64_t b) { return count[a] > count[b]; });
      for (int64_t i = 0; i < o.bundles(); ++i) {
        const int64_t at = i * o.bundle;
        const int64_t longest = at < last - first ? count[sorted[at]] : 0;
        const int64_t steps = (longest + together - 1) / together * together;
        for (int64_t r = 0; r < o.bundle; ++r) row_of.push_back(at + r < last - first ? sorted[at + r] - first : Order::kChunk);
        for (int64_t s = 0; s < steps; ++s)
          for (int64_t r = 0; r < o.bundle; ++r) {
            const bool there = at + r < last - first && s < count[sorted[at + r]];
            const Stored entry = there ? stored[sorted[at + r]][cursor[sorted[at + r]] + s] : Stored{block * o.block, 0.0f};
            weights.push_back(entry.value);
            offsets.push_back(static_cast<uint16_t>((entry.column - block * o.block) * o.tokens * 4));
          }
        o.steps += steps;
        starts.push_back(static_cast<int32_t>(o.steps));
      }
      for (int64_t r = first; r < last; ++r) cursor[r] += count[r];
    }

  const int64_t words[] = {Order::kHeader, int64_t(starts.size()), int64_t(row_of.size()), int64_t(weights.size()), int64_t(offsets.size() + 1) / 2};
  at::Tensor order = at::empty({std::accumulate(words, words + 5, int64_t(0))}, options);
  int32_t* p = order.mutable_data_ptr<int32_t>();
  std::fill_n(p, order.numel(), 0);
  const int32_t header[] = {int32_t(rows), int32_t(columns), int32_t(o.block), int32_t(o.tokens), int32_t(o.bundle), int32_t(o.steps)};
  std::memcpy(p, header, sizeof header);
  std::memcpy(p += words[0], starts.data(), 4 * starts.size());
  std::memcpy(p += words[1], row_of.data(), 4 * row_of.size());
  std::memcpy(p += words[2], weights.data(), 4 * weights.size());
  std::memcpy(p += words[3], offsets.data(), 2 * offsets.size());
  return order;
}

TORCH_LIBRARY_IMPL(snows, CPU, library) { library.impl("kernel_order", &snows::kernel_order); }

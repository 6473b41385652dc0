// From the packed weight to the order of order.h: decode the positions, and in each block of columns put rows with about as many stored
// weights side by side.

#include "order.h"

#ifdef __unix__
#include <unistd.h>
#endif

#include <bit>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <tuple>
#include <utility>

#include "simd.h"

namespace snows {

namespace {

using snows::Order;
using snows::Pair;

class Bits {
 public:
  explicit Bits(const uint8_t* bytes) : bytes_(bytes) {}
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
bool decode(const Packed& weight, std::vector<std::vector<Stored>>& out) {
  const int64_t rows = weight.rows, columns = weight.columns(), n = weight.n, m = weight.m;
  int64_t width = 0;
  while (m > 1 && (int64_t(1) << width) < m) ++width;
  const bool positions = m > 0 && n * width <= m;
  const int64_t size = m > 0 ? m : columns, groups = m > 0 ? (columns + m - 1) / m : 1;
  const int64_t bits = rows * groups * (positions ? n * width : size);
  if (weight.bytes * 8 < bits) return false;
  Bits stream(weight.codes);
  const float* value = weight.values;
  const float* const end = value + weight.stored;
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

// One row's weights in one block: their lines, ascending, and the block's columns they stand in as bits.
struct Row {
  std::vector<std::pair<uint16_t, float>> entries;
  std::vector<uint64_t> mask;
};

// Pairs of rows that share many columns and have about as many: the longest first, each with the best of those left. `shared` is
// here in columns.
std::vector<Pair> pair_up(const std::vector<Row>& rows) {
  auto length = [&](size_t r) { return r < rows.size() ? int32_t(rows[r].entries.size()) : 0; };
  std::vector<int32_t> left(rows.size());
  std::iota(left.begin(), left.end(), 0);
  std::stable_sort(left.begin(), left.end(), [&](int32_t a, int32_t b) { return length(a) > length(b); });
  if (left.size() % 2) left.push_back(int32_t(rows.size()));  // one that there is not
  std::vector<Pair> pairs;
  while (!left.empty()) {
    const int32_t first = left[0];
    int32_t best = -1, shared = 0;
    size_t at = 1;
    for (size_t i = 1; i < left.size() && 2 * length(left[i]) > best; ++i) {  // the rest is shorter, and can do no better
      int32_t common = 0;
      for (size_t k = 0; left[i] < int32_t(rows.size()) && k < rows[first].mask.size(); ++k)
        common += std::popcount(rows[first].mask[k] & rows[left[i]].mask[k]);
      if (common + length(left[i]) > best) best = common + length(left[i]), shared = common, at = i;
    }
    const int32_t second = left[at];
    pairs.push_back({shared, length(second) - shared, length(first) - length(second), first, second});
    left.erase(left.begin() + at);
    left.erase(left.begin());
  }
  // Equal loops one after the other: the processor foresees their ends.
  std::stable_sort(pairs.begin(), pairs.end(), [](const Pair& a, const Pair& b) {
    return std::tie(a.shared, a.both, a.rest) > std::tie(b.shared, b.both, b.rest);
  });
  return pairs;
}

struct Writer {
  std::vector<int32_t> starts;
  std::vector<Pair> pairs;
  std::vector<float> weights;
  std::vector<uint16_t> lines;

  // `columns` in a step: 1, or 2 in bfloat16, where a run is filled up with a weight of zero.
  void write(Pair pair, const Row& first, const Row& second, size_t columns) {
    std::vector<std::pair<uint16_t, float>> of_both[2], only[2];
    auto x = first.entries.begin(), y = second.entries.begin();
    while (x != first.entries.end() || y != second.entries.end()) {
      if (y == second.entries.end() || (x != first.entries.end() && x->first < y->first)) {
        only[0].push_back(*x++);
      } else if (x == first.entries.end() || y->first < x->first) {
        only[1].push_back(*y++);
      } else {
        of_both[0].push_back(*x++), of_both[1].push_back(*y++);
      }
    }
    for (int i = 0; i < 2 && of_both[i].size() % columns; ++i) only[i].push_back(of_both[i].back()), of_both[i].pop_back();
    for (auto& row : only)
      if (row.size() % columns) row.emplace_back(row.back().first, 0.0f);
    auto step = [&](const auto& row, size_t at, bool with_lines) {
      for (size_t i = 0; i < columns && with_lines; ++i) lines.push_back(row[at + i].first);
      weights.push_back(columns == 1 ? row[at].second : two(row[at].second, row[at + 1].second));
    };
    for (size_t i = 0; i < of_both[0].size(); i += columns) step(of_both[0], i, true), step(of_both[1], i, false);
    for (size_t i = 0; i < only[0].size(); i += columns)
      for (const auto& row : only)
        if (i < row.size()) step(row, i, true);
    pair.shared = int32_t(of_both[0].size() / columns), pair.both = int32_t(only[1].size() / columns);
    pair.rest = int32_t((only[0].size() - only[1].size()) / columns);
    pairs.push_back(pair);
  }

  // Of widened bfloat16 the upper halves are the numbers.
  static float two(float low, float high) { return std::bit_cast<float>(std::bit_cast<uint32_t>(low) >> 16 | (std::bit_cast<uint32_t>(high) & 0xffff0000)); }
};

int64_t near_lines() {  // of the first-level cache
#ifdef _SC_LEVEL1_DCACHE_SIZE
  if (const int64_t bytes = sysconf(_SC_LEVEL1_DCACHE_SIZE); bytes > 0) return bytes / 64;
#endif
  return 512;
}

// A panel's width, how many columns a block has, the width of a convolution's panels, and whether those of 1 x 1 kernels are a linear layer's.
// Widths are in cache lines, of 16 tokens in float32 and 32 in bfloat16.
struct Blocking {
  int64_t lines, block, pixels;
  bool points;
};

// Measured; a weight is dense that stores two fifths of its numbers or more. A block's part of a panel should take 24 to 28 KiB. Wide panels
// share a weight's broadcast; where a row has few weights in a block, long blocks pay more, for sums are then loaded and stored less often.
Blocking blocking_of(bool bfloat16, bool dense) {
  constexpr int64_t kNear = 0;  // as many columns as take three quarters of the first-level cache
  static constexpr struct {
    Simd simd;
    bool bfloat16, dense;
    Blocking blocking;
  } table[] = {
      {snows::Simd::avx512, true, true, {4, 96, 4, false}},        // 32 registers: sums of two rows take 16
      {snows::Simd::avx512, true, false, {3, kNear, 4, false}},    // 12
      {snows::Simd::avx512, false, true, {6, 64, 7, false}},       // 12
      {snows::Simd::avx512, false, false, {5, kNear, 7, false}},   // 10
      {snows::Simd::avx2, false, true, {3, 128, 7, true}},         // 16 registers of half a line: 12. Wider panels would be multiplied in parts,
      {snows::Simd::avx2, false, false, {3, kNear, 7, true}},      // and a row's sums loaded and stored as often for each part of a shorter block
      {snows::Simd::portable, false, true, {3, 128, 7, true}},     // as AVX2: Arm's 32 registers of a quarter of a line hold 24 vectors of sums.
      {snows::Simd::portable, false, false, {3, kNear, 7, true}},  // A guess, no Arm processor was measured
  };
  for (const auto& row : table)
    if (row.simd == simd() && row.bfloat16 == bfloat16 && row.dense == dense) {
      Blocking found = row.blocking;
      if (found.block == kNear) found.block = near_lines() * 3 / 4 / found.lines / 16 * 16;
      return found;
    }
  std::abort();  // there is no such row
}

}  // namespace

int64_t Order::words() const {
  return kHeader + 2 * chunks() * blocks() + (rows + 1) / 2 * blocks() * int64_t(sizeof(Pair) / 4) + entries + (steps + 1) / 2;
}

Order Order::of_header(const int32_t* words) {
  return {words[0], words[1], words[2], words[3], words[4], words[5], words[6], words[7], nullptr, nullptr, nullptr, nullptr};
}

Order& Order::with_arrays(const int32_t* words) {
  starts = words + kHeader;
  pairs = reinterpret_cast<const Pair*>(starts + 2 * chunks() * blocks());
  weights = reinterpret_cast<const float*>(pairs + (rows + 1) / 2 * blocks());
  lines = reinterpret_cast<const uint16_t*>(weights + entries);
  return *this;
}

std::vector<int32_t> make_order(const Packed& weight, bool bfloat16) {
  std::vector<std::vector<Stored>> stored;
  if (!decode(weight, stored)) return {};
  const int64_t rows = weight.rows;
  const Blocking blocking = blocking_of(bfloat16, weight.stored * 5 >= rows * weight.columns() * 2);
  Order o{rows, weight.channels, weight.height * weight.width, blocking.block, blocking.lines, 0, 0, bfloat16, nullptr, nullptr, nullptr, nullptr};
  // In a convolution taps overlap: a channel takes as many lines as a strip of pixels has neighbours.
  if (weight.convolves && !(o.taps == 1 && blocking.points)) o.vectors = blocking.pixels, o.block = std::max<int64_t>(1, 448 / (weight.height * (o.vectors + weight.width - 1)));
  if (o.taps * o.block * o.vectors > 65536) return {};  // lines are 16-bit numbers
  Writer out;
  const int64_t words_of_mask = (o.taps * o.block + 63) / 64;
  for (int64_t chunk = 0; chunk < o.chunks(); ++chunk) {
    const int64_t first = chunk * Order::kChunk, count = std::min(Order::kChunk, rows - first);
    std::vector<std::vector<Row>> blocks(o.blocks(), std::vector<Row>(count));
    for (int64_t r = 0; r < count; ++r) {
      for (auto& block : blocks) block[r].mask.resize(words_of_mask);
      for (const Stored& entry : stored[first + r]) {
        const int64_t channel = entry.column % o.channels, column = entry.column / o.channels * o.block + channel % o.block;
        Row& row = blocks[channel / o.block][r];
        row.entries.emplace_back(static_cast<uint16_t>(column * o.vectors), entry.value);
        row.mask[column / 64] |= uint64_t(1) << column % 64;
      }
    }
    for (auto& block : blocks) {
      out.starts.insert(out.starts.end(), {int32_t(out.weights.size()), int32_t(out.lines.size())});
      for (const Pair& pair : pair_up(block)) out.write(pair, block[pair.first], pair.second < count ? block[pair.second] : Row(), bfloat16 ? 2 : 1);
    }
  }
  o.entries = int64_t(out.weights.size()), o.steps = int64_t(out.lines.size());

  const int32_t header[Order::kHeader] = {int32_t(rows), int32_t(o.channels), int32_t(o.taps), int32_t(o.block),
                                          int32_t(o.vectors), int32_t(o.steps), int32_t(o.entries), bfloat16};
  std::vector<int32_t> words(o.words());
  char* to = reinterpret_cast<char*>(words.data());
  const auto put = [&to](const auto* from, size_t count) {
    if (count > 0) std::memcpy(to, from, count * sizeof *from);
    to += count * sizeof *from;
  };
  put(header, Order::kHeader), put(out.starts.data(), out.starts.size()), put(out.pairs.data(), out.pairs.size());
  put(out.weights.data(), out.weights.size()), put(out.lines.data(), out.lines.size());
  return words;
}

}  // namespace snows

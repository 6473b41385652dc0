// Checks what csrc/cpu computes without torch against plain loops in double: for another processor it is cross-built and run under emulation
// (tests/test_arm.py). The argument names the instructions: portable (NEON on Arm), avx2 or avx512. Prints the largest errors, as parts of the sum
// of magnitudes that a result is rounded from, and ends with 1 where one is above its bound.

#include "../../csrc/cpu/cg.h"
#include "../../csrc/cpu/masks.h"
#include "../../csrc/cpu/product.h"

#include <cmath>
#include <cstdio>
#include <limits>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <utility>

namespace {

snows::Simd chosen = snows::Simd::portable;
std::mt19937 generator(0);
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

float normal() { return std::normal_distribution<float>()(generator); }
int64_t below(int64_t n) { return std::uniform_int_distribution<int64_t>(0, n - 1)(generator); }

struct Case {
  int64_t rows, channels, height, width;
  bool convolves;
  int64_t n, m;     // zeros: unstructured
  double density;   // of an unstructured one
  int64_t tokens;
};

// A weight of a pattern, and its codes as docs/kernels.md has them.
struct Weight {
  std::vector<double> dense;
  std::vector<float> values;
  std::vector<uint8_t> codes;
  int64_t bits = 0;

  explicit Weight(const Case& c) {
    const int64_t columns = c.channels * c.height * c.width, size = c.m ? c.m : columns;
    int64_t position_bits = 0;
    while ((int64_t(1) << position_bits) < c.m) ++position_bits;
    const bool positions = c.m && c.n * position_bits <= c.m;
    dense.resize(c.rows * columns);
    for (int64_t row = 0; row < c.rows; ++row)
      for (int64_t first = 0; first < columns; first += size) {
        std::vector<bool> kept(size);
        for (int64_t left = c.n; left > 0;)  // of the last group too, whose missing columns are fillers
          if (const int64_t i = below(size); !kept[i]) kept[i] = true, --left;
        for (int64_t i = 0; i < size && !c.m; ++i) kept[i] = std::uniform_real_distribution<>()(generator) < c.density;
        for (int64_t i = 0; i < size; ++i) {
          if (positions && kept[i]) write(i, position_bits);
          if (!positions) write(kept[i], 1);
          if (!kept[i]) continue;
          values.push_back(first + i < columns ? normal() : 0);
          if (first + i < columns) dense[row * columns + first + i] = values.back();
        }
      }
  }

  void write(int64_t number, int64_t count) {
    for (int64_t i = 0; i < count; ++i, ++bits) {
      if (bits % 8 == 0) codes.push_back(0);
      codes.back() |= (number >> i & 1) << bits % 8;
    }
  }
};

// The largest error as a part of the sum of magnitudes, and as a part of the bound on it: of so many terms each is rounded once, and each sum.
struct Error {
  double largest = 0, of_bound = 0;

  void see(double got, double exact, double magnitudes, int64_t terms) {
    const double part = std::fabs(got - exact) / (magnitudes > 0 ? magnitudes : 1);
    see({part, part / (2 * terms * std::ldexp(1.0, -24))});
  }
  void see(const Error& other) {  // NaN stays
    if (!(other.largest <= largest)) largest = other.largest;
    if (!(other.of_bound <= of_bound)) of_bound = other.of_bound;
  }
};

// The product, a panel after the other, of which a column has lines of so many tokens.
Error product_error(const Case& c, int64_t line) {
  const Weight w(c);
  const int64_t columns = c.channels * c.height * c.width;
  const snows::Packed packed{w.values.data(), w.codes.data(), int64_t(w.values.size()), int64_t(w.codes.size()), c.rows, c.channels,
                             c.height, c.width, c.convolves, c.n, c.m};
  const std::vector<int32_t> words = snows::make_order(packed, false);
  if (words.empty()) return {INFINITY, INFINITY};
  const snows::Order o = snows::Order::of_header(words.data()).with_arrays(words.data());
  std::vector<float> x(c.tokens * columns), bias(o.chunks() * snows::Order::kChunk), y(c.tokens * c.rows, kNan);
  for (float& number : x) number = normal();
  for (int64_t row = 0; row < c.rows; ++row) bias[row] = normal();
  const int64_t width = line * o.vectors;
  for (int64_t first = 0; first < c.tokens; first += width) {
    const int64_t count = std::min(width, c.tokens - first), lines = (count + line - 1) / line, taps = o.taps;
    std::vector<float> sums((c.rows + 1) * lines * line, kNan);
    for (int64_t block = 0; block < o.blocks(); ++block) {
      std::vector<float> panel(taps * o.block * width, kNan);  // also behind the last token
      const int64_t channels = std::min(o.block, c.channels - block * o.block);
      for (int64_t tap = 0; tap < taps; ++tap)
        snows::transpose(x.data() + first * columns + tap * c.channels + block * o.block, columns, panel.data() + tap * o.block * width, width,
                         count, channels);
      for (int64_t chunk = 0; chunk < o.chunks(); ++chunk) {
        snows::Part part = snows::part_of(o, chunk, block, o.lines);
        part.vectors = lines, part.lanes = line, part.panel = panel.data(), part.half = count <= 8;
        part.sums = sums.data() + chunk * snows::Order::kChunk * lines * line, part.bias = block == 0 ? bias.data() + chunk * snows::Order::kChunk : nullptr;
        snows::product(part);
      }
    }
    snows::transpose(sums.data(), lines * line, y.data() + first * c.rows, c.rows, c.rows, count);
  }
  Error error;
  for (int64_t token = 0; token < c.tokens; ++token)
    for (int64_t row = 0; row < c.rows; ++row) {
      double exact = bias[row], magnitudes = std::fabs(bias[row]);
      int64_t terms = 1;
      for (int64_t column = 0; column < columns; ++column) {
        const double term = w.dense[row * columns + column] * x[token * columns + column];
        exact += term, magnitudes += std::fabs(term), terms += term != 0;
      }
      error.see(y[token * c.rows + row], exact, magnitudes, terms);
    }
  return error;
}

// How many numbers a transposition puts in the wrong place, or writes where it must not.
int64_t misplaced(int64_t rows, int64_t columns, bool past) {
  std::vector<float> in(rows * (columns + 3)), out(columns * (rows + 5), -1);
  std::iota(in.begin(), in.end(), 0.0f);
  snows::transpose(in.data(), columns + 3, out.data(), rows + 5, rows, columns, past);
  int64_t wrong = 0;
  for (int64_t j = 0; j < columns; ++j)
    for (int64_t i = 0; i < rows + 5; ++i) wrong += out[j * (rows + 5) + i] != (i < rows ? in[i * (columns + 3) + j] : -1);
  return wrong;
}

// How many entries of masks are not those of the n highest, of equal ones the first; and groups whose NaN was not seen.
template <typename T>
int64_t badly_selected() {
  int64_t wrong = 0;
  for (const auto& [n, m] : {std::pair{2, 4}, {1, 4}, {3, 4}, {4, 4}, {2, 5}, {4, 8}, {7, 32}, {5, 40}})
    for (const int64_t columns : {1, 3, 4, 31, 64, 200, 517}) {
      std::vector<T> scores(columns);
      for (T& score : scores) score = T(below(6)) - 2;  // many are equal
      const std::unique_ptr<bool[]> mask(new bool[columns]);
      wrong += snows::select(scores.data(), mask.get(), columns, n, m);
      for (int64_t j = 0; j < columns; ++j) {
        int64_t before = 0;
        for (int64_t i = j / m * m; i < std::min(columns, (j / m + 1) * m); ++i) before += scores[i] > scores[j] || (scores[i] == scores[j] && i < j);
        wrong += mask[j] != (before < n);
      }
      scores[below(columns)] = kNan;
      wrong += !snows::select(scores.data(), mask.get(), columns, n, m);
    }
  return wrong;
}

// How many words are not what a mask of bits, gathered of bools, leaves of them.
template <typename Word>
int64_t badly_masked() {
  constexpr int64_t kBytes = 37;
  std::vector<uint8_t> bools(8 * kBytes), bits(kBytes);
  std::vector<Word> in(8 * kBytes), out(8 * kBytes);
  for (auto& number : bools) number = uint8_t(below(2));
  for (auto& word : in) word = Word(generator());
  snows::gather_bits(bools.data(), bits.data(), kBytes);
  snows::vectorised([&]() SNOWS_INLINE { snows::keep(in.data(), bits.data(), out.data(), 0, kBytes); });
  int64_t wrong = 0;
  for (int64_t i = 0; i < 8 * kBytes; ++i) wrong += out[i] != (bools[i] ? in[i] : 0);
  return wrong;
}

// The steps of conjugate gradients, of one vector and of a row under a mask; the oracle computes from the same vectors in double.
Error step_error() {
  Error error;
  for (const int64_t n : {1, 5, 16, 63, 1000}) {
    std::vector<float> x(n), r(n), p(n), product(n), inverse(n);
    for (auto* vector : {&x, &r, &p, &product, &inverse})
      for (float& number : *vector) number = normal();
    const std::unique_ptr<bool[]> mask(new bool[n]);
    double curvature = 0, magnitudes = 0, positive = 0;
    for (int64_t i = 0; i < n; ++i) {
      mask[i] = i == 0 || below(2), inverse[i] = std::fabs(inverse[i]) + 0.1f;
      curvature += double(p[i]) * product[i], magnitudes += std::fabs(double(p[i]) * product[i]);
    }
    error.see(snows::vectorised([&]() SNOWS_INLINE { return snows::dot(p.data(), product.data(), 0, n); }), curvature, magnitudes, 1);

    auto at = x, rest = r, next = p;
    const double sum = snows::vectorised([&]() SNOWS_INLINE { return snows::step(at.data(), rest.data(), p.data(), product.data(), 0.7f, 0, n); });
    snows::vectorised([&]() SNOWS_INLINE { snows::turn(next.data(), r.data(), -0.3f, 0, n); });
    double squares = 0;
    for (int64_t i = 0; i < n; ++i) {
      error.see(at[i], x[i] + 0.7f * double(p[i]), std::fabs(x[i]) + std::fabs(0.7f * double(p[i])), 1);
      error.see(rest[i], r[i] - 0.7f * double(product[i]), std::fabs(r[i]) + std::fabs(0.7f * double(product[i])), 1);
      error.see(next[i], r[i] - 0.3f * double(p[i]), std::fabs(r[i]) + std::fabs(0.3f * double(p[i])), 1);
      squares += double(rest[i]) * rest[i];
    }
    error.see(sum, squares, squares, 1);

    for (int64_t i = 0; i < n; ++i) product[i] = std::copysign(product[i], p[i]), positive += mask[i] ? double(p[i]) * product[i] : 0;
    at = x, rest = r, next = p;
    const double rz = 2.5, alpha = rz / positive;
    const double left = snows::step_of_row(at.data(), rest.data(), next.data(), product.data(), mask.get(), inverse.data(), n, rz, 0.0);
    double exact_left = 0;
    for (int64_t i = 0; i < n; ++i) {
      const double change = mask[i] ? alpha * product[i] : 0, of_rest = std::fabs(r[i]) + std::fabs(change);
      error.see(at[i], x[i] + alpha * p[i], std::fabs(x[i]) + std::fabs(alpha * p[i]), 2);
      error.see(rest[i], r[i] - change, of_rest, 2);
      exact_left += double(rest[i]) * rest[i] * inverse[i];
    }
    error.see(left, exact_left, exact_left, 2);
    for (int64_t i = 0; i < n; ++i) {
      const double fresh = double(rest[i]) * inverse[i], old = left / rz * p[i];
      error.see(next[i], fresh + old, std::fabs(fresh) + std::fabs(old), 2);
    }
  }
  return error;
}

}  // namespace

snows::Simd snows::simd() { return chosen; }

int main(int count, char** arguments) {
  const std::string name = count > 1 ? arguments[1] : "portable";
  chosen = name == "avx512" ? snows::Simd::avx512 : name == "avx2" ? snows::Simd::avx2 : snows::Simd::portable;
  const struct {
    const char* name;
    int64_t n, m;
    double density;
  } patterns[] = {{"2:4", 2, 4, 0}, {"1:4", 1, 4, 0}, {"3:4", 3, 4, 0}, {"2:5", 2, 5, 0}, {"unstructured 0.5", 0, 0, 0.5}, {"unstructured 0.1", 0, 0, 0.1}};
  bool failed = false;
  const auto report = [&](const char* what, const Error& error) {
    const bool fails = !(error.of_bound <= 1);
    std::printf("%s, %s: largest error %.2e of the sum of magnitudes, %.2f of its bound%s\n", name.c_str(), what, error.largest, error.of_bound,
                fails ? "  FAILED" : "");
    failed |= fails;
  };
  const auto count_wrong = [&](const char* what, int64_t wrong) {
    std::printf("%s, %s: %d wrong%s\n", name.c_str(), what, int(wrong), wrong ? "  FAILED" : "");
    failed |= wrong > 0;
  };
  for (const auto& p : patterns) {
    Error all;
    const auto check = [&](int64_t rows, int64_t channels, int64_t height, int64_t width, bool convolves, int64_t tokens) {
      for (const int64_t line : {16, 8})
        if (line == 16 || snows::simd() != snows::Simd::avx512)
          all.see(product_error({rows, channels, height, width, convolves, p.n, p.m, p.density, tokens}, line));
    };
    for (const int64_t tokens : {1, 7, 8, 9, 16, 31, 33, 48, 65, 97, 130}) check(37, 150, 1, 1, false, tokens);
    check(1, 1, 1, 1, false, 3), check(2, 3, 1, 1, false, 5), check(515, 40, 1, 1, false, 20), check(1030, 12, 1, 1, false, 9);
    check(64, 400, 1, 1, false, 64), check(9, 1025, 1, 1, false, 17);
    check(13, 30, 3, 3, true, 113), check(8, 5, 1, 7, true, 50), check(16, 64, 1, 1, true, 112);
    report(p.name, all);
  }
  int64_t wrong = 0;
  for (const int64_t rows : {1, 3, 4, 8, 15, 16, 35})
    for (const int64_t columns : {1, 4, 7, 16, 33, 50}) wrong += misplaced(rows, columns, false) + misplaced(rows, columns, true);
  count_wrong("transpositions", wrong);
  count_wrong("selections", badly_selected<float>() + badly_selected<double>());
  count_wrong("masked words", badly_masked<uint8_t>() + badly_masked<uint16_t>() + badly_masked<uint32_t>() + badly_masked<uint64_t>());
  report("conjugate gradients", step_error());
  return failed;
}

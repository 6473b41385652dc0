// How the output of a convolution is cut into tiles (sparse_conv2d.cpp).

#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <array>
#include <bit>
#include <limits>
#include <map>
#include <optional>

#include "panels.h"

namespace snows {

constexpr int64_t kLine = 64;       // bytes of a cache line
constexpr int64_t kNear = 5 << 19;  // bytes of input that are rearranged at a time, where it may be so little

inline int64_t parts(int64_t whole, int64_t part) { return (whole + part - 1) / part; }

// Images that are worked on together where they are innermost, or none.
inline int64_t together_of(int64_t images) { return images % 16 == 0 ? 16 : images % 8 == 0 && simd() != Simd::avx512 ? 8 : 0; }

struct Shape {
  int64_t images, channels, height, width, kernel_h, kernel_w, out_h, out_w;
  int64_t stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  int64_t inner;     // 1, or so many images innermost: then `images` counts blocks
  int64_t together;  // images of a block
};

struct Tiles {
  int64_t h, w;              // output pixels of a tile
  int64_t down, across;      // tiles of an image
  int64_t lanes;             // of a line
  bool as_it_stands;         // a line is a pixel of all images, as in memory
  int64_t count, groups;     // of all images (or of blocks of them), and of as many tiles as a line has lanes
  int64_t vectors, strips;   // pixels of a panel, panels in a row of a tile
  int64_t in_h, phase;       // rows of input, and pixels of it of each remainder modulo the stride
  int64_t row, plane;        // lines from one row, one channel to the next

  Tiles(const Shape& s, int64_t down_, int64_t across_, const Order& o) {
    const bool half = s.inner > 1 && s.together == 8;
    const int64_t most = half ? 2 * o.vectors : o.vectors;
    lanes = half ? 8 : o.lanes(), as_it_stands = s.inner == s.together && lanes == s.together;
    h = parts(s.out_h, down_), w = parts(s.out_w, across_);
    down = parts(s.out_h, h), across = parts(s.out_w, w);
    count = s.images * down * across, groups = parts(count, s.inner > 1 ? lanes / s.together : lanes);
    strips = parts(w, most), vectors = parts(w, strips);
    in_h = (h - 1) * s.stride_h + (s.kernel_h - 1) * s.dilation_h + 1;
    phase = parts((w - 1) * s.stride_w + (s.kernel_w - 1) * s.dilation_w + 1, s.stride_w);
    row = parts(s.stride_w * phase, 4) * 4;  // the rearrangement works on four at a time
    plane = in_h * row;
  }
  // Moves the planes apart until the lines that a block reads at once fall on all sets of the first-level cache alike.
  void spread(const Shape& s, int64_t block) {
    int64_t least = std::numeric_limits<int64_t>::max(), best = plane;
    for (int64_t candidate = plane; candidate < plane + 64; candidate += 4) {
      int32_t sets[64] = {};
      for (int64_t c = 0; c < block; ++c)
        for (int64_t i = 0; i < s.kernel_h; ++i)
          for (int64_t x = 0; x < vectors + s.kernel_w - 1; ++x) ++sets[(c * candidate + i * s.dilation_h * row + x) * std::min<int64_t>(lanes, 16) / 16 % 64];
      const int64_t worst = *std::max_element(sets, sets + 64);
      if (worst < least) least = worst, best = candidate;
    }
    plane = best;
  }
  int64_t line(const Shape& s, int64_t x) const { return x % s.stride_w * phase + x / s.stride_w; }
};

// The tiles of the least work, counted in multiply-adds of vectors, or none of which a block's lines have 16-bit numbers.
inline std::optional<Tiles> choose(const Shape& s, const Order& o) {
  std::optional<Tiles> best;
  double least = std::numeric_limits<double>::infinity();
  const int64_t threads = at::get_num_threads();
  const double weights = static_cast<double>(o.entries) / static_cast<double>(o.channels);
  for (int64_t down = 1; down <= std::min(s.out_h, 64L); ++down)
    for (int64_t across = 1; across <= std::min(s.out_w, 64L); ++across) {
      const Tiles t(s, down, across, o);
      // A rough model: what a strip's sums cost, and what it costs to rearrange a line within the near caches and through memory.
      const bool near = s.channels * t.plane * kLine <= kNear;
      const double products = weights * t.h * (t.w + 0.7 * t.strips), moves = (s.inner > 1 ? 30.0 : near ? 80.0 : 185.0) * t.plane;
      const double share = t.groups < threads ? 1.3 * t.groups / threads : parts(t.groups, threads);  // of a thread; a group that is shared costs more
      const double work = share * (products + moves);
      if (work < least && o.block * (t.plane + 64) <= 65536) least = work, best = t;
    }
  if (best) best->spread(s, o.block);
  return best;
}

// The same, remembered: choosing takes as long as a small convolution.
inline const std::optional<Tiles>& chosen(const Shape& s, const Order& o) {
  static thread_local std::map<std::array<int64_t, 22>, std::optional<Tiles>> known;
  const std::array<int64_t, 6> order{o.entries, o.channels, o.block, o.vectors, o.bfloat16, at::get_num_threads()};
  std::array<int64_t, 22> key;
  std::copy_n(std::bit_cast<std::array<int64_t, 16>>(s).begin(), 16, key.begin());
  std::copy_n(order.begin(), 6, key.begin() + 16);
  if (const auto found = known.find(key); found != known.end()) return found->second;
  if (known.size() > 1000) known.clear();  // of a program whose images have ever other sizes
  return known[key] = choose(s, o);
}

}  // namespace snows

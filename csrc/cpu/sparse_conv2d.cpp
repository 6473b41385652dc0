// Packed convolution on the CPU, without unfolding. The output is cut into tiles of equal size, whole images or parts of them,
// and 16 tiles are computed side by side: where the input of 16 tiles stands pixel by pixel, one vector for each, a tap of
// the kernel is nothing but a distance in memory, and every load is aligned. A panel is a few pixels in a row of 16 tiles.
// Padding, stride and dilation happen when the input is rearranged. Where images are innermost in memory, 16 of them at the
// same place are such tiles as they stand, and nothing is transposed. Specification: snows/reference/packed.py, sparse_conv2d.

#include <ATen/Parallel.h>
#include <ATen/ops/conv2d.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <vector>

#include "panels.h"

namespace {

constexpr int64_t kLanes = 16, kLine = 64;  // and bytes of as many floats
constexpr int64_t kNear = 5 << 19;          // bytes of input that are rearranged at a time, where it may be so little

int64_t parts(int64_t whole, int64_t part) { return (whole + part - 1) / part; }

struct Shape {
  int64_t images, channels, height, width, kernel_h, kernel_w, out_h, out_w;
  int64_t stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  int64_t inner;  // 1, or so many images innermost: then `images` counts blocks of 16
};

struct Tiles {
  int64_t h, w;              // output pixels of a tile
  int64_t down, across;      // tiles of an image
  int64_t count, groups;     // of all images, and of 16 tiles each
  int64_t vectors, strips;   // pixels of a panel, panels in a row of a tile
  int64_t in_h, phase;       // rows of input, and pixels of it of each remainder modulo the stride
  int64_t row, plane;        // lines from one row, one channel to the next

  Tiles(const Shape& s, int64_t down_, int64_t across_, int64_t most) {
    h = parts(s.out_h, down_), w = parts(s.out_w, across_);
    down = parts(s.out_h, h), across = parts(s.out_w, w);
    count = s.images * down * across, groups = s.inner > 1 ? count : parts(count, kLanes);
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
          for (int64_t x = 0; x < vectors + s.kernel_w - 1; ++x) ++sets[(c * candidate + i * s.dilation_h * row + x) % 64];
      const int64_t worst = *std::max_element(sets, sets + 64);
      if (worst < least) least = worst, best = candidate;
    }
    plane = best;
  }
  int64_t line(const Shape& s, int64_t x) const { return x % s.stride_w * phase + x / s.stride_w; }
};

// The tiles of the least work, counted in multiply-adds of vectors, or none of which a block's lines have 16-bit numbers.
std::optional<Tiles> choose(const Shape& s, const snows::Order& o) {
  std::optional<Tiles> best;
  double least = std::numeric_limits<double>::infinity();
  const double weights = static_cast<double>(o.entries) / static_cast<double>(o.channels);
  for (int64_t down = 1; down <= std::min(s.out_h, 64L); ++down)
    for (int64_t across = 1; across <= std::min(s.out_w, 64L); ++across) {
      const Tiles t(s, down, across, o.vectors);
      // A rough model: what a strip's sums cost, and what it costs to rearrange a line within the near caches and through memory.
      const bool near = s.channels * t.plane * kLine <= kNear;
      const double products = weights * t.h * (t.w + 0.7 * t.strips), moves = (s.inner > 1 ? 30.0 : near ? 80.0 : 185.0) * t.plane;
      const double work = t.groups * (products + moves);
      if (work < least && o.block * (t.plane + 64) <= 65536) least = work, best = t;
    }
  if (best) best->spread(s, o.block);
  return best;
}

struct Corner {  // of a tile's input; no image for tiles that there are not
  int64_t image, top, left;
};

std::vector<Corner> corners(const Shape& s, const Tiles& t) {
  std::vector<Corner> all;
  auto add = [&](int64_t image, int64_t tile) {
    all.push_back({image, tile / t.across * t.h * s.stride_h - s.pad_h, tile % t.across * t.w * s.stride_w - s.pad_w});
  };
  if (s.inner > 1)  // a group is a block of images; those of one tile side by side, as they are in memory
    for (int64_t group = 0; group < t.groups; ++group) add(group % s.images, group / s.images);
  else
    for (int64_t tile = 0; tile < t.groups * kLanes; ++tile)
      add(tile < t.count ? tile / (t.down * t.across) : -1, tile % (t.down * t.across));
  return all;
}

// One channel of the input of 16 tiles, into `to`; zeros around the images.
void rearrange(const Shape& s, const Tiles& t, const float* in, const Corner* corner, int64_t channel, float* scratch, float* to) {
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    const auto [image, top, left] = corner[lane];
    const int64_t begin = std::max<int64_t>(0, -left), end = std::min(s.stride_w * t.phase, s.width - left);
    float* row = scratch + lane * t.plane;
    for (int64_t y = 0; y < t.in_h; ++y, row += t.row) {
      const float* from = in + ((image * s.channels + channel) * s.height + top + y) * s.width + left;
      if (image < 0 || top + y < 0 || top + y >= s.height || begin >= end) {
        std::fill_n(row, t.row, 0.0f);
      } else if (s.stride_w == 1) {
        std::fill_n(row, begin, 0.0f);
        std::copy(from + begin, from + end, row + begin);
        std::fill(row + end, row + t.row, 0.0f);
      } else {
        std::fill_n(row, t.row, 0.0f);
        for (int64_t x = begin; x < std::min(end, begin + s.stride_w); ++x) {  // one remainder modulo the stride after the other
          float* to_line = row + t.line(s, x);
          for (int64_t i = 0, at = x; at < end; ++i, at += s.stride_w) to_line[i] = from[at];
        }
      }
    }
  }
  snows::transpose(scratch, t.plane, to, kLanes, kLanes, t.in_h * t.row);
}

// The same where images are innermost: `blocks` of 16 images from the corner's on, line by line, the next one's at `apart`.
void rearrange_lines(const Shape& s, const Tiles& t, const float* in, const Corner& corner, int64_t blocks, int64_t channel, float* to, int64_t apart) {
  const auto [block, top, left] = corner;
  const int64_t begin = std::max<int64_t>(0, -left), end = std::max(begin, std::min(s.stride_w * t.phase, s.width - left));
  for (int64_t y = 0; y < t.in_h; ++y, to += t.row * kLanes) {
    const bool inside = top + y >= 0 && top + y < s.height && begin < end;
    for (int64_t b = 0; b < blocks && !(inside && begin == 0 && end == t.row && s.stride_w == 1); ++b) std::fill_n(to + b * apart, t.row * kLanes, 0.0f);
    if (!inside) continue;
    const float* from = in + ((channel * s.height + top + y) * s.width + left) * s.inner + block * kLanes;
    for (int64_t x = begin; x < std::min(end, begin + s.stride_w); ++x)
      for (int64_t i = t.line(s, x), at = x; at < end; ++i, at += s.stride_w)
        for (int64_t b = 0; b < blocks; ++b) std::memcpy(to + b * apart + i * kLanes, from + at * s.inner + b * kLanes, kLine);
  }
}

// A kernel of one pixel, at every pixel: the images are matrices with a row for each channel, and panels are cut out of them.
void one_pixel(const Shape& s, const snows::Order& o, const at::Tensor& bias, c10::string_view activation, const float* in, float* out) {
  const int64_t pixels = s.height * s.width, tokens = s.images * pixels, width = kLanes * o.vectors;
  auto runs = [=](int64_t first, int64_t count, auto&& run) {  // run(where in the panel, image, pixel, how many)
    for (int64_t t = 0, many; t < count; t += many) {
      const int64_t pixel = (first + t) % pixels;
      many = std::min(pixels - pixel, count - t);
      run(t, (first + t) / pixels, pixel, many);
    }
  };
  snows::Panels panels{parts(tokens, width), 1, o.vectors, o.block * width, o.lines, nullptr, nullptr};
  panels.fill = [&](float* scratch, int64_t panel, int64_t, int64_t block, bool) {
    const int64_t first = panel * width, count = std::min(width, tokens - first), padded = parts(count, kLanes) * kLanes;
    const int64_t channel = block * o.block, many = std::min(o.block, s.channels - channel);
    runs(first, count, [&](int64_t at, int64_t image, int64_t pixel, int64_t length) {
      for (int64_t c = 0; c < many; ++c) std::copy_n(in + (image * s.channels + channel + c) * pixels + pixel, length, scratch + c * width + at);
    });
    for (int64_t c = 0; c < many; ++c) std::fill(scratch + c * width + count, scratch + c * width + padded, 0.0f);
    return snows::Source{scratch, padded / kLanes};
  };
  panels.store = [&](const float* sums, int64_t, int64_t panel, int64_t row, int64_t rows) {
    const int64_t first = panel * width, count = std::min(width, tokens - first), stride = parts(count, kLanes) * kLanes;
    runs(first, count, [&](int64_t at, int64_t image, int64_t pixel, int64_t length) {
      for (int64_t r = 0; r < rows; ++r) std::copy_n(sums + r * stride + at, length, out + (image * o.rows + row + r) * pixels + pixel);
    });
  };
  snows::multiply(o, panels, bias, activation);
}

at::Tensor sparse_conv2d(const at::Tensor& input, const at::Tensor& values, const at::Tensor& codes, const std::optional<at::Tensor>& bias_,
                         at::IntArrayRef shape, int64_t n, int64_t m, at::IntArrayRef stride, at::IntArrayRef padding,
                         at::IntArrayRef dilation, c10::string_view activation, const std::optional<at::Tensor>& order_) {
  const at::Tensor bias = snows::widened(bias_);
  const at::Tensor order = order_.value_or(at::Tensor());
  const auto last = at::MemoryFormat::ChannelsLast;
  const auto format = input.is_contiguous(last) && !input.is_contiguous() ? last : at::MemoryFormat::Contiguous;
  const bool inner = input.size(0) % kLanes == 0 && input.permute({1, 2, 3, 0}).is_contiguous() && !input.is_contiguous();
  const auto laid_out = [&](const at::Tensor& y) {  // as the input is
    return inner ? y.permute({1, 2, 3, 0}).contiguous().permute({3, 0, 1, 2}) : y.contiguous(format);
  };
  const bool lone = shape[2] * shape[3] == 1 && padding[0] + padding[1] == 0;  // a kernel of one pixel reads only those it keeps
  if (lone && stride[0] * stride[1] > 1) {
    const at::Tensor kept = laid_out(input.slice(2, 0, std::nullopt, stride[0]).slice(3, 0, std::nullopt, stride[1]));
    return laid_out(sparse_conv2d(kept, values, codes, bias_, shape, n, m, {1, 1}, padding, dilation, activation, order_));
  }
  const bool takes = order.defined() && order.numel() > 0 && input.scalar_type() == values.scalar_type();
  const at::Tensor x = takes ? (inner ? input : input.contiguous()).to(at::kFloat) : input;
  Shape s{x.size(0), x.size(1), x.size(2), x.size(3), shape[2], shape[3], 0, 0, stride[0], stride[1], padding[0], padding[1], dilation[0], dilation[1], 1};
  if (inner) s.images /= kLanes, s.inner = x.size(0);
  s.out_h = (s.height + 2 * s.pad_h - (s.kernel_h - 1) * s.dilation_h - 1) / s.stride_h + 1;
  s.out_w = (s.width + 2 * s.pad_w - (s.kernel_w - 1) * s.dilation_w - 1) / s.stride_w + 1;
  const std::optional<Tiles> tiles = takes && !lone ? choose(s, snows::Order::read(order)) : std::nullopt;
  if (!takes || !(lone || tiles))
    return laid_out(snows::activate(
        at::conv2d(input.contiguous(format), snows::unpack(values, codes, shape, n, m), bias_, stride, padding, dilation), activation));

  const snows::Order o = snows::Order::read(order);
  at::Tensor y = inner ? at::empty({shape[0], s.out_h, s.out_w, s.inner}, x.options()).permute({3, 0, 1, 2})
                       : at::empty({x.size(0), shape[0], s.out_h, s.out_w}, x.options());
  const auto given = [&](const at::Tensor& y) { return (inner ? y : y.contiguous(format)).to(input.scalar_type()); };
  const float* in = x.const_data_ptr<float>();
  float* out = y.mutable_data_ptr<float>();
  if (lone) {
    if (inner) s.images = 1, s.width *= s.inner;  // one wide image
    one_pixel(s, o, bias, activation, in, out);
    return given(y);
  }
  const Tiles t = *tiles;
  std::vector<uint16_t> line_of(s.kernel_h * s.kernel_w * o.block * o.vectors), lines(o.steps);
  for (int64_t tap = 0; tap < s.kernel_h * s.kernel_w; ++tap)
    for (int64_t c = 0; c < o.block; ++c)
      line_of[(tap * o.block + c) * o.vectors] = static_cast<uint16_t>(
          c * t.plane + tap / s.kernel_w * s.dilation_h * t.row + t.line(s, tap % s.kernel_w * s.dilation_w));
  for (int64_t i = 0; i < o.steps; ++i) lines[i] = line_of[o.lines[i]];

  const int64_t rows = shape[0], pixels = s.out_h * s.out_w, group_size = s.channels * t.plane * kLanes;
  const int64_t for_all = parts(4 * at::get_num_threads(), t.h * t.strips);  // groups that give every thread something to do
  const int64_t together = std::min(std::max(kNear / (group_size * 4), for_all), std::max<int64_t>(1, t.groups));
  static thread_local snows::Scratch memory;
  float* arranged = memory.floats(together * group_size);
  const std::vector<Corner> corner = corners(s, t);
  // Strips of a row are stored together while their sums fit in the second-level cache: fewer cache lines are written twice.
  const int64_t strips = std::clamp<int64_t>((128 << 10) / (std::min(rows, 2 * snows::Order::kChunk) * t.vectors * kLanes), 1, t.strips);
  const int64_t across = parts(t.strips, strips);
  const int64_t blocks = inner ? std::min(together, s.images) : 1;  // of images that are worked on side by side
  for (int64_t first = 0, groups; first < t.groups; first += groups) {
    groups = inner && blocks < s.images ? std::min(blocks, s.images - first % s.images) : std::min(together / blocks * blocks, t.groups - first);
    const int64_t abreast = std::min(blocks, groups);
    at::parallel_for(0, inner ? s.channels : groups * s.channels, 1, [&](int64_t begin, int64_t end) {
      std::vector<float> scratch(inner ? 0 : kLanes * t.plane);
      for (int64_t i = begin; i < end; ++i)
        if (inner)
          for (int64_t group = 0; group < groups; group += abreast)
            rearrange_lines(s, t, in, corner[first + group], abreast, i, arranged + (group * s.channels + i) * t.plane * kLanes, group_size);
        else
          rearrange(s, t, in, corner.data() + (first + i / s.channels) * kLanes, i % s.channels, scratch.data(), arranged + i * t.plane * kLanes);
    });
    struct Place {
      int64_t group, row, left;
    };
    const auto place = [&](int64_t panel) {  // panels that are written side by side follow each other
      const int64_t rest = panel / abreast;
      return Place{rest / across / t.h * abreast + panel % abreast, rest / across % t.h, rest % across * strips * t.vectors};
    };
    snows::Panels panels{groups * t.h * across, strips, t.vectors, 0, lines.data(), nullptr, nullptr};
    panels.fill = [&](float*, int64_t panel, int64_t strip, int64_t block, bool) {
      const auto [group, row, start] = place(panel);
      const int64_t left = start + strip * t.vectors, line = (group * s.channels + block * o.block) * t.plane + row * s.stride_h * t.row + left;
      return snows::Source{arranged + line * kLanes, std::clamp<int64_t>(t.w - left, 0, t.vectors)};
    };
    panels.store = [&](const float* sums, int64_t step, int64_t panel, int64_t row, int64_t many) {
      const auto [local, down, left] = place(panel);
      const int64_t group = first + local, width = strips * t.vectors, stride = width + 8;
      if (inner) {
        const int64_t block = group % s.images, tile = group / s.images, h = tile / t.across * t.h + down, w = tile % t.across * t.w + left;
        const int64_t count = h < s.out_h ? std::clamp<int64_t>(std::min(t.w - left, s.out_w - w), 0, width) : 0;
        for (int64_t r = 0; r < many; ++r) {
          float* to_row = out + (((row + r) * s.out_h + h) * s.out_w + w) * s.inner + block * kLanes;
          for (int64_t start = 0; start < count; start += t.vectors, sums += step) {
            const int64_t vectors = std::min(t.w - left - start, t.vectors);
            for (int64_t x = 0; x < std::min(vectors, count - start); ++x)
              std::memcpy(to_row + (start + x) * s.inner, sums + (r * vectors + x) * kLanes, kLine);
          }
          sums -= parts(count, t.vectors) * step;
        }
        return;
      }
      std::vector<float> pixels_of(kLanes * stride);
      float* to[kLanes];
      int64_t length[kLanes];
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        const int64_t tile = group * kLanes + lane, image = tile / (t.down * t.across);
        const int64_t h = tile / t.across % t.down * t.h + down, w = tile % t.across * t.w + left;
        to[lane] = out + (image * rows + row) * pixels + h * s.out_w + w;
        length[lane] = tile < t.count && h < s.out_h ? std::clamp<int64_t>(std::min(t.w - left, s.out_w - w), 0, width) : 0;
      }
      for (int64_t r = 0; r < many; ++r) {
        for (int64_t strip = 0; strip < strips; ++strip) {  // 8 pixels, of which some may be the next row's: they are overwritten, or not copied
          const int64_t vectors = std::clamp<int64_t>(t.w - left - strip * t.vectors, 0, t.vectors);
          snows::transpose(sums + strip * step + r * 16 * vectors, kLanes, pixels_of.data() + strip * t.vectors, stride, 8, kLanes);
        }
        for (int64_t lane = 0; lane < kLanes; ++lane)
          if (length[lane] > 0) std::copy_n(pixels_of.data() + lane * stride, length[lane], to[lane] + r * pixels);
      }
    };
    snows::multiply(o, panels, bias, activation);
  }
  return given(y);
}

}  // namespace

TORCH_LIBRARY_IMPL(snows, CPU, library) { library.impl("sparse_conv2d", &sparse_conv2d); }

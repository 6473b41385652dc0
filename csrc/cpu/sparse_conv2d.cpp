// Packed convolution on the CPU, without unfolding. The output is cut into tiles of equal size, whole images or parts of them,
// and 16 tiles are computed side by side: where the input of 16 tiles stands pixel by pixel, one vector for each, a tap of
// the kernel is nothing but a distance in memory, and every load is aligned. A panel is a few pixels in a row of 16 tiles.
// Padding, stride and dilation happen when the input is rearranged. Where images are innermost in memory, 16 of them at the
// same place are such tiles as they stand, and nothing is transposed; so are 8 where a vector is no longer, and lines are half as
// long then. Where the processor multiplies bfloat16, a line of that type holds 32 tiles, or twice 16 images.
// Specification: snows/reference/packed.py, sparse_conv2d.

#include <ATen/Parallel.h>
#include <ATen/ops/conv2d.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

#include "panels.h"
#include "tiles.h"

namespace {

using snows::Shape, snows::Tiles, snows::parts, snows::kNear;

template <typename T>
constexpr int64_t kLanes = snows::kLine / sizeof(T);  // tiles side by side in a cache line of activations

struct Corner {  // of a tile's input; no image for tiles that there are not
  int64_t image, top, left;
};

// Of as many tiles as there are lanes in all groups; of blocks of images, those of one tile side by side, as they are in memory.
std::vector<Corner> corners(const Shape& s, const Tiles& t, int64_t lanes) {
  const int64_t many = s.inner > 1 ? t.count : t.groups * lanes, tiles = t.down * t.across;
  std::vector<Corner> all;
  for (int64_t i = 0; i < many; ++i) {
    const int64_t image = i >= t.count ? -1 : s.inner > 1 ? i % s.images : i / tiles, tile = s.inner > 1 ? i / s.images : i % tiles;
    all.push_back({image, tile / t.across * t.h * s.stride_h - s.pad_h, tile % t.across * t.w * s.stride_w - s.pad_w});
  }
  return all;
}

// One channel of the input of a group's tiles, into `to`; zeros around the images.
template <typename T>
void rearrange(const Shape& s, const Tiles& t, const T* in, const Corner* corner, int64_t channel, T* scratch, T* to) {
  if (s.stride_w == 1 && snows::simd() == snows::Simd::avx512) {
    snows::Piece pieces[kLanes<T>];
    for (int64_t y = 0; y < t.in_h; ++y) {
      for (int64_t lane = 0; lane < kLanes<T>; ++lane) {
        const auto [image, top, left] = corner[lane];
        const bool inside = image >= 0 && top + y >= 0 && top + y < s.height;
        pieces[lane] = {in + ((image * s.channels + channel) * s.height + top + y) * s.width + left, -left, inside ? s.width - left : 0};
      }
      snows::lines_of_pieces(pieces, t.row, sizeof(T), reinterpret_cast<float*>(to + y * t.row * kLanes<T>));
    }
    return;
  }
  const T zero(0.0f);
  for (int64_t lane = 0; lane < kLanes<T>; ++lane) {
    const auto [image, top, left] = corner[lane];
    const int64_t begin = std::max<int64_t>(0, -left), end = std::min(s.stride_w * t.phase, s.width - left);
    T* row = scratch + lane * t.plane;
    for (int64_t y = 0; y < t.in_h; ++y, row += t.row) {
      const T* from = in + ((image * s.channels + channel) * s.height + top + y) * s.width + left;
      if (image < 0 || top + y < 0 || top + y >= s.height || begin >= end) {
        std::fill_n(row, t.row, zero);
      } else if (s.stride_w == 1) {
        std::fill_n(row, begin, zero);
        std::copy(from + begin, from + end, row + begin);
        std::fill(row + end, row + t.row, zero);
      } else {
        std::fill_n(row, t.row, zero);
        for (int64_t x = begin; x < std::min(end, begin + s.stride_w); ++x) {  // one remainder modulo the stride after the other
          T* to_line = row + t.line(s, x);
          for (int64_t i = 0, at = x; at < end; ++i, at += s.stride_w) to_line[i] = from[at];
        }
      }
    }
  }
  const auto words = [](T* numbers) { return reinterpret_cast<float*>(numbers); };
  const int64_t per_word = 4 / sizeof(T), lines = t.in_h * t.row;  // pixels that are transposed as one
  for (int64_t lane = 0; lane < kLanes<T>; lane += 16)
    snows::transpose(words(scratch + lane * t.plane), t.plane / per_word, words(to) + lane, kLanes<T>, 16, lines / per_word);
  if (per_word == 2) snows::part_columns(words(to), lines / 2, 1);
}

void give(const float* sums, int64_t count, float* out) { std::copy_n(sums, count, out); }
void give(const float* sums, int64_t count, at::BFloat16* out) { snows::round_row(sums, count, out); }

// The images of a block, or zeros, into a line that has no others, or into one of its halves.
template <int64_t together>
void put(const float* from, float* line, int64_t) { from ? std::copy_n(from, together, line) : std::fill_n(line, together, 0.0f); }
template <int64_t together>
void put(const at::BFloat16* from, at::BFloat16* line, int64_t half) {
  for (int64_t i = 0; i < 16; i += 4)
    from ? std::copy_n(from + i, 4, line + 2 * i + 4 * half) : std::fill_n(line + 2 * i + 4 * half, 4, at::BFloat16(0.0f));
}

// The same where images are innermost: blocks of them from the corner's on, line by line, into the lines (and halves) at `to`.
template <int64_t together, typename T>
void rearrange_lines(const Shape& s, const Tiles& t, const T* in, const Corner& corner, int64_t channel, const std::vector<std::pair<T*, int64_t>>& to) {
  const auto [block, top, left] = corner;
  const int64_t begin = std::max<int64_t>(0, -left), end = std::max(begin, std::min(s.stride_w * t.phase, s.width - left));
  for (int64_t y = 0; y < t.in_h; ++y) {
    const int64_t row = y * t.row * t.lanes;
    const bool inside = block >= 0 && top + y >= 0 && top + y < s.height && begin < end;
    const auto clear = [&](int64_t first, int64_t last) {
      for (const auto& [place, half] : to)
        for (int64_t i = first; i < last; ++i) put<together>(static_cast<const T*>(nullptr), place + row + i * t.lanes, half);
    };
    clear(0, inside && s.stride_w == 1 ? begin : t.row);
    if (!inside) continue;
    if (s.stride_w == 1) clear(end, t.row);
    const T* from = in + ((channel * s.height + top + y) * s.width + left) * s.inner + block * together;
    if (s.stride_w == 1 && t.as_it_stands) {
      std::copy_n(from + begin * together, (end - begin) * together, to[0].first + row + begin * together);
      continue;
    }
    for (int64_t x = begin; x < std::min(end, begin + s.stride_w); ++x)
      for (int64_t i = t.line(s, x), at = x; at < end; ++i, at += s.stride_w)
        for (size_t b = 0; b < to.size(); ++b) put<together>(from + at * s.inner + b * together, to[b].first + row + i * t.lanes, to[b].second);
  }
}

// A kernel of one pixel, at every pixel: the images are matrices with a row for each channel, and panels are cut out of them.
template <typename T>
void one_pixel(const Shape& s, const snows::Order& o, const at::Tensor& bias, c10::string_view activation, const T* in, T* out) {
  const int64_t pixels = s.height * s.width, tokens = s.images * pixels, width = kLanes<T> * o.vectors;
  auto runs = [=](int64_t first, int64_t count, auto&& run) {  // run(where in the panel, image, pixel, how many)
    for (int64_t t = 0, many; t < count; t += many) {
      const int64_t pixel = (first + t) % pixels;
      many = std::min(pixels - pixel, count - t);
      run(t, (first + t) / pixels, pixel, many);
    }
  };
  snows::Panels panels{parts(tokens, width), 1, o.vectors, o.lanes(), o.block * o.vectors * 16, o.lines, nullptr, nullptr};
  panels.fill = [&](float* memory, int64_t panel, int64_t, int64_t block, bool) {
    T* scratch = reinterpret_cast<T*>(memory);
    const int64_t first = panel * width, count = std::min(width, tokens - first), padded = parts(count, kLanes<T>) * kLanes<T>;
    const int64_t channel = block * o.block, many = std::min(o.block, s.channels - channel);
    runs(first, count, [&](int64_t at, int64_t image, int64_t pixel, int64_t length) {
      for (int64_t c = 0; c < many; ++c) std::copy_n(in + (image * s.channels + channel + c) * pixels + pixel, length, scratch + c * width + at);
    });
    for (int64_t c = 0; c < many; ++c) std::fill(scratch + c * width + count, scratch + c * width + padded, T(0.0f));
    if (o.bfloat16) snows::interleave_halves(memory, many * o.vectors);
    return snows::Source{scratch, padded / kLanes<T>};
  };
  panels.store = [&](const float* sums, int64_t, int64_t panel, int64_t row, int64_t rows) {
    const int64_t first = panel * width, count = std::min(width, tokens - first), stride = parts(count, kLanes<T>) * kLanes<T>;
    runs(first, count, [&](int64_t at, int64_t image, int64_t pixel, int64_t length) {
      for (int64_t r = 0; r < rows; ++r) give(sums + r * stride + at, length, out + (image * o.rows + row + r) * pixels + pixel);
    });
  };
  snows::multiply(o, panels, bias, activation);
}

// A kernel of more than one pixel: tiles rearranged so that panels are pieces of them.
template <typename T>
void convolve(const Shape& s, const Tiles& t, const snows::Order& o, const at::Tensor& bias, c10::string_view activation, const T* in, T* out) {
  std::vector<uint16_t> line_of(s.kernel_h * s.kernel_w * o.block * o.vectors), lines(o.steps);
  for (int64_t tap = 0; tap < s.kernel_h * s.kernel_w; ++tap)
    for (int64_t c = 0; c < o.block; ++c)
      line_of[(tap * o.block + c) * o.vectors] = static_cast<uint16_t>(
          c * t.plane + tap / s.kernel_w * s.dilation_h * t.row + t.line(s, tap % s.kernel_w * s.dilation_w));
  for (int64_t i = 0; i < o.steps; ++i) lines[i] = line_of[o.lines[i]];

  const int64_t rows = o.rows, pixels = s.out_h * s.out_w;
  const bool inner = s.inner > 1;
  const int64_t for_all = parts(4 * at::get_num_threads(), t.h * t.strips);  // groups that give every thread something to do
  const int64_t together = std::min(std::max(kNear / (s.channels * t.plane * t.lanes * int64_t(sizeof(T))), for_all), std::max<int64_t>(1, t.groups / at::get_num_threads()));
  const std::vector<Corner> corner = corners(s, t, t.lanes);
  // Strips of a row are stored together while their sums fit in the second-level cache: fewer cache lines are written twice.
  const int64_t strips = std::clamp<int64_t>((128 << 10) / (std::min(rows, 2 * snows::Order::kChunk) * t.vectors * t.lanes), 1, t.strips);
  const int64_t across = parts(t.strips, strips);
  // Where images are innermost, blocks of them are worked on side by side, and a line has room for one or two.
  const int64_t halves = inner ? t.lanes / s.together : 1, units = inner ? t.count : t.groups;
  const int64_t blocks = inner ? std::min(together * halves, s.images) : 1;
  const auto work = [&](int64_t first, int64_t many) {
    static thread_local snows::Scratch memory;
    T* arranged = reinterpret_cast<T*>(memory.floats(together * s.channels * t.plane * t.lanes * sizeof(T) / sizeof(float)));
    const int64_t groups = parts(many, halves), beside = std::min(parts(blocks, halves), groups), abreast = groups % beside ? 1 : beside;
    at::parallel_for(0, inner ? s.channels : groups * s.channels, 1, [&](int64_t begin, int64_t end) {
      std::vector<T> scratch(inner ? 0 : kLanes<T> * t.plane);
      std::vector<std::pair<T*, int64_t>> to;
      for (int64_t i = begin; i < end; ++i) {
        const auto place = [&](int64_t unit) { return arranged + (unit / halves * s.channels + i) * t.plane * t.lanes; };
        for (int64_t unit = 0, count; inner && unit < groups * halves; unit += count) {
          count = unit < many ? std::min(blocks, many - unit) : 1;  // a line's second half may have no images
          to.clear();
          for (int64_t b = 0; b < count; ++b) to.emplace_back(place(unit + b), (unit + b) % halves);
          (s.together == 8 ? rearrange_lines<8, T> : rearrange_lines<16, T>)(s, t, in, unit < many ? corner[first + unit] : Corner{-1, 0, 0}, i, to);
        }
        if (!inner) rearrange(s, t, in, corner.data() + (first + i / s.channels) * kLanes<T>, i % s.channels, scratch.data(), arranged + i * t.plane * kLanes<T>);
      }
    });
    struct Place {
      int64_t group, row, left;
    };
    const auto place = [&](int64_t panel) {  // panels that are written side by side follow each other
      const int64_t rest = panel / abreast;
      return Place{rest / across / t.h * abreast + panel % abreast, rest / across % t.h, rest % across * strips * t.vectors};
    };
    snows::Panels panels{groups * t.h * across, strips, t.vectors, t.lanes, 0, lines.data(), nullptr, nullptr};
    panels.fill = [&](float*, int64_t panel, int64_t strip, int64_t block, bool) {
      const auto [group, row, start] = place(panel);
      const int64_t left = start + strip * t.vectors, line = (group * s.channels + block * o.block) * t.plane + row * s.stride_h * t.row + left;
      return snows::Source{arranged + line * t.lanes, std::clamp<int64_t>(t.w - left, 0, t.vectors)};
    };
    panels.store = [&](const float* sums, int64_t step, int64_t panel, int64_t row, int64_t rows_here) {
      const auto [local, down, left] = place(panel);
      const int64_t width = strips * t.vectors, stride = width + 8;
      for (int64_t half = 0; inner && half < halves && local * halves + half < many; ++half) {
        const int64_t unit = first + local * halves + half, block = unit % s.images, tile = unit / s.images;
        const int64_t h = tile / t.across * t.h + down, w = tile % t.across * t.w + left;
        const int64_t count = h < s.out_h ? std::clamp<int64_t>(std::min(t.w - left, s.out_w - w), 0, width) : 0;
        for (int64_t r = 0; r < rows_here; ++r) {
          T* to_row = out + (((row + r) * s.out_h + h) * s.out_w + w) * s.inner + block * s.together;
          for (int64_t strip = 0; strip * t.vectors < count; ++strip) {
            const int64_t start = strip * t.vectors, vectors = std::min(t.w - left - start, t.vectors);
            const float* from = sums + strip * step + r * vectors * t.lanes + half * s.together;
            const int64_t many = std::min(vectors, count - start), run = t.as_it_stands ? many : 1;
            for (int64_t x = 0; x < many; x += run) give(from + x * t.lanes, run * s.together, to_row + (start + x) * s.inner);
          }
        }
      }
      if (inner) return;
      std::vector<float> pixels_of(kLanes<T> * stride);
      T* to[kLanes<T>];
      int64_t length[kLanes<T>];
      for (int64_t lane = 0; lane < kLanes<T>; ++lane) {
        const int64_t tile = (first + local) * kLanes<T> + lane, image = tile / (t.down * t.across);
        const int64_t h = tile / t.across % t.down * t.h + down, w = tile % t.across * t.w + left;
        to[lane] = out + (image * rows + row) * pixels + h * s.out_w + w;
        length[lane] = tile < t.count && h < s.out_h ? std::clamp<int64_t>(std::min(t.w - left, s.out_w - w), 0, width) : 0;
      }
      for (int64_t r = 0; r < rows_here; ++r) {
        for (int64_t strip = 0; strip < strips; ++strip) {  // 8 pixels, of which some may be the next row's: they are overwritten, or not copied
          const int64_t vectors = std::clamp<int64_t>(t.w - left - strip * t.vectors, 0, t.vectors);
          snows::transpose(sums + strip * step + r * kLanes<T> * vectors, kLanes<T>, pixels_of.data() + strip * t.vectors, stride, 8, kLanes<T>);
        }
        for (int64_t lane = 0; lane < kLanes<T>; ++lane)
          if (length[lane] > 0) give(pixels_of.data() + lane * stride, length[lane], to[lane] + r * pixels);
      }
    };
    snows::multiply(o, panels, bias, activation);
  };
  std::vector<std::pair<int64_t, int64_t>> portions;  // the first, and how many are arranged at a time
  for (int64_t first = 0, many; first < units; first += many) {
    many = inner && blocks < s.images ? std::min(blocks, s.images - first % s.images) : std::min(together * halves / blocks * blocks, units - first);
    portions.emplace_back(first, many);
  }
  // A thread multiplies best what it has arranged itself; where there is not enough of it for all, they share each portion.
  const int64_t count = portions.size(), threads = at::get_num_threads();
  if (count < threads) {
    for (const auto& [first, many] : portions) work(first, many);
    return;
  }
  std::atomic<int64_t> taken{0};
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t i; (i = taken.fetch_add(1)) < count;) work(portions[i].first, portions[i].second);
  });
}

at::Tensor sparse_conv2d(const at::Tensor& input, const at::Tensor& values_, const at::Tensor& codes_, const std::optional<at::Tensor>& bias_,
                         at::IntArrayRef shape, int64_t n, int64_t m, at::IntArrayRef stride, at::IntArrayRef padding,
                         at::IntArrayRef dilation, c10::string_view activation, const std::optional<at::Tensor>& order_) {
  snows::check_packed("sparse_conv2d", values_, codes_, shape, n, m, 4);
  snows::check_bias("sparse_conv2d", bias_, shape[0], values_);
  snows::check_channels("sparse_conv2d", input, 1, 4, shape[1], values_);
  snows::check_pairs("sparse_conv2d", input, shape, stride, padding, dilation);
  snows::check_activation("sparse_conv2d", activation);
  const at::Tensor values = values_.contiguous(), codes = codes_.contiguous();
  const at::Tensor bias = snows::widened(bias_);
  const at::Tensor order = order_.value_or(at::Tensor());
  const auto last = at::MemoryFormat::ChannelsLast;
  const auto format = input.is_contiguous(last) && !input.is_contiguous() ? last : at::MemoryFormat::Contiguous;
  const bool innermost = input.size(0) % 8 == 0 && input.permute({1, 2, 3, 0}).is_contiguous() && !input.is_contiguous();
  const auto laid_out = [&](const at::Tensor& y) {  // as the input is
    return innermost ? y.permute({1, 2, 3, 0}).contiguous().permute({3, 0, 1, 2}) : y.contiguous(format);
  };
  const bool lone = shape[2] * shape[3] == 1 && padding[0] + padding[1] == 0;  // a kernel of one pixel reads only those it keeps
  if (lone && stride[0] * stride[1] > 1) {
    const at::Tensor kept = laid_out(input.slice(2, 0, std::nullopt, stride[0]).slice(3, 0, std::nullopt, stride[1]));
    return laid_out(sparse_conv2d(kept, values, codes, bias_, shape, n, m, {1, 1}, padding, dilation, activation, order_));
  }
  const bool takes = order.defined() && order.numel() > 0 && input.scalar_type() == values.scalar_type();
  Shape s{input.size(0), input.size(1), input.size(2), input.size(3), shape[2], shape[3], 0, 0, stride[0], stride[1], padding[0], padding[1], dilation[0], dilation[1], 1, snows::together_of(input.size(0))};
  const bool inner = innermost && s.together > 0;
  if (inner) s.images /= s.together, s.inner = input.size(0);
  s.out_h = (s.height + 2 * s.pad_h - (s.kernel_h - 1) * s.dilation_h - 1) / s.stride_h + 1;
  s.out_w = (s.width + 2 * s.pad_w - (s.kernel_w - 1) * s.dilation_w - 1) / s.stride_w + 1;
  const std::optional<snows::Order> read = takes ? std::optional(snows::read_order("sparse_conv2d", order, values, codes, shape)) : std::nullopt;
  const std::optional<Tiles> tiles = takes && !lone ? snows::chosen(s, *read) : std::nullopt;
  if (!takes || !(lone || tiles))
    return laid_out(snows::activate(
        at::conv2d(input.contiguous(format), snows::unpack(values, codes, shape, n, m), bias_, stride, padding, dilation), activation));

  const snows::Order& o = *read;
  const at::Tensor x = (inner ? input : input.contiguous()).to(o.bfloat16 ? at::kBFloat16 : at::kFloat);
  at::Tensor y = inner ? at::empty({shape[0], s.out_h, s.out_w, s.inner}, x.options()).permute({3, 0, 1, 2})
                       : at::empty({x.size(0), shape[0], s.out_h, s.out_w}, x.options());
  const auto given = [&](const at::Tensor& y) { return (inner ? y : laid_out(y)).to(input.scalar_type()); };
  const auto run = [&](const auto* in, auto* out) {
    if (!lone) return convolve(s, *tiles, o, bias, activation, in, out);
    if (inner) s.images = 1, s.width *= s.inner;  // one wide image
    one_pixel(s, o, bias, activation, in, out);
  };
  if (o.bfloat16)
    run(x.const_data_ptr<at::BFloat16>(), y.mutable_data_ptr<at::BFloat16>());
  else
    run(x.const_data_ptr<float>(), y.mutable_data_ptr<float>());
  return given(y);
}

}  // namespace

TORCH_LIBRARY_IMPL(snows, CPU, library) { library.impl("sparse_conv2d", &sparse_conv2d); }

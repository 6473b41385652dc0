// The instructions of csrc/cuda/tensor_core.cuh on a CPU, from the PTX manual's tables (PTX ISA 9.7.14.5 ldmatrix, 9.7.14.6 mma.sp, 9.7.9.25
// cp.async, 9.7.15 wgmma) and not from the kernels: which lane holds which element is written down here a second time.
//
// What may differ from run to run on a GPU is chosen for the worst: a copy lands when it is begun or only when it is waited for, a
// warpgroup's product reads and writes its registers and shared memory only when it is waited for or, where copies are late, when it is
// begun; the first warp or the last runs ahead. Shared memory begins as NaN. A bank conflict of ldmatrix, an illegal code, a line that is not
// on 16 bytes or not within what may be read, warps of a group that multiply by different tokens end the run.

#pragma once

#include <utility>

#include "cuda_on_host.h"

#include "memory.cuh"

struct __half {
  uint16_t bits;
};
struct __nv_bfloat16 {
  uint16_t bits;
};

namespace emulation {

inline bool late;  // copies land when they are waited for, products are done when they begin; else the other way round
inline thread_local std::vector<snows::Line> shared, published;  // as threads see it; as wgmma sees it, where copies are late
constexpr uint32_t SHARED_FROM = 1024 + 48;                      // its address: on 16 bytes and no more
inline std::vector<std::pair<const void*, size_t>> readable;  // what copies may read, in bytes

struct Copy {
  snows::Line* to;
  snows::Line line;
};
struct Copies {  // of a thread: closed groups and the open one, and what has landed and is not published
  std::vector<std::vector<Copy>> groups;
  std::vector<Copy> open;
  std::vector<snows::Line*> landed;
};
inline thread_local std::vector<Copies> copies;

struct Operands {  // what the lanes bring where their warp meets
  snows::Line a, b;
  float* sum;
  uint32_t codes;
  const snows::Line* row;
  snows::Line* result;
  int what;
  const snows::Line* late_a;  // of wgmma: read when it is done
  const uint32_t* late_codes;
  uint64_t tokens;
};
inline thread_local std::vector<Operands> operands;

struct Products {  // of a warp: closed groups and the open one; all that it began
  std::vector<std::vector<std::function<void()>>> groups;
  std::vector<std::function<void()>> open;
  std::vector<std::pair<uint64_t, int>> begun;
};
inline thread_local std::vector<Products> products;
inline thread_local std::vector<char> ready;  // a thread's registers
enum Meeting { LDMATRIX = -1, COMMIT = -2, WAIT = -3 };

// Bring this thread's operands; the last of the warp does the work for all.
template <typename F>
void meet(const Operands& own, F work) {
  const unsigned self = threadIdx.x, first = self / WARP * WARP;
  operands[self] = own;
  bool last = true;
  for (unsigned t = first; t < first + WARP; ++t) last &= t == self || block.states[t] == IN_WARP;
  if (!last) return leave(IN_WARP);
  for (unsigned t = first; t < first + WARP; ++t) {
    if (operands[t].what != own.what) fail("a warp meets at two instructions");
    block.states[t] = RUNS;
  }
  work(&operands[first]);
}

inline float number(uint16_t bits, __half) {
  _Float16 x;
  memcpy(&x, &bits, sizeof x);
  return x;
}
inline float number(uint16_t bits, __nv_bfloat16) {
  const uint32_t wide = uint32_t(bits) << 16;
  float x;
  memcpy(&x, &wide, sizeof x);
  return x;
}
inline uint16_t half_of(const snows::Line& line, int i) { return line.word[i / 2] >> 16 * (i % 2); }

struct Sparse {  // 16x32, 2:4: what is not kept does not count, whatever stands opposite: a zero is no factor there
  float value[16][32] = {};
  bool kept[16][32] = {};

  float times(int row, const float* column) const {
    float total = 0;
    for (int k = 0; k < 32; ++k)
      if (kept[row][k]) total += value[row][k] * column[k];
    return total;
  }
};

// From the lanes of a warp. With g = lane / 4, t = lane % 4:
//   element i of a lane's values: row g, or g + 8 for i in 2, 3, 6, 7; stored column 2 t + i % 2, 8 more for i >= 4
//   codes: of lanes t = 2 selector (columns 0..15) and 2 selector + 1 (16..31): low half row g, high half row g + 8, a nibble a group
template <typename T>
Sparse sparse(const Operands* lanes, int selector) {
  Sparse a;
  for (int l = 0; l < 32; ++l)
    for (int i = 0; i < 8; ++i) {
      const int row = l / 4 + (i % 4 < 2 ? 0 : 8), stored = l % 4 * 2 + i % 2 + (i < 4 ? 0 : 8), group = stored / 2;
      const uint32_t word = lanes[l / 4 * 4 + 2 * selector + group / 4].codes, nibble = word >> (row < 8 ? 0 : 16) >> 4 * (group % 4) & 15;
      if ((nibble & 3) >= nibble >> 2) fail("an illegal code");
      const int column = 4 * group + (stored % 2 == 0 ? nibble & 3 : nibble >> 2);
      a.value[row][column] = number(half_of(lanes[l].a, i), T()), a.kept[row][column] = true;
    }
  return a;
}

}  // namespace emulation

namespace snows {

inline float widen(__half x) { return emulation::number(x.bits, x); }
inline float widen(__nv_bfloat16 x) { return emulation::number(x.bits, x); }
template <> inline __half narrow(float x) {
  const auto rounded = static_cast<_Float16>(x);
  __half h;
  memcpy(&h, &rounded, sizeof h);
  return h;
}
template <> inline __nv_bfloat16 narrow(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return {x != x ? uint16_t(0x7FFF) : uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};
}

inline Line* shared_memory() { return emulation::shared.data(); }

inline void copy_async(Line* to, const void* from, bool there = true) {
  const auto on_16 = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % sizeof(Line) == 0; };
  const auto within = [](const void* p, const void* base, size_t bytes) {
    const uintptr_t offset = reinterpret_cast<uintptr_t>(p) - reinterpret_cast<uintptr_t>(base);
    return offset + sizeof(Line) <= bytes && offset < bytes;
  };
  if ((there && !on_16(from)) || !on_16(to)) emulation::fail("cp.async of a line not on 16 bytes");
  if (!within(to, emulation::shared.data(), emulation::shared.size() * sizeof(Line))) emulation::fail("cp.async beyond shared memory");
  bool inside = !there;
  for (const auto& [base, bytes] : emulation::readable) inside |= within(from, base, bytes);
  if (!inside) emulation::fail("cp.async from beyond a tensor");
  Line line = {};
  if (there) memcpy(&line, from, sizeof line);
  if (!emulation::late) *to = line;
  else emulation::copies[threadIdx.x].open.push_back({to, line});
}

inline void commit() {
  emulation::Copies& own = emulation::copies[threadIdx.x];
  own.groups.push_back(std::move(own.open));
  own.open.clear();
}

template <int N> void wait() {
  auto& [groups, open, landed] = emulation::copies[threadIdx.x];
  for (; groups.size() > N; groups.erase(groups.begin()))
    for (const emulation::Copy& copy : groups.front()) *copy.to = copy.line, landed.push_back(copy.to);
}

// Lanes 8 i .. 8 i + 7 name the rows of matrix i; lane l gets of each its row l / 4, elements 2 (l % 4) and the next.
inline Line load_matrices(const Line* row) {
  Line result;
  emulation::Operands own{};
  own.row = row, own.result = &result, own.what = emulation::LDMATRIX;
  emulation::meet(own, [](emulation::Operands* lanes) {
    for (int i = 0; i < 4; ++i) {
      unsigned banks = 0;
      for (int r = 0; r < 8; ++r) banks |= 1u << reinterpret_cast<uintptr_t>(lanes[8 * i + r].row) / sizeof(Line) % 8;
      if (banks != 0xFF) emulation::fail("ldmatrix with a bank conflict");
      for (int l = 0; l < 32; ++l) {
        const Line& from = *lanes[8 * i + l / 4].row;
        lanes[l].result->word[i] = uint32_t(emulation::half_of(from, l % 4 * 2)) | uint32_t(emulation::half_of(from, l % 4 * 2 + 1)) << 16;
      }
    }
  });
  return result;
}

// m16n8k32, A row-major and 2:4 (see Sparse), B column-major. With g = lane / 4, t = lane % 4, for element i of a lane's operand:
//   B: row 2 t + i % 2 + i / 2 * 8; column g
//   C and D: row g, 8 more for i >= 2; column 2 t + i % 2
template <typename T, int Selector>
void mma_sp(float (&sum)[4], const Line& a, const Line& b, uint32_t codes) {
  emulation::Operands own{};
  own.a = a, own.b = b, own.sum = sum, own.codes = codes, own.what = Selector;
  emulation::meet(own, [](emulation::Operands* lanes) {
    const emulation::Sparse A = emulation::sparse<T>(lanes, Selector);
    float B[8][32];  // by columns
    for (int l = 0; l < 32; ++l)
      for (int i = 0; i < 8; ++i) B[l / 4][l % 4 * 2 + i % 2 + i / 2 * 8] = emulation::number(emulation::half_of(lanes[l].b, i), T());
    for (int l = 0; l < 32; ++l)
      for (int i = 0; i < 4; ++i) lanes[l].sum[i] += A.times(l / 4 + (i < 2 ? 0 : 8), B[l % 4 * 2 + i % 2]);
  });
}

inline uint32_t shared_address(const void* p) {
  return emulation::SHARED_FROM + uint32_t(reinterpret_cast<uintptr_t>(p) - reinterpret_cast<uintptr_t>(emulation::shared.data()));
}

inline void publish() {
  auto& landed = emulation::copies[threadIdx.x].landed;
  for (const Line* line : landed) emulation::published[line - emulation::shared.data()] = *line;
  landed.clear();
}

inline void registers_ready() { emulation::ready[threadIdx.x] = true; }

inline void commit_products() {
  emulation::ready[threadIdx.x] = false;
  emulation::Operands own{};
  own.what = emulation::COMMIT;
  emulation::meet(own, [](emulation::Operands*) {
    emulation::Products& warp = emulation::products[threadIdx.x / emulation::WARP];
    warp.groups.push_back(std::move(warp.open));
    warp.open.clear();
  });
}

template <int N> void wait_products() {
  emulation::Operands own{};
  own.what = emulation::WAIT - N;
  emulation::meet(own, [](emulation::Operands*) {
    auto& groups = emulation::products[threadIdx.x / emulation::WARP].groups;
    for (; groups.size() > N; groups.erase(groups.begin()))
      for (auto& product : groups.front()) product();
  });
}

// m64n128k32, A as mma.sp's, 16 rows a warp, in its registers, and so are the sums: lane 4 g + t has of columns 8 j .. 8 j + 7 what it has
// there. B in shared memory, as its descriptor says (9.7.15.5.1.2.2), each field a number of 16 bytes: 0..13 where it begins, 32..45 from
// eight columns to the next eight; 49..51 the base offset, 62..63 the swizzle. Of 128 bytes, which is written down here: column n % 8 at
// 128 (n % 8) bytes, bits 4 to 6 of the address xor its bits 7 to 9.
template <typename T, int Selector>
void wgmma_sp(float (&sum)[16][4], const Line& a, uint64_t b, const uint32_t& codes) {
  if (!emulation::ready[threadIdx.x]) emulation::fail("wgmma without wgmma.fence");
  emulation::Operands own{};
  own.late_a = &a, own.late_codes = &codes, own.sum = sum[0], own.tokens = b, own.what = 2 + Selector;
  emulation::meet(own, [](emulation::Operands* first) {
    emulation::Products& warp = emulation::products[threadIdx.x / emulation::WARP];
    std::vector<emulation::Operands> lanes(first, first + emulation::WARP);
    for (const auto& lane : lanes)
      if (lane.tokens != lanes[0].tokens) emulation::fail("wgmma with tokens that differ in a warp");
    warp.begun.emplace_back(lanes[0].tokens, Selector);
    auto product = [lanes]() mutable {
      for (auto& lane : lanes) lane.a = *lane.late_a, lane.codes = *lane.late_codes;
      const emulation::Sparse A = emulation::sparse<T>(lanes.data(), Selector);
      const uint64_t b = lanes[0].tokens;
      const uint32_t start = (b & 0x3FFF) * 16, stride = (b >> 32 & 0x3FFF) * 16;
      if (b >> 62 != 1 || (b >> 49 & 7) != 0 || start % 1024 >= 128) emulation::fail("wgmma with tokens not in 128-byte swizzle");
      const std::vector<Line>& memory = emulation::late ? emulation::published : emulation::shared;
      float B[128][32];
      for (int n = 0; n < 128; ++n)
        for (int k = 0; k < 32; ++k) {
          uint32_t at = start + n / 8 * stride + n % 8 * 128 + 2 * k;
          at = (at ^ (at >> 7 & 7) << 4) - emulation::SHARED_FROM;
          if (at / 16 >= memory.size()) emulation::fail("wgmma with tokens beyond shared memory");
          B[n][k] = emulation::number(emulation::half_of(memory[at / 16], at % 16 / 2), T());
        }
      for (int l = 0; l < 32; ++l)
        for (int j = 0; j < 16; ++j)
          for (int i = 0; i < 4; ++i) lanes[l].sum[4 * j + i] += A.times(l / 4 + (i < 2 ? 0 : 8), B[8 * j + l % 4 * 2 + i % 2]);
    };
    if (emulation::late) product();
    else warp.open.push_back(product);
  });
}

}  // namespace snows

// Blocks one after another, in dynamic shared memory of so many bytes.
template <typename... P, typename... A>
void launch_apart(void (*kernel)(P...), unsigned blocks, int threads, int bytes, A... arguments) {
  for (unsigned b = 0; b < blocks; ++b) {
    blockIdx.x = b, blockDim.x = threads, gridDim.x = blocks;
    snows::Line nothing;
    memset(&nothing, 0xFF, sizeof nothing);
    emulation::shared.assign(bytes / sizeof(snows::Line) + 8, nothing);
    emulation::published = emulation::shared;
    emulation::copies.assign(threads, {});
    emulation::operands.assign(threads, {});
    emulation::products.assign(threads / emulation::WARP, {});
    emulation::ready.assign(threads, false);
    emulation::block.body = [=] { kernel(arguments...); };
    emulation::run_block();
    for (size_t w = 0; w < emulation::products.size(); ++w) {
      const emulation::Products &warp = emulation::products[w], &first = emulation::products[w / 4 * 4];
      if (warp.begun != first.begun) emulation::fail("warps of a group with different products");
      if (!warp.open.empty() || !warp.groups.empty()) emulation::fail("products that nobody waits for");
    }
  }
}

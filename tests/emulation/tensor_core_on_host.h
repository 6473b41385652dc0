// The instructions of csrc/cuda/tensor_core.cuh on a CPU, from the PTX manual's tables (PTX ISA 9.7.14.5 ldmatrix, 9.7.14.6 mma.sp, 9.7.9.25
// cp.async) and not from the kernels: which lane holds which element is written down here a second time.
//
// What may differ from run to run on a GPU is chosen for the worst: a copy lands when it is begun or only when it is waited for, the first
// warp or the last runs ahead. Shared memory begins as NaN. A bank conflict of ldmatrix, an illegal code, a line that is not on 16 bytes
// or not within what may be read ends the run.

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

inline bool late;  // copies land when they are waited for
inline thread_local std::vector<snows::Line> shared;
inline std::vector<std::pair<const void*, size_t>> readable;  // what copies may read, in bytes

struct Copy {
  void* to;
  snows::Line line;
};
struct Copies {  // of a thread: closed groups and the open one
  std::vector<std::vector<Copy>> groups;
  std::vector<Copy> open;
};
inline thread_local std::vector<Copies> copies;

struct Operands {  // what the lanes bring where their warp meets
  snows::Line a, b;
  float* sum;
  uint32_t codes;
  const snows::Line* row;
  snows::Line* result;
  int what;
};
inline thread_local std::vector<Operands> operands;

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

}  // namespace emulation

namespace snows {

inline float widen(__half x) { return emulation::number(x.bits, x); }
inline float widen(__nv_bfloat16 x) { return emulation::number(x.bits, x); }
template <> inline __half narrow(float x) {
  const _Float16 rounded = x;
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
  auto& groups = emulation::copies[threadIdx.x].groups;
  for (; groups.size() > N; groups.erase(groups.begin()))
    for (const emulation::Copy& copy : groups.front()) memcpy(copy.to, &copy.line, sizeof(Line));
}

// Lanes 8 i .. 8 i + 7 name the rows of matrix i; lane l gets of each its row l / 4, elements 2 (l % 4) and the next.
inline Line load_matrices(const Line* row) {
  Line result;
  emulation::Operands own{};
  own.row = row, own.result = &result, own.what = -1;
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

// m16n8k32, A row-major and 2:4, B column-major. With g = lane / 4, t = lane % 4, for element i of a lane's operand:
//   A: row g, or g + 8 for i in 2, 3, 6, 7; stored column 2 t + i % 2, 8 more for i >= 4
//   B: row 2 t + i % 2 + i / 2 * 8; column g
//   C and D: row g, 8 more for i >= 2; column 2 t + i % 2
//   codes: of lanes t = 2 Selector (columns 0..15) and 2 Selector + 1 (16..31): low half row g, high half row g + 8, a nibble a group
template <typename T, int Selector>
void mma_sp(float (&sum)[4], const Line& a, const Line& b, uint32_t codes) {
  emulation::Operands own{};
  own.a = a, own.b = b, own.sum = sum, own.codes = codes, own.what = Selector;
  emulation::meet(own, [](emulation::Operands* lanes) {
    float A[16][32] = {}, B[32][8];
    for (int l = 0; l < 32; ++l) {
      const int g = l / 4, t = l % 4;
      for (int i = 0; i < 8; ++i) {
        const int row = g + (i % 4 < 2 ? 0 : 8), stored = 2 * t + i % 2 + (i < 4 ? 0 : 8), group = stored / 2;
        const uint32_t word = lanes[4 * g + 2 * Selector + group / 4].codes, nibble = word >> (row < 8 ? 0 : 16) >> 4 * (group % 4) & 15;
        if ((nibble & 3) >= nibble >> 2) emulation::fail("mma.sp with an illegal code");
        A[row][4 * group + (stored % 2 == 0 ? nibble & 3 : nibble >> 2)] = emulation::number(emulation::half_of(lanes[l].a, i), T());
        B[2 * t + i % 2 + i / 2 * 8][g] = emulation::number(emulation::half_of(lanes[l].b, i), T());
        // What is not stored does not count, whatever stands opposite: a zero is no factor there.
      }
    }
    bool kept[16][32] = {};
    for (int row = 0; row < 16; ++row)
      for (int group = 0; group < 8; ++group) {
        const uint32_t word = lanes[4 * (row % 8) + 2 * Selector + group / 4].codes, nibble = word >> (row < 8 ? 0 : 16) >> 4 * (group % 4) & 15;
        kept[row][4 * group + (nibble & 3)] = kept[row][4 * group + (nibble >> 2)] = true;
      }
    for (int l = 0; l < 32; ++l)
      for (int i = 0; i < 4; ++i) {
        const int row = l / 4 + (i < 2 ? 0 : 8), column = l % 4 * 2 + i % 2;
        float total = 0;
        for (int k = 0; k < 32; ++k)
          if (kept[row][k]) total += A[row][k] * B[k][column];
        lanes[l].sum[i] += total;
      }
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
    emulation::copies.assign(threads, {});
    emulation::operands.assign(threads, {});
    emulation::block.body = [=] { kernel(arguments...); };
    emulation::run_block();
  }
}

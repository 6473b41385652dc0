// The instructions of NVIDIA's sparse tensor cores (sm_80 and up), as functions. tests/emulation/tensor_core_on_host.h has the same
// functions for a CPU, written from the PTX manual's tables of which lane holds what.

#pragma once

#include "memory.cuh"

#ifdef __CUDACC__

namespace snows {

__device__ inline Line* shared_memory() {
  extern __shared__ Line memory[];
  return memory;
}

__device__ inline uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// Begin copying 16 bytes to shared memory, past the registers and the first-level cache; zeros where there is nothing to copy.
__device__ inline void copy_async(Line* to, const void* from, bool there = true) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(there ? 16 : 0) : "memory");
}

// Close a group of this thread's copies; wait until all but the latest N groups are there (for this thread: a barrier for all).
__device__ inline void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> __device__ void wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

// Four 8x8 matrices of 16-bit numbers: lane 8 i + r names row r of matrix i; word i of lane 4 g + t gets row g, columns 2 t and 2 t + 1.
__device__ inline Line load_matrices(const Line* row) {
  Line x;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.word[0]), "=r"(x.word[1]), "=r"(x.word[2]), "=r"(x.word[3]) : "r"(shared_address(row)) : "memory");
  return x;
}

// sum += a b: 16x32 times 32x8, a being 2:4. `codes` counts in lanes t = 2 Selector and 2 Selector + 1 of each four. Codes ascend within
// a group; a toolkit that knows the name for it is told so.
#if __CUDACC_VER_MAJOR__ > 12 || (__CUDACC_VER_MAJOR__ == 12 && __CUDACC_VER_MINOR__ >= 5)
#define SNOWS_MMA_SP "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32."
#else
#define SNOWS_MMA_SP "mma.sp.sync.aligned.m16n8k32.row.col.f32."
#endif
template <typename T, int Selector>
__device__ void mma_sp(float (&sum)[4], const Line& a, const Line& b, uint32_t codes) {
#define SNOWS_MMA_SP_OF(types)                                                                                                           \
  asm volatile(SNOWS_MMA_SP types ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, %13;"             \
               : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])                                                                  \
               : "r"(a.word[0]), "r"(a.word[1]), "r"(a.word[2]), "r"(a.word[3]), "r"(b.word[0]), "r"(b.word[1]), "r"(b.word[2]),         \
                 "r"(b.word[3]), "r"(codes), "n"(Selector))
  if constexpr (std::is_same_v<T, __half>) SNOWS_MMA_SP_OF("f16.f16");
  else SNOWS_MMA_SP_OF("bf16.bf16");
#undef SNOWS_MMA_SP_OF
}
#undef SNOWS_MMA_SP

// Hopper's warpgroups (sm_90a): four warps in line multiply together, while they go on.

// Before products: registers that they read or write are as the program has them. Close a group of products; wait until all but the latest
// N groups are done.
__device__ inline void registers_ready() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N> __device__ void wait_products() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory"); }

// What this thread wrote to shared memory, copies that have landed among it, is for products to see.
__device__ inline void publish() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// sum += a b: 64x32 times 32x128, a being 2:4. Of its 16 rows a warp has in a, codes and sum what it has for mma_sp, and leaves them alone
// until the product is done; b describes a matrix in shared memory.
template <typename T, int Selector>
__device__ void wgmma_sp(float (&sum)[16][4], const Line& a, uint64_t b, const uint32_t& codes) {
#define SNOWS_ROW(i) "+f"(sum[i][0]), "+f"(sum[i][1]), "+f"(sum[i][2]), "+f"(sum[i][3])
#define SNOWS_WGMMA_SP_OF(types)                                                                                                         \
  asm volatile("wgmma.mma_async.sp.sync.aligned.m64n128k32.f32." types " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, "       \
               "%13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, "     \
               "%36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, "     \
               "%59, %60, %61, %62, %63}, {%64, %65, %66, %67}, %68, %69, %70, 1, 1, 1, 0;"                                              \
               : SNOWS_ROW(0), SNOWS_ROW(1), SNOWS_ROW(2), SNOWS_ROW(3), SNOWS_ROW(4), SNOWS_ROW(5), SNOWS_ROW(6), SNOWS_ROW(7),         \
                 SNOWS_ROW(8), SNOWS_ROW(9), SNOWS_ROW(10), SNOWS_ROW(11), SNOWS_ROW(12), SNOWS_ROW(13), SNOWS_ROW(14), SNOWS_ROW(15)    \
               : "r"(a.word[0]), "r"(a.word[1]), "r"(a.word[2]), "r"(a.word[3]), "l"(b), "r"(codes), "n"(Selector))
  if constexpr (std::is_same_v<T, __half>) SNOWS_WGMMA_SP_OF("f16.f16");
  else SNOWS_WGMMA_SP_OF("bf16.bf16");
#undef SNOWS_WGMMA_SP_OF
#undef SNOWS_ROW
}

}  // namespace snows

#endif

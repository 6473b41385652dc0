// Enough of CUDA to run the kernels of csrc/cuda on a CPU as they stand: a block is an OS thread, its threads are fibres that
// change hands at a barrier alone. One thread after the other runs up to each barrier, so that a barrier too few shows.

#pragma once

#include <ucontext.h>

#include <condition_variable>
#include <cmath>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

using std::isfinite;

#define __global__
#define __device__
#define __host__
#define __shared__ static thread_local
#define __launch_bounds__(...)

struct Index {
  unsigned x;
};
inline thread_local Index threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

struct Block {
  std::vector<ucontext_t> fibres;
  std::vector<char> ended;
  ucontext_t scheduler;
  std::function<void()> body;
};
inline thread_local Block block;

inline std::mutex mutex;
inline std::condition_variable arrived;
inline unsigned waiting, passed;

inline void enter() {
  block.body();
  block.ended[threadIdx.x] = 1;
}

// Every fibre runs to its next barrier, in order, until all have ended.
inline void run_block() {
  const unsigned threads = blockDim.x;
  constexpr size_t STACK = 1 << 16;
  std::vector<char> stacks(threads * STACK);
  block.fibres.assign(threads, {});
  block.ended.assign(threads, 0);
  for (unsigned t = 0; t < threads; ++t) {
    ucontext_t& fibre = block.fibres[t];
    getcontext(&fibre);
    fibre.uc_stack.ss_sp = &stacks[t * STACK];
    fibre.uc_stack.ss_size = STACK;
    fibre.uc_link = &block.scheduler;
    makecontext(&fibre, enter, 0);
  }
  for (bool left = true; left;) {
    left = false;
    for (unsigned t = 0; t < threads; ++t) {
      if (block.ended[t]) continue;
      threadIdx.x = t;
      swapcontext(&block.scheduler, &block.fibres[t]);
      left |= !block.ended[t];
    }
  }
}

}  // namespace emulation

inline void __syncthreads() {
  const unsigned self = threadIdx.x;
  swapcontext(&emulation::block.fibres[self], &emulation::block.scheduler);
}

inline uint32_t atomicOr(uint32_t* to, uint32_t bits) {
  const uint32_t before = *to;
  *to |= bits;
  return before;
}

namespace snows {

inline void grid_barrier() {
  __syncthreads();
  if (threadIdx.x == 0) {  // for its block; the others of the block come later, in order
    std::unique_lock<std::mutex> lock(emulation::mutex);
    const unsigned round = emulation::passed;
    if (++emulation::waiting == gridDim.x) {
      emulation::waiting = 0;
      ++emulation::passed;
      emulation::arrived.notify_all();
    } else {
      emulation::arrived.wait(lock, [&] { return emulation::passed != round; });
    }
  }
}

}  // namespace snows

// All blocks at once, as in a cooperative launch.
template <typename... P, typename... A>
void launch(void (*kernel)(P...), unsigned blocks, int threads, A... arguments) {
  std::vector<std::thread> running;
  for (unsigned b = 0; b < blocks; ++b)
    running.emplace_back([=] {
      blockIdx.x = b, blockDim.x = threads, gridDim.x = blocks;
      emulation::block.body = [=] { kernel(arguments...); };
      emulation::run_block();
    });
  for (std::thread& t : running) t.join();
}

// Enough of CUDA to run the kernels of csrc/cuda on a CPU as they stand: a block is an OS thread, its threads are fibres that
// change hands at a barrier alone, or where the 32 of a warp meet. One warp after the other runs up to each barrier, from the first
// or from the last, so that a barrier too few shows.

#pragma once

#include <ucontext.h>

#include <algorithm>
#include <condition_variable>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
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

constexpr unsigned WARP = 32;
enum State { RUNS, AT_BARRIER, IN_WARP, ENDED };

struct Block {
  std::vector<ucontext_t> fibres;
  std::vector<State> states;
  ucontext_t scheduler;
  std::function<void()> body;
};
inline thread_local Block block;
inline bool backwards;  // the last warp runs first

[[noreturn]] inline void fail(const char* why) {
  std::fprintf(stderr, "emulation: block %u, thread %u: %s\n", blockIdx.x, threadIdx.x, why);
  std::abort();
}

inline std::mutex mutex;
inline std::condition_variable arrived;
inline unsigned waiting, passed;

inline void enter() {
  block.body();
  block.states[threadIdx.x] = ENDED;
}

inline void leave(State state) {
  const unsigned self = threadIdx.x;
  block.states[self] = state;
  swapcontext(&block.fibres[self], &block.scheduler);
}

// Run a warp's threads, in order, until each has ended or waits at a barrier.
inline void run_warp(unsigned warp) {
  const unsigned first = warp * WARP, end = std::min(first + WARP, blockDim.x);
  for (bool ran = true; ran;) {
    ran = false;
    for (unsigned t = first; t < end; ++t)
      while (block.states[t] == RUNS) {
        ran = true;
        threadIdx.x = t;
        swapcontext(&block.scheduler, &block.fibres[t]);
      }
  }
  for (unsigned t = first; t < end; ++t)
    if (block.states[t] == IN_WARP) fail("a part of its warp waits for the rest");
}

inline void run_block() {
  const unsigned threads = blockDim.x, warps = (threads + WARP - 1) / WARP;
  constexpr size_t STACK = 1 << 16;
  std::vector<char> stacks(threads * STACK);
  block.fibres.assign(threads, {});
  block.states.assign(threads, RUNS);
  for (unsigned t = 0; t < threads; ++t) {
    ucontext_t& fibre = block.fibres[t];
    getcontext(&fibre);
    fibre.uc_stack.ss_sp = &stacks[t * STACK];
    fibre.uc_stack.ss_size = STACK;
    fibre.uc_link = &block.scheduler;
    makecontext(&fibre, enter, 0);
  }
  for (bool left = true; left;) {
    for (unsigned w = 0; w < warps; ++w) run_warp(backwards ? warps - 1 - w : w);
    left = false;
    for (State& state : block.states)
      if (state == AT_BARRIER) state = RUNS, left = true;
  }
}

}  // namespace emulation

inline void __syncthreads() { emulation::leave(emulation::AT_BARRIER); }

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

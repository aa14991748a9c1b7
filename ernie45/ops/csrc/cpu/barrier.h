// A meeting point for the threads of one parallel region, for regions that meet every few microseconds: OpenMP's own
// barrier costs more than such a step. Waiting threads spin, and let others run when it takes long.
#pragma once

#include <immintrin.h>
#include <sched.h>

#include <atomic>

namespace ernie {

class Barrier {
 public:
  explicit Barrier(int threads) : threads_(threads) {}

  void wait() {
    if (threads_ == 1) return;
    const int generation = generation_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads_) {
      arrived_.store(0, std::memory_order_relaxed);
      generation_.store(generation + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; generation_.load(std::memory_order_acquire) == generation; ++spins) {
      _mm_pause();
      if (spins > kSpins) sched_yield();
    }
  }

 private:
  static constexpr int kSpins = 4000;
  const int threads_;
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<int> generation_{0};
};

}  // namespace ernie

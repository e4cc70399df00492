// Where a team of threads waits for one another: spinning at first, asleep when it takes long.
//
// OpenMP's own barrier spins for milliseconds. Where another process has one of the processors, the thread that waits
// then holds the other one, on which the thread that is waited for could run.

#pragma once

#include <atomic>
#include <cstdint>

namespace {

class Barrier {
 public:
  // Returns when all n threads have come.
  void wait(int n) {
    const uint32_t turn = turn_.load(std::memory_order_relaxed);  // it cannot change before this thread has come
    if (come_.fetch_add(1, std::memory_order_acq_rel) == n - 1) {
      come_.store(0, std::memory_order_relaxed);
      turn_.store(turn + 1, std::memory_order_release);
      turn_.notify_all();
      return;
    }
    for (int spin = 0; spin < kSpins; ++spin) {
      if (turn_.load(std::memory_order_acquire) != turn) return;
      __builtin_ia32_pause();
    }
    turn_.wait(turn, std::memory_order_acquire);
  }

 private:
  static constexpr int kSpins = 8192;  // some 200 microseconds: threads that share memory seldom differ by more
  alignas(64) std::atomic<int> come_{0};
  alignas(64) std::atomic<uint32_t> turn_{0};
};

}  // namespace

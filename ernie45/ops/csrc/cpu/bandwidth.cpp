// compiled once
#include "bandwidth.h"

#include <atomic>
#include <chrono>

#include "parallel.h"

namespace {

constexpr int64_t kGrain = 1 << 17;  // numbers, 1 MB: below it another thread is not worth waking

// The sum needs every number, so that the compiler can leave no load out. In 256-bit loads the plain loop reads as fast
// as several streams, prefetching or 512-bit loads.
__attribute__((target_clones("avx2", "default"))) uint64_t sum(const uint64_t* numbers, int64_t count) {
  uint64_t total = 0;
  for (int64_t i = 0; i < count; ++i) total += numbers[i];
  return total;
}

}  // namespace

double ernie45_read_bandwidth(const void* data, int64_t bytes) {
  const auto* numbers = static_cast<const uint64_t*>(data);
  std::atomic<uint64_t> total{0};
  const auto start = std::chrono::steady_clock::now();
  ernie::parallel_for(bytes / 8, kGrain,
                      [&](int64_t first, int64_t last) { total += sum(numbers + first, last - first); });
  const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
  return bytes / elapsed.count();
}

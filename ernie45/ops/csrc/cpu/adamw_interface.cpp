// compiled once
// AdamW and norms of gradients on all threads, for Python. Gradients are float32, or bfloat16 if `bfloat16` is not 0.
#include "adamw.h"
#include "parallel.h"

#include <numeric>
#include <vector>

namespace {

constexpr int64_t kLine = 32;     // numbers: threads share no cache line, of float32 or bfloat16
constexpr int64_t kGrain = 1024;  // lines of one thread at least
constexpr int64_t kBlock = 1 << 16;  // numbers that are summed for a norm before the sums of blocks are

int64_t blocks(int64_t count, int64_t size) { return (count + size - 1) / size; }

}  // namespace

#define ERNIE_EXPORT extern "C" __attribute__((visibility("default")))

// `step` holds the numbers of AdamWStep in their order; `rounded` is null for a parameter that is its own master.
ERNIE_EXPORT void ernie45_adamw(int bfloat16, const void* gradient, int64_t count, float* master, float* moment1,
                                float* moment2, uint16_t* rounded, const float* step) {
  using namespace ernie;
  const AdamWStep task{step[0], step[1], step[2], step[3], step[4], step[5], step[6]};
  parallel_for(blocks(count, kLine), kGrain, [&](int64_t first, int64_t last) {
    const int64_t begin = first * kLine, size = std::min(last * kLine, count) - begin;
    auto update = [&](auto* from) {
      ERNIE_DISPATCH(adamw, task, from + begin, size, master + begin, moment1 + begin, moment2 + begin,
                     rounded ? rounded + begin : nullptr);
    };
    if (bfloat16) return update(static_cast<const uint16_t*>(gradient));
    update(static_cast<const float*>(gradient));
  });
}

// The sum of squares, the same for any number of threads.
ERNIE_EXPORT double ernie45_squares(int bfloat16, const void* x, int64_t count) {
  using namespace ernie;
  std::vector<double> sums(blocks(count, kBlock));
  parallel_for(blocks(count, kBlock), 1, [&](int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block) {
      const int64_t begin = block * kBlock, size = std::min(kBlock, count - begin);
      sums[block] = bfloat16 ? ERNIE_DISPATCH(squares, static_cast<const uint16_t*>(x) + begin, size)
                             : ERNIE_DISPATCH(squares, static_cast<const float*>(x) + begin, size);
    }
  });
  return std::accumulate(sums.begin(), sums.end(), 0.0);
}

#include "adamw.h"

#include <cmath>

#include "tile.h"

namespace ernie::ERNIE_ISA {
namespace {

constexpr int64_t kChunk = 512;  // numbers that stay in the first cache between the update and the rounding

inline float widened(float x) { return x; }
inline float widened(uint16_t x) { return bfloat16_to_float(x); }

template <class Item>
void update(const AdamWStep& step, const Item* gradient, int64_t count, float* master, float* moment1, float* moment2,
            uint16_t* rounded) {
  for (int64_t first = 0; first < count; first += kChunk) {
    const int64_t last = first + kChunk < count ? first + kChunk : count;
#pragma omp simd
    for (int64_t i = first; i < last; ++i) {
      const float g = widened(gradient[i]) * step.scale;
      const float m = step.beta1 * moment1[i] + (1 - step.beta1) * g;
      const float v = step.beta2 * moment2[i] + (1 - step.beta2) * g * g;
      moment1[i] = m;
      moment2[i] = v;
      master[i] = master[i] * step.decay - step.rate * m / (std::sqrt(v) * step.root_correction + step.epsilon);
    }
    if (rounded) round_row(master + first, last - first, rounded + first);
  }
}

template <class Item>
double sum_of_squares(const Item* x, int64_t count) {
  double total = 0;
  for (int64_t first = 0; first < count; first += kChunk) {
    const int64_t last = first + kChunk < count ? first + kChunk : count;
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = first; i < last; ++i) sum += widened(x[i]) * widened(x[i]);
    total += sum;
  }
  return total;
}

}  // namespace

double squares(const float* x, int64_t count) { return sum_of_squares(x, count); }
double squares(const uint16_t* x, int64_t count) { return sum_of_squares(x, count); }

void adamw(const AdamWStep& step, const float* gradient, int64_t count, float* master, float* moment1, float* moment2,
           uint16_t* rounded) {
  update(step, gradient, count, master, moment1, moment2, rounded);
}

void adamw(const AdamWStep& step, const uint16_t* gradient, int64_t count, float* master, float* moment1,
           float* moment2, uint16_t* rounded) {
  update(step, gradient, count, master, moment1, moment2, rounded);
}

}  // namespace ernie::ERNIE_ISA

#include "cross_entropy.h"

#include <cmath>

#include "exp.h"
#include "tile.h"

namespace ernie::ERNIE_ISA {
namespace {

constexpr int64_t kChunk = 512;  // numbers that are scaled in the first cache and then rounded

}  // namespace

float cross_entropy(float* logits, int64_t vocabulary, int64_t label, float z, float scale) {
  const float chosen = logits[label];
  float largest = -INFINITY;
#pragma omp simd reduction(max : largest)
  for (int64_t i = 0; i < vocabulary; ++i) largest = logits[i] > largest ? logits[i] : largest;
  float sum = 0;  // NaN if any logit is, or all are -infinity
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < vocabulary; ++i) {
    logits[i] = exp(logits[i] - largest);
    sum += logits[i];
  }
  const float normalizer = largest + std::log(sum);
  const float loss = normalizer - chosen + z * normalizer * normalizer;
  if (scale == 0) return loss;
  const float factor = scale * (1 + 2 * z * normalizer) / sum;
  uint16_t* rounded = reinterpret_cast<uint16_t*>(logits);  // ends before the numbers that are still to be read begin
  alignas(64) float scaled[kChunk];
  for (int64_t first = 0; first < vocabulary; first += kChunk) {
    const int64_t count = vocabulary - first < kChunk ? vocabulary - first : kChunk;
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) scaled[i] = factor * logits[first + i];
    if (first <= label && label < first + count) scaled[label - first] -= scale;
    round_row(scaled, count, rounded + first);
  }
  return loss;
}

}  // namespace ernie::ERNIE_ISA

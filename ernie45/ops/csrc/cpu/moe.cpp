#include "moe.h"

#include <cmath>
#include <cstdlib>

#include "exp.h"

namespace ernie::ERNIE_ISA {
namespace {

void softmax_row(const float* logits, int64_t experts, float* out) {
  float largest = -INFINITY;
#pragma omp simd reduction(max : largest)
  for (int64_t e = 0; e < experts; ++e) largest = logits[e] > largest ? logits[e] : largest;
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t e = 0; e < experts; ++e) sum += out[e] = exp(logits[e] - largest);
#pragma omp simd
  for (int64_t e = 0; e < experts; ++e) out[e] /= sum;
}

void sigmoid_row(const float* logits, int64_t experts, float* out) {
#pragma omp simd
  for (int64_t e = 0; e < experts; ++e) out[e] = 1.0f / (1.0f + exp(-logits[e]));
}

inline bool precedes(float a, float b) { return a > b || (std::isnan(a) && !std::isnan(b)); }

// Insertion into a list of the k best so far; a later expert has to be better than the ones before it.
void largest_k(const float* scores, int64_t experts, int64_t k, int64_t* indices) {
  for (int64_t e = 0; e < experts; ++e) {
    int64_t place = e < k ? e : k;
    while (place > 0 && precedes(scores[e], scores[indices[place - 1]])) --place;
    if (place == k) continue;
    for (int64_t i = (e < k ? e : k - 1); i > place; --i) indices[i] = indices[i - 1];
    indices[place] = e;
  }
}

float sum_at(const float* values, const int64_t* indices, int64_t k) {
  float sum = 0.0f;
  for (int64_t i = 0; i < k; ++i) sum += values[indices[i]];
  return sum;
}

// Adds to grad [experts] what reaches the probabilities through the k weights: with w = p / s and s the sum of the
// chosen, dp = (g - sum(g w)) / s, and g / minimum where s is clipped and thus constant.
void add_weights_grad(const float* probabilities, const int64_t* indices, const float* grad_weights, int64_t k,
                      bool normalise, float minimum, float* grad) {
  float divisor = 1.0f, shared = 0.0f;
  if (normalise) {
    const float sum = sum_at(probabilities, indices, k);
    divisor = sum < minimum ? minimum : sum;
    if (!(sum < minimum))
      for (int64_t i = 0; i < k; ++i) shared += grad_weights[i] * probabilities[indices[i]] / sum;
  }
  for (int64_t i = 0; i < k; ++i) grad[indices[i]] += (grad_weights[i] - shared) / divisor;
}

}  // namespace

void moe_gate(const float* logits, const float* bias, int64_t tokens, int64_t experts, int64_t k, bool softmax,
              bool normalise, float minimum, float* probabilities, int64_t* indices, float* weights) {
  float* scratch = static_cast<float*>(std::malloc(2 * experts * sizeof(float)));
  float* scores = scratch + experts;
  for (int64_t t = 0; t < tokens; ++t, logits += experts, indices += k, weights += k) {
    float* row = probabilities ? probabilities + t * experts : scratch;
    softmax ? softmax_row(logits, experts, row) : sigmoid_row(logits, experts, row);
    for (int64_t e = 0; e < experts; ++e) scores[e] = bias ? row[e] + bias[e] : row[e];
    largest_k(scores, experts, k, indices);
    const float sum = normalise ? sum_at(row, indices, k) : 1.0f;
    const float divisor = normalise && sum < minimum ? minimum : sum;
    for (int64_t i = 0; i < k; ++i) weights[i] = row[indices[i]] / divisor;
  }
  std::free(scratch);
}

void moe_gate_grad(const float* probabilities, const int64_t* indices, const float* grad_probabilities,
                   const float* grad_weights, int64_t tokens, int64_t experts, int64_t k, bool softmax, bool normalise,
                   float minimum, float* grad_logits) {
  for (int64_t t = 0; t < tokens; ++t, probabilities += experts, grad_logits += experts) {
    for (int64_t e = 0; e < experts; ++e) grad_logits[e] = grad_probabilities[t * experts + e];
    add_weights_grad(probabilities, indices + t * k, grad_weights + t * k, k, normalise, minimum, grad_logits);
    float dot = 0.0f;
    for (int64_t e = 0; e < experts; ++e) dot += grad_logits[e] * probabilities[e];
#pragma omp simd
    for (int64_t e = 0; e < experts; ++e)
      grad_logits[e] = probabilities[e] * (softmax ? grad_logits[e] - dot : grad_logits[e] * (1.0f - probabilities[e]));
  }
}

void moe_permute(const int64_t* indices, int64_t tokens, int64_t k, int64_t experts, int64_t* counts, int64_t* offsets,
                 int64_t* sources, int64_t* slots) {
  for (int64_t e = 0; e < experts; ++e) counts[e] = 0;
  for (int64_t i = 0; i < tokens * k; ++i) ++counts[indices[i]];
  offsets[0] = 0;
  for (int64_t e = 0; e < experts; ++e) offsets[e + 1] = offsets[e] + counts[e];
  // While pairs are placed, offsets[e] is the next free slot of e; in the end that is the first slot of e + 1.
  for (int64_t i = 0; i < tokens * k; ++i) {
    slots[i] = offsets[indices[i]]++;
    sources[slots[i]] = i / k;
  }
  for (int64_t e = experts; e > 0; --e) offsets[e] = offsets[e - 1];
  offsets[0] = 0;
}

void moe_combine(const float* rows, const int64_t* slots, const float* weights, int64_t tokens, int64_t k,
                 int64_t width, float* out) {
  for (int64_t t = 0; t < tokens; ++t, slots += k, out += width) {
    for (int64_t i = 0; i < width; ++i) out[i] = 0.0f;
    for (int64_t j = 0; j < k; ++j) {
      const float* row = rows + slots[j] * width;
      const float weight = weights ? weights[t * k + j] : 1.0f;
#pragma omp simd
      for (int64_t i = 0; i < width; ++i) out[i] += weight * row[i];
    }
  }
}

void moe_combine_grad(const float* rows, const int64_t* slots, const float* weights, const float* grad_out,
                      int64_t tokens, int64_t k, int64_t width, float* grad_rows, float* grad_weights) {
  for (int64_t t = 0; t < tokens; ++t, grad_out += width) {
    for (int64_t j = t * k; j < (t + 1) * k; ++j) {
      const float* row = rows + slots[j] * width;
      float* grad_row = grad_rows + slots[j] * width;
      float dot = 0.0f;
#pragma omp simd reduction(+ : dot)
      for (int64_t i = 0; i < width; ++i) {
        grad_row[i] = weights[j] * grad_out[i];
        dot += row[i] * grad_out[i];
      }
      grad_weights[j] = dot;
    }
  }
}

}  // namespace ernie::ERNIE_ISA

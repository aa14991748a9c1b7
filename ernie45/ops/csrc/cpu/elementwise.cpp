#include "elementwise.h"

#include <cmath>

#include "exp.h"
#include "packed.h"

namespace ernie::ERNIE_ISA {
namespace {

float inverse_rms(const float* x, float epsilon, int64_t width) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < width; ++i) sum += x[i] * x[i];
  return 1.0f / std::sqrt(sum / static_cast<float>(width) + epsilon);
}

inline float sigmoid(float x) { return 1.0f / (1.0f + exp(-x)); }

}  // namespace

void rms_norm(const float* x, const float* weight, float epsilon, int64_t rows, int64_t width, float* out) {
  for (int64_t row = 0; row < rows; ++row, x += width, out += width) {
    const float scale = inverse_rms(x, epsilon, width);
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) out[i] = x[i] * scale * weight[i];
  }
}

void add_rms_norm(float* residual, const float* x, const float* weight, float epsilon, int64_t rows, int64_t width,
                  float* out) {
  for (int64_t row = 0; row < rows; ++row, residual += width, x += width, out += width) {
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) residual[i] += x[i];
    rms_norm(residual, weight, epsilon, 1, width, out);
  }
}

void layer_norm(const float* x, const float* weight, const float* bias, float epsilon, int64_t rows, int64_t width,
                float* out) {
  for (int64_t row = 0; row < rows; ++row, x += width, out += width) {
    float sum = 0.0f, squares = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < width; ++i) sum += x[i];
    const float mean = sum / static_cast<float>(width);
#pragma omp simd reduction(+ : squares)
    for (int64_t i = 0; i < width; ++i) squares += (x[i] - mean) * (x[i] - mean);
    const float scale = 1.0f / std::sqrt(squares / static_cast<float>(width) + epsilon);
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) out[i] = (x[i] - mean) * scale * weight[i] + bias[i];
  }
}

// With s the scale and H the width: dx = s (w g) - x s^3 / H sum(w g x).
void rms_norm_grad(const float* x, const float* weight, const float* grad_out, float epsilon, int64_t rows,
                   int64_t width, float* grad_x, float* scale) {
  for (int64_t row = 0; row < rows; ++row, x += width, grad_out += width, grad_x += width) {
    const float s = scale[row] = inverse_rms(x, epsilon, width);
    float dot = 0.0f;
#pragma omp simd reduction(+ : dot)
    for (int64_t i = 0; i < width; ++i) dot += weight[i] * grad_out[i] * x[i];
    const float along = dot * s * s / static_cast<float>(width);
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) grad_x[i] = s * (weight[i] * grad_out[i] - along * x[i]);
  }
}

void rms_norm_weight_grad(const float* x, const float* grad_out, const float* scale, int64_t rows, int64_t width,
                          int64_t first, int64_t last, float* grad_weight) {
  for (int64_t i = first; i < last; ++i) grad_weight[i] = 0.0f;
  for (int64_t row = 0; row < rows; ++row, x += width, grad_out += width) {
    const float s = scale[row];
#pragma omp simd
    for (int64_t i = first; i < last; ++i) grad_weight[i] += grad_out[i] * x[i] * s;
  }
}

void swiglu(const float* x, const float* prob, int64_t rows, int64_t width, float* out) {
  for (int64_t row = 0; row < rows; ++row, x += 2 * width, out += width) {
    const float* up = x + width;
    const float factor = prob ? prob[row] : 1.0f;
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) out[i] = x[i] / (1.0f + exp(-x[i])) * up[i] * factor;
  }
}

void add_bias_quick_gelu(float* x, const float* bias, int64_t rows, int64_t width) {
  for (int64_t row = 0; row < rows; ++row, x += width) {
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) {
      const float value = x[i] + bias[i];
      x[i] = value * sigmoid(1.702f * value);
    }
  }
}

void add_with_bias(float* residual, const float* x, const float* bias, int64_t rows, int64_t width) {
  for (int64_t row = 0; row < rows; ++row, residual += width, x += width) {
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) residual[i] += x[i] + bias[i];
  }
}

void swiglu_grad(const float* x, const float* prob, const float* grad_out, int64_t rows, int64_t width, float* grad_x,
                 float* grad_prob) {
  for (int64_t row = 0; row < rows; ++row, x += 2 * width, grad_x += 2 * width, grad_out += width) {
    const float *gate = x, *up = x + width;
    float *grad_gate = grad_x, *grad_up = grad_x + width;
    const float factor = prob ? prob[row] : 1.0f;
    float dot = 0.0f;
#pragma omp simd reduction(+ : dot)
    for (int64_t i = 0; i < width; ++i) {
      const float share = sigmoid(gate[i]), silu = gate[i] * share, grad = grad_out[i] * factor;
      grad_gate[i] = grad * up[i] * (share + silu * (1.0f - share));
      grad_up[i] = grad * silu;
      dot += grad_out[i] * silu * up[i];
    }
    if (prob) grad_prob[row] = dot;
  }
}

void rope(const float* x, int64_t x_stride, const float* cos, const float* sin, int64_t heads, int64_t head_dim,
          float* out, int64_t out_stride) {
  for (int64_t head = 0; head < heads; ++head, x += x_stride, out += out_stride) {
#pragma omp simd
    for (int64_t j = 0; j < head_dim / 2; ++j) {
      const float even = x[2 * j], odd = x[2 * j + 1];
      out[2 * j] = even * cos[j] - odd * sin[j];
      out[2 * j + 1] = odd * cos[j] + even * sin[j];
    }
  }
}

void widen(const uint16_t* x, int64_t count, float* out) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) out[i] = bfloat16_to_float(x[i]);
}

void narrow(const float* x, int64_t count, uint16_t* out) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) out[i] = float_to_bfloat16(x[i]);
}

}  // namespace ernie::ERNIE_ISA

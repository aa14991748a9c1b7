// RMSNorm, SwiGLU and rotary positions with their gradients, LayerNorm and quick-GELU, in float32, and the way from
// bfloat16 and back. Each function works on its rows alone, on the calling thread: callers split the rows among
// threads.
#pragma once

#include <cstdint>

#include "isa.h"

ERNIE_FOR_EACH_ISA(
    // out [rows, width] = x / sqrt(mean(x^2) + epsilon) * weight [width].
    void rms_norm(const float* x, const float* weight, float epsilon, int64_t rows, int64_t width, float* out);

    // residual += x in place, then out = rms_norm(residual).
    void add_rms_norm(float* residual, const float* x, const float* weight, float epsilon, int64_t rows, int64_t width,
                      float* out);

    // out [rows, width] = (x - mean) / sqrt(variance + epsilon) * weight [width] + bias [width]; out may be x.
    void layer_norm(const float* x, const float* weight, const float* bias, float epsilon, int64_t rows, int64_t width,
                    float* out);

    // The gradient of rms_norm for x, and scale [rows] = 1 / sqrt(mean(x^2) + epsilon) for rms_norm_weight_grad.
    void rms_norm_grad(const float* x, const float* weight, const float* grad_out, float epsilon, int64_t rows,
                       int64_t width, float* grad_x, float* scale);

    // The gradient of rms_norm for the columns first .. last - 1 of the weight.
    void rms_norm_weight_grad(const float* x, const float* grad_out, const float* scale, int64_t rows, int64_t width,
                              int64_t first, int64_t last, float* grad_weight);

    // out [rows, width] = silu(gate) * up * prob; x [rows, 2 * width] holds gate, then up; prob [rows] or null for 1.
    void swiglu(const float* x, const float* prob, int64_t rows, int64_t width, float* out);

    // x [rows, width] = quick-GELU of x + bias [width], in place: y sigmoid(1.702 y).
    void add_bias_quick_gelu(float* x, const float* bias, int64_t rows, int64_t width);

    // residual [rows, width] += x + bias [width].
    void add_with_bias(float* residual, const float* x, const float* bias, int64_t rows, int64_t width);

    // The gradients of swiglu for x and, unless prob is null, for prob [rows].
    void swiglu_grad(const float* x, const float* prob, const float* grad_out, int64_t rows, int64_t width,
                     float* grad_x, float* grad_prob);

    // Turns adjacent pairs (2j, 2j + 1) of every head of one token by the angle with cos[j], sin[j] [head_dim / 2].
    // Head h starts at x + h * x_stride and goes to out + h * out_stride; out may be x with the same stride.
    void rope(const float* x, int64_t x_stride, const float* cos, const float* sin, int64_t heads, int64_t head_dim,
              float* out, int64_t out_stride);

    // bfloat16 to float32, exactly, and back, to the nearest or, of two as near, the even one.
    void widen(const uint16_t* x, int64_t count, float* out);
    void narrow(const float* x, int64_t count, uint16_t* out);)

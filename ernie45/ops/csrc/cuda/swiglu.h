// SwiGLU with the probability of a row, and its gradients. The definition is ernie45.ops.reference.swiglu.
//
// Everything is computed in float32; results are rounded once, to the element type `dtype`: float32, float16, bfloat16.
// Pointers are to device memory. Where they and the rows are multiples of 16 bytes, threads read and write that much at
// once; other sizes take longer. No function waits for the device. All return cudaErrorInvalidValue for what they do
// not take.
#pragma once

#include "types.h"

// out [rows, width] = silu(gate) * up * prob, with silu(g) = g / (1 + exp(-g)).
// x [rows, 2 * width] holds gate, then up; prob [rows] is float32, or null for 1. width < 2^31.
ERNIE45_API cudaError_t ernie45_cuda_swiglu(const void* x, const float* prob, int64_t rows, int64_t width, int dtype,
                                            void* out, cudaStream_t stream);

// The gradients of swiglu for x and, unless prob is null, prob: grad_x [rows, 2 * width], grad_prob [rows] float32.
// With g = grad_out * prob [rows, width] and s = 1 / (1 + exp(-gate)):
//   grad_gate = g * up * s * (1 + gate * (1 - s)), grad_up = g * silu(gate), grad_prob = sum(grad_out * silu(gate) * up).
// The order of that sum depends on the width alone. rows < 2^31.
ERNIE45_API cudaError_t ernie45_cuda_swiglu_grad(const void* x, const float* prob, const void* grad_out, int64_t rows,
                                                 int64_t width, int dtype, void* grad_x, float* grad_prob,
                                                 cudaStream_t stream);

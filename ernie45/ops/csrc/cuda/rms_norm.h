// RMSNorm, alone and after the addition of a residual, with gradients. The definition is ernie45.ops.reference.rms_norm.
//
// Everything is computed in float32 and rounded once. x, residual, sum, out and their gradients are [rows, width] of
// `dtype`, the weight and its gradient [width] of `weight_dtype`, which is `dtype` or float32: of float32, float16,
// bfloat16. rows < 2^31. Pointers are to device memory. Where they and the rows are multiples of 16 bytes, threads read and
// write that much at once, and width <= 8192; elsewhere width <= 4096. No function waits for the device. All return
// cudaErrorInvalidValue for what they do not take.
#pragma once

#include "types.h"

// out = total / sqrt(mean(total^2) + epsilon) * weight, where total = x + residual, or x if residual is null; sum, if it
// is not null, becomes total. out and sum may be x or residual.
ERNIE45_API cudaError_t ernie45_cuda_rms_norm(const void* x, const void* residual, const void* weight, float epsilon,
                                              int64_t rows, int64_t width, int dtype, int weight_dtype, void* out,
                                              void* sum, cudaStream_t stream);

// How many rows of [width] float32 rms_norm_grad needs to sum up the gradient of the weight on the current device.
ERNIE45_API int64_t ernie45_cuda_rms_norm_grad_parts(int64_t rows, int64_t width, int dtype);

// The gradients of rms_norm for x [rows, width], which is the sum where there was a residual, and for the weight:
// with s = 1 / sqrt(mean(x^2) + epsilon) and h = weight * grad_out,
//   grad_x = s * (h - x * s^2 * mean(h * x)) + grad_sum, grad_weight = sum of grad_out * x * s over the rows.
// grad_sum [rows, width], which may be null, is the gradient of the other output, the sum; grad_x is then the gradient
// of the residual too. parts: see rms_norm_grad_parts; what it holds does not matter.
ERNIE45_API cudaError_t ernie45_cuda_rms_norm_grad(const void* x, const void* weight, const void* grad_out,
                                                   const void* grad_sum, float epsilon, int64_t rows, int64_t width,
                                                   int dtype, int weight_dtype, float* parts, void* grad_x,
                                                   void* grad_weight, cudaStream_t stream);

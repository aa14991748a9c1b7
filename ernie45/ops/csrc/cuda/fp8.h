// Conversion to and from FP8 (e4m3) with one float32 scale for each block. The definition is ernie45.ops.fp8.
//
// A matrix [rows, columns] becomes codes [rows, columns] and scales with x ~ codes * scales. A block is 1 x 128, with
// scales [rows, ceil(columns / 128)], or 128 x 128, with scales [ceil(rows / 128), ceil(columns / 128)]; blocks at the
// edges may be smaller. A block's scale is the largest finite magnitude in it divided by 448, or the smallest power of
// two that is not below this quotient; never under 2^-126; and 1 where the block holds no finite value but 0. The code
// of v is v * (1 / scale) rounded to nearest, ties to even, at most 448 in magnitude; NaN stays NaN (0x7f).
//
// Element types `dtype` are float32 and bfloat16, as in the definition; computation is in float32. Codes are passed as
// void*, one byte each. Pointers are to device memory; where they are multiples of 16 bytes and columns (for a
// transpose: rows) are multiples of 16, memory is accessed fastest. No function waits for the device. All return
// cudaErrorInvalidValue for sizes or types that they do not take: a matrix has less than 2^31 blocks of 1 x 128.
#pragma once

#include "types.h"

// Quantises x [rows, columns], reading it once. Either pair of outputs may be null:
// codes [rows, columns] with scales; and those of the transpose, transposed_codes [columns, rows] with
// transposed_scales [columns, ceil(rows / 128)], or for blocks of 128 x 128 [ceil(columns / 128), ceil(rows / 128)].
// `square` chooses blocks of 128 x 128, `power_of_two` the kind of scales.
ERNIE45_API cudaError_t ernie45_cuda_fp8_quantize(const void* x, int64_t rows, int64_t columns, int dtype, bool square,
                                                  bool power_of_two, void* codes, float* scales,
                                                  void* transposed_codes, float* transposed_scales,
                                                  cudaStream_t stream);

// The same in blocks of 128 x 128 for `count` matrices of one shape, such as the weights of experts, into stacked
// outputs: codes [count, rows, columns] with scales [count, ceil(rows / 128), ceil(columns / 128)], and
// transposed_codes [count, columns, rows] with transposed_scales. `matrices` is host memory, `count` pointers to device
// memory, and is read before the function returns; the matrices of one tensor are rows * columns elements apart.
ERNIE45_API cudaError_t ernie45_cuda_fp8_quantize_stack(const void* const* matrices, int64_t count, int64_t rows,
                                                        int64_t columns, int dtype, bool power_of_two, void* codes,
                                                        float* scales, void* transposed_codes,
                                                        float* transposed_scales, cudaStream_t stream);

// out [rows, columns] = codes * scales, in float32, rounded to `dtype`.
ERNIE45_API cudaError_t ernie45_cuda_fp8_dequantize(const void* codes, const float* scales, int64_t rows,
                                                    int64_t columns, bool square, int dtype, void* out,
                                                    cudaStream_t stream);

// Quantises silu(gate) * up * prob in blocks of 1 x 128, from x [rows, 2 * width] that holds gate, then up.
// prob [rows] is float32, or null for 1. codes [rows, width], scales [rows, ceil(width / 128)].
ERNIE45_API cudaError_t ernie45_cuda_swiglu_fp8_quantize(const void* x, const float* prob, int64_t rows, int64_t width,
                                                         int dtype, bool power_of_two, void* codes, float* scales,
                                                         cudaStream_t stream);

// The way back, from grad [rows, width], the gradient of silu(gate) * up * prob: quantising counts as doing nothing.
// Any of the outputs may be null, codes and scales together:
//   grad_x [rows, 2 * width], the gradient of gate and up, rounded to `dtype`, which grad has, too;
//   codes [rows, 2 * width] and scales [rows, 2 * width / 128], grad_x quantised in blocks of 1 x 128 (not the numbers
//     before they were rounded, so that a transpose quantised later agrees); only for widths that are multiples of 128;
//   grad_prob [rows], float32;
//   out [rows, width] = silu(gate) * up * prob in `dtype`, once more: the gradient of the weights behind it needs it.
ERNIE45_API cudaError_t ernie45_cuda_swiglu_fp8_quantize_backward(const void* x, const float* prob, const void* grad,
                                                                  int64_t rows, int64_t width, int dtype,
                                                                  bool power_of_two, void* grad_x, void* codes,
                                                                  float* scales, float* grad_prob, void* out,
                                                                  cudaStream_t stream);

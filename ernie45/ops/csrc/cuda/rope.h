// Rotary positions, in one and in three dimensions. The definitions are ernie45.ops.reference.rope_angles and rope.
//
// Everything is computed in float32 and rounded once, to `dtype`: float32, float16, bfloat16. Pointers are to device
// memory. tokens < 2^31; head_dim is even and at most 512. No function waits for the device. All return
// cudaErrorInvalidValue for what they do not take.
#pragma once

#include "types.h"

// cos, sin [tokens, pairs] of the angles position * frequencies[pair], float32.
// positions [tokens, axes]: with one axis, every pair takes it; with three (time, row, column), the last `time_pairs`
// pairs take the time, and before them even pairs take the row and odd pairs the column.
ERNIE45_API cudaError_t ernie45_cuda_rope_angles(const int64_t* positions, int64_t axes, const float* frequencies,
                                                 int64_t tokens, int64_t pairs, int64_t time_pairs, float* cos,
                                                 float* sin, cudaStream_t stream);

// Turns adjacent pairs (2j, 2j + 1) of every head by the angle with cos[j], sin[j] or, if `backward` is not 0, by its
// negative, which is the gradient: even * cos - odd * sin, odd * cos + even * sin.
// The heads of a token are neighbours; a token's q and k start q_stride and k_stride elements after those of the token
// before, so that they may be parts of one projection. q_out and k_out may be q and k with the same strides. k may have
// no heads. cos, sin [angle_tokens, head_dim / 2] float32, where token t takes row t % angle_tokens.
ERNIE45_API cudaError_t ernie45_cuda_rope(const void* q, int64_t q_stride, int64_t q_heads, const void* k,
                                          int64_t k_stride, int64_t k_heads, const float* cos, const float* sin,
                                          int64_t tokens, int64_t angle_tokens, int64_t head_dim, int backward,
                                          int dtype, void* q_out, int64_t q_out_stride, void* k_out,
                                          int64_t k_out_stride, cudaStream_t stream);

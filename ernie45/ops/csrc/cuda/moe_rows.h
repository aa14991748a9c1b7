// Copying tokens to the rows of their experts, and summing what comes back. The definitions are moe_permute and
// moe_combine in ernie45.ops.reference; moe_sort.h gives the slots and sources.
//
// Rows have `hidden` elements of type `dtype`: float32, float16, bfloat16, and where values are only moved float8, too.
// Everything is computed in float32 and rounded once, in an order that does not change from run to run. Rows of a
// multiple of 16 bytes at aligned addresses are read and written fastest. A slot outside 0 .. rows - 1 is a choice that
// was dropped: it adds nothing and gets a gradient of zero. Functions return cudaErrorInvalidValue for types that they
// do not take, for k beyond 32, and for tokens * k, rows or hidden beyond 2^30. None waits for the device.
#pragma once

#include "types.h"

// out [rows, hidden]: row slots[t, j] is row t of x [tokens, hidden], for all k slots of every token.
//   slots [tokens, k] int64; no two may be equal unless dropped.
//   sources [rows] int32: rows where it is negative become zeros; null if there are none or they do not matter.
ERNIE45_API cudaError_t ernie45_cuda_moe_permute(const void* x, const int64_t* slots, const int* sources,
                                                 int64_t tokens, int64_t k, int64_t hidden, int64_t rows, int dtype,
                                                 void* out, cudaStream_t stream);

// grad_x [tokens, hidden]: the sum of the k rows slots[t, :] of grad_out [rows, hidden].
ERNIE45_API cudaError_t ernie45_cuda_moe_permute_grad(const void* grad_out, const int64_t* slots, int64_t tokens,
                                                      int64_t k, int64_t hidden, int64_t rows, int dtype,
                                                      void* grad_x, cudaStream_t stream);

// out [tokens, hidden]: the sum over j of weights[t, j] * x[slots[t, j]].
//   x [rows, hidden]; weights [tokens, k] of type weights_dtype: float32, float16 or bfloat16.
ERNIE45_API cudaError_t ernie45_cuda_moe_combine(const void* x, const int64_t* slots, const void* weights,
                                                 int64_t tokens, int64_t k, int64_t hidden, int64_t rows, int dtype,
                                                 int weights_dtype, void* out, cudaStream_t stream);

// The gradients of moe_combine from that of its result, grad_out [tokens, hidden]:
//   grad_x [rows, hidden]: row slots[t, j] is weights[t, j] * grad_out[t]; for sources, see moe_permute.
//   grad_weights [tokens, k] of type weights_dtype: the sum of grad_out[t] * x[slots[t, j]], 0 where dropped.
ERNIE45_API cudaError_t ernie45_cuda_moe_combine_grad(const void* x, const int64_t* slots, const void* weights,
                                                      const void* grad_out, const int* sources, int64_t tokens,
                                                      int64_t k, int64_t hidden, int64_t rows, int dtype,
                                                      int weights_dtype, void* grad_x, void* grad_weights,
                                                      cudaStream_t stream);

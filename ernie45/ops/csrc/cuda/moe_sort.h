// Where the rows of every expert go. The definition is the order of ernie45.ops.reference.moe_permute, with two things
// more: each expert may get a multiple of rows, and choices may be dropped.
//
// A choice is a pair (token, place among its k). Choices whose expert is not in 0 .. experts - 1, such as -1 for those
// that another device computes, are dropped: they get no row.
#pragma once

#include "types.h"

// Rows that hold k copies of every token whatever they choose, if the rows of each expert are a multiple of `multiple`,
// at least 1: tokens * k for 1.
ERNIE45_API int64_t ernie45_cuda_moe_sort_rows(int64_t tokens, int64_t k, int64_t experts, int64_t multiple);

// Bytes of the workspace that moe_sort needs.
ERNIE45_API int64_t ernie45_cuda_moe_sort_workspace(int64_t tokens, int64_t k, int64_t experts);

// Sorts the choices by expert, and those of one expert by token. Every row of an expert that is left over comes after
// its choices. Takes 1 to 1024 experts and less than 2^31 rows, else gives cudaErrorInvalidValue.
//   indices [tokens, k] int64, the expert of every choice.
//   counts [experts] int64: the choices of each expert.
//   offsets [experts + 1] int64: expert e owns the rows offsets[e] .. offsets[e + 1] - 1.
//   slots [tokens, k] int64: the row of every choice, -1 for those that are dropped.
//   sources [moe_sort_rows] int32: the token in every row, -1 in those that hold none; may be null.
//   workspace: uninitialised, aligned to 4 bytes.
ERNIE45_API cudaError_t ernie45_cuda_moe_sort(const int64_t* indices, int64_t tokens, int64_t k, int64_t experts,
                                              int64_t multiple, int64_t* counts, int64_t* offsets, int64_t* slots,
                                              int* sources, void* workspace, cudaStream_t stream);

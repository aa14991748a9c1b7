// Choosing the experts of every token. The definition is ernie45.ops.reference.moe_gate.
//
// Everything is float32, indices and counts int64. A function returns cudaErrorInvalidValue for experts beyond 256, k
// beyond 32 or the number of experts, and 2^31 tokens or more. No function waits for the device.
#pragma once

#include "types.h"

// Chooses the k experts with the largest probability plus bias, the largest first and of equals the lower index. NaN
// counts as the largest.
//   logits [tokens, experts]; bias [experts], or null.
//   softmax: over the experts of a token; otherwise the sigmoid of each logit.
//   normalise: the weights of a token are divided by their sum, or by `minimum` if the sum is below it.
//   probabilities [tokens, experts], without the bias; may be null.
//   indices, weights [tokens, k].
//   counts [experts]: how many tokens chose each expert; may be null.
ERNIE45_API cudaError_t ernie45_cuda_moe_gate(const float* logits, const float* bias, int64_t tokens, int64_t experts,
                                              int64_t k, bool softmax, bool normalise, float minimum,
                                              float* probabilities, int64_t* indices, float* weights, int64_t* counts,
                                              cudaStream_t stream);

// grad_logits [tokens, experts], from what moe_gate returned and the gradients of that, each of which may be null for
// zeros: grad_probabilities [tokens, experts] and grad_weights [tokens, k]. The bias has no gradient.
ERNIE45_API cudaError_t ernie45_cuda_moe_gate_grad(const float* probabilities, const int64_t* indices,
                                                   const float* grad_probabilities, const float* grad_weights,
                                                   int64_t tokens, int64_t experts, int64_t k, bool softmax,
                                                   bool normalise, float minimum, float* grad_logits,
                                                   cudaStream_t stream);

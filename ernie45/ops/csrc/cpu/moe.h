// Routing tokens to experts: the gate, the stable sort of (token, choice) pairs by expert, and the weighted sum of what
// the experts return. Everything runs on the calling thread; callers split the tokens among threads, except for
// moe_permute, which needs all of them.
#pragma once

#include <cstdint>

#include "isa.h"

ERNIE_FOR_EACH_ISA(
    // Chooses the k experts with the largest probability plus bias for every token, the largest first and of equals the
    // lower index. NaN counts as the largest.
    //   logits [tokens, experts]; bias [experts] or null.
    //   softmax: over the experts; otherwise the sigmoid of each.
    //   normalise: the weights of a token are divided by their sum, or by `minimum` if the sum is below it.
    //   probabilities [tokens, experts], without the bias; may be null.
    //   indices, weights [tokens, k].
    void moe_gate(const float* logits, const float* bias, int64_t tokens, int64_t experts, int64_t k, bool softmax,
                  bool normalise, float minimum, float* probabilities, int64_t* indices, float* weights);

    // The gradient of moe_gate for the logits, from what it returned and the gradients of that.
    void moe_gate_grad(const float* probabilities, const int64_t* indices, const float* grad_probabilities,
                       const float* grad_weights, int64_t tokens, int64_t experts, int64_t k, bool softmax,
                       bool normalise, float minimum, float* grad_logits);

    // Sorts the pairs (token, choice) by expert, stably.
    //   indices [tokens, k], each in 0 .. experts - 1.
    //   counts [experts]; offsets [experts + 1]: expert e owns the slots offsets[e] .. offsets[e + 1] - 1.
    //   sources [tokens * k]: the token in every slot.
    //   slots [tokens, k]: the slot of every pair.
    void moe_permute(const int64_t* indices, int64_t tokens, int64_t k, int64_t experts, int64_t* counts,
                     int64_t* offsets, int64_t* sources, int64_t* slots);

    // out [tokens, width]: the sum over j of weights[token, j] * rows[slots[token, j]]; null weights count as 1.
    void moe_combine(const float* rows, const int64_t* slots, const float* weights, int64_t tokens, int64_t k,
                     int64_t width, float* out);

    // The gradients of moe_combine: grad_rows [slots of these tokens, width] and grad_weights [tokens, k].
    void moe_combine_grad(const float* rows, const int64_t* slots, const float* weights, const float* grad_out,
                          int64_t tokens, int64_t k, int64_t width, float* grad_rows, float* grad_weights);)

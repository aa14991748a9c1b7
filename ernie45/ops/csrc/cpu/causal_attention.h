// Causal grouped-query attention for training: forward and backward, one head at a time in blocks of queries, so that
// no more than the scores of one block are there. Operands of products are rounded to bfloat16, all else is float32.
//
// Nothing but queries, keys and values is needed for the backward pass: scores and probabilities are computed again
// (Dao et al., arXiv 2205.14135), and whole rows of them are there.
#pragma once

#include <cstdint>

#include "isa.h"

namespace ernie {

// Bfloat16 [batch, tokens, heads or kv_heads, head_dim] each.
struct CausalAttention {
  const uint16_t *query, *key, *value;
  const int64_t* ends;  // [batch, tokens] the first row that may no longer see the key; null: every later one may
  int64_t batch, tokens, heads, kv_heads, head_dim;
  float scale;
};


// Where the gradients go: [batch, tokens, heads, head_dim], those of key and value for each head apart.
struct CausalAttentionGradient {
  const float* out;
  float *query, *key, *value;
};

}  // namespace ernie

ERNIE_FOR_EACH_ISA(
  // Bytes of one thread's buffer.
  int64_t causal_attention_bytes(const CausalAttention& task);

  // out [batch, tokens, heads, head_dim] of one head of one row of the batch. A token that sees no key gets zeros.
  void causal_attention(const CausalAttention& task, int64_t row, int64_t head, void* memory, float* out);

  // The gradients for one head.
  void causal_attention_gradient(const CausalAttention& task, int64_t row, int64_t head, void* memory,
                                 const CausalAttentionGradient& gradient);
)

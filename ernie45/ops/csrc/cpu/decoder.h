// The whole decoder in one call, from token ids to normed hidden states, for inference on packed weights.
//
// One parallel region runs all layers; the threads meet at barriers between the steps of a layer. Nothing is allocated
// inside, and a token pays neither for Python nor for Paddle between two products.
#pragma once

#include <cstdint>
#include <vector>

#include "packed.h"

namespace ernie {

// SwiGLU feed-forward network; with `experts` > 1 stacked ones, of which `packed` describes the first.
struct FeedForward {
  PackedMatrix up_gate{}, down{};
  int64_t experts = 0;  // 0: absent
  int64_t width() const { return down.in; }
};

// Routed experts with their own router; every token belongs to one bank and never sees the others.
struct ExpertBank {
  FeedForward network;
  const float* router;       // [hidden, experts]
  const float* router_bias;  // [experts] or null
};

struct DecoderLayer {
  const float* input_norm;
  const float* post_norm;
  PackedMatrix qkv, out;
  FeedForward dense;              // the MLP, or the shared experts of a mixture
  std::vector<ExpertBank> banks;  // none in dense layers
  uint16_t* keys;                 // bfloat16 [batch, capacity, kv_heads, head_dim]
  uint16_t* values;
};

struct DecoderConfig {
  int64_t hidden, heads, kv_heads, head_dim;
  float epsilon, attention_scale;
  int64_t moe_k;
  bool moe_softmax, moe_normalise;
  float moe_minimum;
  int64_t time_pairs;  // of the head_dim / 2 rotary pairs, the last that take the time of three positions
};

struct DecoderWeights {
  PackedMatrix embedding;      // its columns are the tokens
  const float* frequencies;    // [head_dim / 2] radians per position
  std::vector<DecoderLayer> layers;
  const float* final_norm;     // [hidden]
};

struct DecoderInput {
  const int64_t* ids;        // [batch * tokens]; below 0: row -1 - id of the features takes the place of an embedding
  const float* features;     // [any, hidden] or null
  const int64_t* positions;  // [batch * tokens, axes]
  int64_t axes;              // 1, or 3 for (time, row, column)
  const int64_t* banks;      // [batch * tokens] the bank of each token, or null: the first one
  const int64_t* first;      // [batch] first key that a row may see
  int64_t batch, tokens, cached, capacity;
  float* out;                // [batch * tokens, hidden]
};

void run_decoder(const DecoderConfig& config, const DecoderWeights& weights, const DecoderInput& input);

}  // namespace ernie

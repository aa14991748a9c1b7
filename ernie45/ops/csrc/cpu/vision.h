// The whole vision tower in one call, from normalised pixels to normed vectors, for inference on packed weights.
//
// One parallel region runs all blocks. A block is two phases: whatever concerns patches one by one, in chunks of rows
// that a thread takes through all of it, and attention, in pieces of one head of a frame; the threads meet between.
#pragma once

#include <cstdint>
#include <vector>

#include "packed.h"

namespace ernie {

// A linear map with its bias [out].
struct BiasedMatrix {
  PackedMatrix weight{};
  const float* bias;
};

// LayerNorm: scale and shift [width].
struct NormWeights {
  const float *weight, *bias;
};

struct VisionBlock {
  NormWeights norm1, norm2;
  BiasedMatrix qkv, proj, fc1, fc2;
};

struct VisionWeights {
  int64_t heads, head_dim;
  float epsilon;
  PackedMatrix patch_embed;  // [patch_bytes, width]
  std::vector<VisionBlock> blocks;
  NormWeights norm;
  int64_t width() const { return patch_embed.out; }
};

struct VisionInput {
  const float* pixels;           // [patches, patch_bytes]
  const float *cos, *sin;        // [patches, head_dim / 2]
  std::vector<int64_t> lengths;  // patches of each frame, their sum is `patches`
  int64_t patches;
  float* out;                    // [patches, width]
};

void run_vision(const VisionWeights& weights, const VisionInput& input);

}  // namespace ernie

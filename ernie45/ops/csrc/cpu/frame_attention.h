// Attention inside each frame of the vision tower, in both directions: every patch of a frame sees all of them.
//
// Keys and values lie as the tile product reads them (tile.h), written once where they are computed. A frame takes as
// many slots as it has patches, rounded up to 16, so that no panel holds keys of two frames. Online softmax over blocks
// of keys (arXiv 2205.14135); queries, probabilities and results are rounded to bfloat16, sums are float32.
#pragma once

#include <cstdint>

#include "isa.h"

namespace ernie {

// Patches row .. row + patches - 1, with their keys and values from `slot` on.
struct Frame {
  int64_t row, slot, patches;
  int64_t slots() const { return (patches + 15) / 16 * 16; }
};

// bfloat16 buffers of all frames of a call.
struct FrameBuffers {
  int64_t heads, head_dim, rows, slots;
  uint16_t* queries;  // [heads, rows, head_dim], scaled by 1 / (sqrt(head_dim) ln 2); results take their place
  uint16_t* keys;     // [heads, slots, head_dim]: per frame panels of 80 slots, the last as wide as is left; a panel is
                      // [head_dim / 2][slots][2], with anything where there is no patch
  uint16_t* values;   // [heads, slots / 2, padded_dim, 2], zero where there is no patch
  int64_t padded_dim() const { return (head_dim + 15) / 16 * 16; }
};

constexpr int64_t kFrameQueries = 160;     // queries of one head that make a piece of work
constexpr int64_t kLargestFrameHead = 256;

}  // namespace ernie

ERNIE_FOR_EACH_ISA(
  // Bytes of the buffer that a thread needs for one piece.
  int64_t frame_scratch_bytes(const FrameBuffers& buffers);

  // Stores the query, key and value of the patches first_row .. first_row + rows - 1; frames[row] is the frame of a row.
  // fused [rows, 3 * heads * head_dim] holds their projections, to which the bias of that width is added. Queries and
  // keys are turned, element j of a head against element j + head_dim / 2, by the angle with cos[row, j] and
  // sin[row, j]; queries are scaled.
  void store_patches(const FrameBuffers& buffers, const float* fused, const float* bias, const float* cos,
                     const float* sin, const Frame* const* frames, int64_t first_row, int64_t rows);

  // Replaces the queries first .. first + count - 1 of a head in a frame by their results; count <= kFrameQueries.
  void attend_frame(const FrameBuffers& buffers, const Frame& frame, int64_t head, int64_t first, int64_t count,
                    void* scratch);
)

#include "frame_attention.h"

#include <cmath>
#include <cstring>

#include "exp.h"
#include "memory.h"
#include "tile.h"

namespace ernie::ERNIE_ISA {
namespace {

constexpr int kRows = 5;                          // of a tile: 25 sums, 5 vectors of weights and one of a row fit into
constexpr int kVectors = 5;                       // the registers of AVX-512, and head_dim 80 is five vectors
constexpr int64_t kPanelKeys = kVectors * kVector;
constexpr int64_t kBlockKeys = 8 * kPanelKeys;    // keys and values of a block stay in the second cache

// One thread's buffers for a piece.
struct Scratch {
  uint16_t* query;          // [kFrameQueries, head_dim]
  float* sums;              // [kFrameQueries, padded_dim]
  float* largest;           // [kFrameQueries] score so far
  float* total;             // [kFrameQueries] of the probabilities
  float* scores;            // [kRows, kBlockKeys]
  uint16_t* probabilities;  // [kRows, kBlockKeys]
};

Scratch carve(const FrameBuffers& buffers, void* memory, int64_t* bytes) {
  uint8_t* start = static_cast<uint8_t*>(memory);
  int64_t used = 0;
  auto take = [&](int64_t size) {
    void* taken = start + used;
    used += whole_lines(size);
    return taken;
  };
  Scratch s;
  s.query = static_cast<uint16_t*>(take(kFrameQueries * buffers.head_dim * 2));
  s.sums = static_cast<float*>(take(kFrameQueries * buffers.padded_dim() * 4));
  s.largest = static_cast<float*>(take(kFrameQueries * 4));
  s.total = static_cast<float*>(take(kFrameQueries * 4));
  s.scores = static_cast<float*>(take(kRows * kBlockKeys * 4));
  s.probabilities = static_cast<uint16_t*>(take(kRows * kBlockKeys * 2));
  if (bytes) *bytes = used;
  return s;
}

static_assert(kFrameQueries % kRows == 0, "a piece is whole tiles");

// The product of tile.h for kRows rows and any number of vectors up to kVectors.
void tile(int64_t columns, const uint16_t* a, int64_t a_stride, const uint16_t* panel, int64_t panel_stride,
          int64_t pairs, float* c, int64_t c_stride, const float* factors) {
  switch (columns / kVector) {
    case 1: return bfloat16_tile<kRows, 1>(a, a_stride, panel, panel_stride, pairs, c, c_stride, factors);
    case 2: return bfloat16_tile<kRows, 2>(a, a_stride, panel, panel_stride, pairs, c, c_stride, factors);
    case 3: return bfloat16_tile<kRows, 3>(a, a_stride, panel, panel_stride, pairs, c, c_stride, factors);
    case 4: return bfloat16_tile<kRows, 4>(a, a_stride, panel, panel_stride, pairs, c, c_stride, factors);
    default: return bfloat16_tile<kRows, kVectors>(a, a_stride, panel, panel_stride, pairs, c, c_stride, factors);
  }
}

// Turns the scores of one row, powers of two, into probabilities relative to the largest score so far; returns the
// factor that makes the earlier sums relative to it too. Only the first `visible` of `count` keys exist.
float soften(float* scores, int64_t visible, int64_t count, float* largest, float* total, uint16_t* probabilities) {
  for (int64_t k = visible; k < count; ++k) scores[k] = -INFINITY;
  float peak = *largest;  // if all scores have overflowed to -infinity, the total becomes NaN
#pragma omp simd reduction(max : peak)
  for (int64_t k = 0; k < count; ++k) peak = scores[k] > peak ? scores[k] : peak;  // and so does a NaN
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t k = 0; k < count; ++k) {
    const float value = exp2_of_negative(scores[k] - peak);
    scores[k] = value;
    sum += value;
  }
  round_row(scores, count, probabilities);
  const float factor = exp2_of_negative(*largest - peak);
  *total = *total * factor + sum;
  *largest = peak;
  return factor;
}

// One tile of queries against one block of keys.
void attend_block(const FrameBuffers& buffers, const Frame& frame, const uint16_t* keys, const uint16_t* values,
                  int64_t first_key, const Scratch& s, int64_t query) {
  const int64_t dim = buffers.head_dim, padded = buffers.padded_dim();
  const int64_t left = frame.slots() - first_key, count = left < kBlockKeys ? left : kBlockKeys;
  for (int64_t key = 0; key < count; key += kPanelKeys) {
    const int64_t columns = count - key < kPanelKeys ? count - key : kPanelKeys;
    tile(columns, s.query + query * dim, dim, keys + key * dim, 2 * columns, dim / 2, s.scores + key, kBlockKeys,
         nullptr);
  }
  float factors[kRows];
  const int64_t exist = frame.patches - first_key, visible = exist < count ? exist : count;
  for (int r = 0; r < kRows; ++r)
    factors[r] = soften(s.scores + r * kBlockKeys, visible, count, s.largest + query + r, s.total + query + r,
                        s.probabilities + r * kBlockKeys);
  for (int64_t column = 0; column < padded; column += kPanelKeys) {
    const int64_t columns = padded - column < kPanelKeys ? padded - column : kPanelKeys;
    tile(columns, s.probabilities, kBlockKeys, values + column * 2, 2 * padded, count / 2,
         s.sums + query * padded + column, padded, factors);
  }
}

// out [2 * half] = x + bias, of which element j is turned against element j + half, times scale.
void turn(const float* x, const float* bias, const float* cos, const float* sin, int64_t half, float scale,
          uint16_t* out, float* turned) {
#pragma omp simd
  for (int64_t j = 0; j < half; ++j) {
    const float left = x[j] + bias[j], right = x[j + half] + bias[j + half];
    turned[j] = (left * cos[j] - right * sin[j]) * scale;
    turned[j + half] = (right * cos[j] + left * sin[j]) * scale;
  }
  round_row(turned, 2 * half, out);
}

}  // namespace

int64_t frame_scratch_bytes(const FrameBuffers& buffers) {
  int64_t bytes;
  carve(buffers, nullptr, &bytes);
  return bytes;
}

void store_patches(const FrameBuffers& buffers, const float* fused, const float* bias, const float* cos,
                   const float* sin, const Frame* const* frames, int64_t first_row, int64_t rows) {
  const int64_t dim = buffers.head_dim, half = dim / 2, width = buffers.heads * dim, padded = buffers.padded_dim();
  const float scale = 1.44269504f / std::sqrt(static_cast<float>(dim));
  float turned[kLargestFrameHead];
  uint16_t rounded[kLargestFrameHead];
  // Head by head: what is written for neighbouring patches lies in the same cache lines.
  for (int64_t head = 0; head < buffers.heads; ++head) {
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t row = first_row + r;
      const Frame& frame = *frames[row];
      const int64_t patch = row - frame.row, panel = patch / kPanelKeys * kPanelKeys;
      const float *x = fused + r * 3 * width + head * dim, *offset = bias + head * dim;
      const float *c = cos + row * half, *s = sin + row * half;
      turn(x, offset, c, s, half, scale, buffers.queries + (head * buffers.rows + row) * dim, turned);

      turn(x + width, offset + width, c, s, half, 1, rounded, turned);
      const int64_t left = frame.slots() - panel, columns = left < kPanelKeys ? left : kPanelKeys;
      uint16_t* key = buffers.keys + (head * buffers.slots + frame.slot + panel) * dim + (patch - panel) * 2;
      for (int64_t p = 0; p < half; ++p) std::memcpy(key + p * columns * 2, rounded + 2 * p, 4);

#pragma omp simd
      for (int64_t i = 0; i < dim; ++i) turned[i] = x[2 * width + i] + offset[2 * width + i];
      round_row(turned, dim, rounded);
      const int64_t place = (head * buffers.slots + frame.slot + patch / 2 * 2) * padded + patch % 2;
      for (int64_t i = 0; i < dim; ++i) buffers.values[place + 2 * i] = rounded[i];
    }
  }
}

void attend_frame(const FrameBuffers& buffers, const Frame& frame, int64_t head, int64_t first, int64_t count,
                  void* memory) {
  const int64_t dim = buffers.head_dim, padded = buffers.padded_dim();
  const int64_t tiled = (count + kRows - 1) / kRows * kRows;  // rows of zeros complete the last tile
  const Scratch s = carve(buffers, memory, nullptr);
  uint16_t* queries = buffers.queries + (head * buffers.rows + frame.row + first) * dim;
  std::memcpy(s.query, queries, count * dim * 2);
  std::memset(s.query + count * dim, 0, (tiled - count) * dim * 2);
  std::memset(s.sums, 0, tiled * padded * 4);
  for (int64_t r = 0; r < tiled; ++r) {
    s.largest[r] = -INFINITY;
    s.total[r] = 0;
  }
  const uint16_t* keys = buffers.keys + (head * buffers.slots + frame.slot) * dim;
  const uint16_t* values = buffers.values + (head * buffers.slots + frame.slot) * padded;
  for (int64_t key = 0; key < frame.patches; key += kBlockKeys)
    for (int64_t query = 0; query < tiled; query += kRows)
      attend_block(buffers, frame, keys + key * dim, values + key * padded, key, s, query);
  for (int64_t r = 0; r < count; ++r) {
    const float inverse = 1 / s.total[r];
    for (int64_t i = 0; i < dim; ++i) s.sums[r * padded + i] *= inverse;
    round_row(s.sums + r * padded, dim, queries + r * dim);
  }
}

}  // namespace ernie::ERNIE_ISA

#include "quantize.h"

#include <cmath>
#include <cstring>

#include "parallel.h"

namespace ernie::ERNIE_ISA {
namespace {

constexpr float kSmallestScale = 0x1p-126f;  // the smallest normal number: channels of zeros have a scale too
constexpr uint32_t kMagnitude = 0x7fffffff;  // all bits but the sign

inline float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t as_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float widen(uint16_t bfloat16) { return as_float(static_cast<uint32_t>(bfloat16) << 16); }
inline float widen(float value) { return value; }

inline float round_to_bfloat16(float value) {
  const uint32_t bits = as_bits(value);
  return as_float((bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000);
}

// Comparing magnitudes as integers puts NaN above infinity above all numbers: none is overlooked.
inline uint32_t larger(uint32_t a, uint32_t b) { return a > b ? a : b; }

// 8 bits: one scale per output channel.

constexpr int64_t kBlock = 2048;  // channels at a time: rows of a page of BF16, and their maxima stay in the cache

template <class Element>
void int8_block(const Element* weight, int64_t in, int64_t out, int64_t width, int8_t* codes, float* scales) {
  uint32_t largest[kBlock] = {};
  float inverse[kBlock];
  for (int64_t i = 0; i < in; ++i) {
    const Element* row = weight + i * out;
#pragma omp simd
    for (int64_t c = 0; c < width; ++c) largest[c] = larger(largest[c], as_bits(widen(row[c])) & kMagnitude);
  }
  for (int64_t c = 0; c < width; ++c) {
    const float scale = as_float(largest[c]) / 127.0f;
    scales[c] = scale < kSmallestScale ? kSmallestScale : scale;
    inverse[c] = 1.0f / scales[c];
  }
  for (int64_t i = 0; i < in; ++i) {
    const Element* row = weight + i * out;
    int8_t* target = codes + i * out;
#pragma omp simd
    for (int64_t c = 0; c < width; ++c)
      target[c] = static_cast<int8_t>(static_cast<int32_t>(std::rint(widen(row[c]) * inverse[c])));
  }
}

template <class Element>
void int8_columns(const Element* weight, int64_t in, int64_t out, int8_t* codes, float* scales) {
  parallel_for(out, 256, [&](int64_t first, int64_t last) {
    for (int64_t c = first; c < last; c += kBlock)
      int8_block(weight + c, in, out, std::min(kBlock, last - c), codes + c, scales + c);
  });
}

// 4 bits: one scale per group of 64 inputs and output channel.

// Scales tried: the largest weight over these. 7 keeps both ends in range, 8 gives it the code -8, more clips it a
// little; together they leave 0.71 of the squared error of 7 alone on normal weights.
constexpr float kDivisors[] = {7.0f, 8.0f, 8.5f, 9.0f};
constexpr int64_t kColumns = 32;

struct Tile {
  alignas(64) float weight[kQuantGroup][kColumns];  // zero where the group or the weight ends earlier
  alignas(64) float largest[kColumns];
  alignas(64) float negative[kColumns];  // 1 where the largest is positive, so that it takes the code -8
};

void load_tile(const uint16_t* weight, int64_t rows, int64_t out, int64_t width, Tile& tile) {
  float highest[kColumns] = {}, lowest[kColumns] = {};
  uint32_t largest[kColumns] = {};
  std::memset(tile.weight, 0, sizeof tile.weight);
  for (int64_t i = 0; i < rows; ++i) {
    const uint16_t* row = weight + i * out;
    float* target = tile.weight[i];
    if (width == kColumns) {
#pragma omp simd
      for (int64_t c = 0; c < kColumns; ++c) target[c] = widen(row[c]);
    } else {
      for (int64_t c = 0; c < width; ++c) target[c] = widen(row[c]);
    }
#pragma omp simd
    for (int64_t c = 0; c < kColumns; ++c) {
      highest[c] = target[c] > highest[c] ? target[c] : highest[c];
      lowest[c] = target[c] < lowest[c] ? target[c] : lowest[c];
      largest[c] = larger(largest[c], as_bits(target[c]) & kMagnitude);
    }
  }
  for (int64_t c = 0; c < kColumns; ++c) {
    tile.largest[c] = as_float(largest[c]);
    tile.negative[c] = highest[c] > -lowest[c] ? 1.0f : 0.0f;
  }
}

inline int32_t code_of(float weight, float inverse) {
  const int32_t code = static_cast<int32_t>(std::rint(weight * inverse));  // below 10 in magnitude, or NaN
  const int32_t upper = code < 7 ? code : 7;
  return upper > -8 ? upper : -8;
}

inline float scale_of(const Tile& tile, int64_t column, float divisor) {
  const float exact = tile.largest[column] / divisor;
  const float rounded = round_to_bfloat16(exact < kSmallestScale ? kSmallestScale : exact);
  return tile.negative[column] != 0.0f ? -rounded : rounded;
}

// Tries the scale largest / divisor, and keeps it where the squared error, less the sum of squared weights, falls.
void try_scale(const Tile& tile, float divisor, float* best_scale, float* best_score) {
  alignas(64) float scale[kColumns], inverse[kColumns];
  alignas(64) float product[kColumns] = {};
  alignas(64) int32_t square[kColumns] = {};
  for (int64_t c = 0; c < kColumns; ++c) {
    scale[c] = scale_of(tile, c, divisor);
    inverse[c] = 1.0f / scale[c];
  }
  for (int64_t i = 0; i < kQuantGroup; ++i) {
#pragma omp simd
    for (int64_t c = 0; c < kColumns; ++c) {
      const float weight = tile.weight[i][c];
      const int32_t code = code_of(weight, inverse[c]);
      product[c] += weight * static_cast<float>(code);  // 8 bits by 4 bits: exact, fused or not
      square[c] += code * code;
    }
  }
  for (int64_t c = 0; c < kColumns; ++c) {
    const float score = (scale[c] * static_cast<float>(square[c]) - 2.0f * product[c]) * scale[c];  // both products are exact
    if (score < best_score[c]) {
      best_score[c] = score;
      best_scale[c] = scale[c];
    }
  }
}

void store_codes(const Tile& tile, const float* scale, int64_t rows, int64_t out, int64_t width, int8_t* codes) {
  alignas(64) float inverse[kColumns];
  for (int64_t c = 0; c < kColumns; ++c) inverse[c] = 1.0f / scale[c];
  for (int64_t i = 0; i < rows; i += 2) {
    int8_t packed[kColumns];
#pragma omp simd
    for (int64_t c = 0; c < kColumns; ++c) {
      const int32_t even = code_of(tile.weight[i][c], inverse[c]);
      const int32_t odd = code_of(tile.weight[i + 1][c], inverse[c]);
      packed[c] = static_cast<int8_t>((even & 15) | (odd * 16));
    }
    std::memcpy(codes + i / 2 * out, packed, width);
  }
}

void int4_tile(const uint16_t* weight, int64_t rows, int64_t out, int64_t width, int8_t* codes, uint16_t* scales) {
  Tile tile;
  alignas(64) float scale[kColumns], score[kColumns];
  load_tile(weight, rows, out, width, tile);
  for (int64_t c = 0; c < kColumns; ++c) {
    scale[c] = scale_of(tile, c, kDivisors[0]);  // stays where scores overflow
    score[c] = INFINITY;
  }
  for (const float divisor : kDivisors) try_scale(tile, divisor, scale, score);
  store_codes(tile, scale, rows, out, width, codes);
  for (int64_t c = 0; c < width; ++c) scales[c] = static_cast<uint16_t>(as_bits(scale[c]) >> 16);
}

}  // namespace

void quantize_int8(const uint16_t* weight, int64_t in, int64_t out, int8_t* codes, float* scales) {
  int8_columns(weight, in, out, codes, scales);
}

void quantize_int8(const float* weight, int64_t in, int64_t out, int8_t* codes, float* scales) {
  int8_columns(weight, in, out, codes, scales);
}

void quantize_int4(const uint16_t* weight, int64_t in, int64_t out, int8_t* codes, uint16_t* scales) {
  const int64_t groups = (in + kQuantGroup - 1) / kQuantGroup, blocks = (out + kColumns - 1) / kColumns;
  parallel_for(groups * blocks, 16, [&](int64_t first, int64_t last) {
    for (int64_t task = first; task < last; ++task) {
      const int64_t group = task / blocks, column = task % blocks * kColumns, row = group * kQuantGroup;
      int4_tile(weight + row * out + column, std::min(kQuantGroup, in - row), out, std::min(kColumns, out - column),
                codes + row / 2 * out + column, scales + group * out + column);
    }
  });
}

}  // namespace ernie::ERNIE_ISA

// Conversion to and from FP8 (e4m3: 4 bits of exponent, 3 of mantissa, no infinity, largest value 448) with one scale
// for each block of 1 x 128 or 128 x 128 values. Each function works on its part alone, on the calling thread: callers
// split rows or tiles among threads. T is float, or uint16_t for the bits of bfloat16.
//
// A block's scale s is the largest finite magnitude in it divided by 448, or the smallest power of two that is not
// below this quotient; never under 2^-126, so that 1 / s is finite; and 1 where the block holds no finite value but 0.
// The code of v is v * (1 / s) rounded to nearest, ties to even, at most 448 in magnitude; NaN stays NaN.
#pragma once

#include <cstdint>

#include "isa.h"

namespace ernie {

constexpr int kFp8Block = 128;

static inline int64_t fp8_blocks(int64_t size) { return (size + kFp8Block - 1) / kFp8Block; }

// What to make of a matrix [rows, columns]. Either pair of outputs may be null.
struct Fp8Quantization {
  int64_t rows, columns;
  bool square;        // blocks of 128 x 128, not 1 x 128
  bool power_of_two;  // scales
  uint8_t* codes = nullptr;             // [rows, columns]
  float* scales = nullptr;              // [rows, column blocks], square: [row blocks, column blocks]
  uint8_t* transposed_codes = nullptr;  // [columns, rows]
  float* transposed_scales = nullptr;   // [columns, row blocks], square: [column blocks, row blocks]
};

}  // namespace ernie

ERNIE_FOR_EACH_ISA(
    // codes [rows, columns] and scales [rows, column blocks] of x [rows, columns] in blocks of 1 x 128.
    template <class T>
    void fp8_quantize_rows(const T* x, int64_t rows, int64_t columns, bool power_of_two, uint8_t* codes, float* scales);

    // Everything that `wanted` asks for in the tile of 128 x 128 values that begins at x[first_row][first_column].
    template <class T>
    void fp8_quantize_tile(const T* x, const Fp8Quantization& wanted, int64_t first_row, int64_t first_column);

    // out [rows, columns] = codes * scales. Row i of the codes has its scales at scales[i / block_rows][column block];
    // first_row is the index of the first of these rows in the whole matrix, where `codes` and `out` point.
    template <class T>
    void fp8_dequantize_rows(const uint8_t* codes, const float* scales, int64_t block_rows, int64_t first_row,
                             int64_t rows, int64_t columns, T* out);

    // fp8_quantize_rows of silu(gate) * up * prob [rows, width]; x [rows, 2 * width] holds gate, then up; prob [rows]
    // or null for 1.
    template <class T>
    void swiglu_fp8_quantize_rows(const T* x, const float* prob, int64_t rows, int64_t width, bool power_of_two,
                                  uint8_t* codes, float* scales);)

// Products of training, where both sides are plain matrices and change at every step: float32 or bfloat16 in memory,
// rounded to bfloat16 while they are packed, multiplied with sums in float32.
#pragma once

#include <cstdint>

#include "isa.h"

namespace ernie {

// Rows or columns, and numbers that are summed over, which are packed together.
constexpr int64_t kPackedRows = 16;
constexpr int64_t kPackedInner = 32;

// Element (r, c) is number r * stride + c of the data, or c * stride + r if it lies transposed in memory.
struct Matrix {
  const void* data;
  bool bfloat16;  // else float32
  bool transposed;
  int64_t rows, columns, stride;
};

// Where a product goes.
struct Target {
  void* data;
  bool bfloat16;  // rounded once at the end, else float32
  bool add;       // to what is there; float32 only
  int64_t stride;
};

// c [a.rows, b.columns] = a times b, on all threads.
void matmul(const Matrix& a, const Matrix& b, const Target& c);

}  // namespace ernie

ERNIE_FOR_EACH_ISA(
  // out [r * out_stride + i] = a (first_row + r, first + i) in bfloat16, zero from a.columns on, for `rows` rows and
  // `count` numbers, a multiple of kPackedInner.
  void pack_rows(const Matrix& a, int64_t first_row, int64_t rows, int64_t first, int64_t count, uint16_t* out,
                 int64_t out_stride);

  // A panel [count / 2][64 columns][2] of b in bfloat16: columns from `column` on, of rows from `first` on. Zero
  // outside; count as above.
  void pack_panel(const Matrix& b, int64_t column, int64_t first, int64_t count, uint16_t* panel);

  // c [rows, columns] = a [rows, 2 * pairs] times panels, which lie `panel_size` numbers apart.
  void multiply_rows(const uint16_t* a, int64_t a_stride, int64_t rows, const uint16_t* panels, int64_t panel_size,
                     int64_t pairs, int64_t columns, const Target& c);
)

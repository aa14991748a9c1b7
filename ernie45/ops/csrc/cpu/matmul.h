// Products of training: sides are float32 or bfloat16 in memory, or a packed weight. They are rounded to bfloat16 while
// they are packed for this product, and multiplied with sums in float32.
#pragma once

#include <cstdint>

#include "isa.h"
#include "packed.h"

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

// `count` rounded up to whole packed pieces.
inline int64_t whole_pieces(int64_t count) { return (count + kPackedInner - 1) / kPackedInner * kPackedInner; }

// c [a.rows, b.columns] = a times b, on all threads. With `below`, as wide as b, that matrix stands below b, from row
// whole_pieces(b.rows) on, and zeros between them; a has columns for all these rows.
void matmul(const Matrix& a, const Matrix& b, const Target& c, const Matrix* below = nullptr);

// c [a.rows, weight.in] = a times the transpose of the weight, or of that and `below`.
void matmul_transposed(const Matrix& a, const PackedMatrix& weight, const Target& c, const Matrix* below = nullptr);

// out [r * out_stride + i] = element (r, i) of a in bfloat16 for all its rows and, rounded up to whole pieces, columns
// (zeros beyond the last), on all threads.
void round_rows(const Matrix& a, uint16_t* out, int64_t out_stride);

}  // namespace ernie

ERNIE_FOR_EACH_ISA(
  // out [r * out_stride + i] = a (first_row + r, first + i) in bfloat16, zero from a.columns on, for `rows` rows and
  // `count` numbers, a multiple of kPackedInner.
  void pack_rows(const Matrix& a, int64_t first_row, int64_t rows, int64_t first, int64_t count, uint16_t* out,
                 int64_t out_stride);

  // A panel [count / 2][64 columns][2] of b in bfloat16: columns from `column` on, of rows from `first` on. Zero
  // outside; count as above.
  void pack_panel(const Matrix& b, int64_t column, int64_t first, int64_t count, uint16_t* panel);

  // The same of the transpose of a packed weight: inputs from `input` on, a multiple of 64, of outputs from `first` on,
  // a multiple of 64 as well.
  void pack_transposed_panel(const PackedMatrix& weight, int64_t input, int64_t first, int64_t count, uint16_t* panel);

  // c [rows, columns] = a [rows, 2 * pairs] times panels, which lie `panel_size` numbers apart.
  void multiply_rows(const uint16_t* a, int64_t a_stride, int64_t rows, const uint16_t* panels, int64_t panel_size,
                     int64_t pairs, int64_t columns, const Target& c);
)

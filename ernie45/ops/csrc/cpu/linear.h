// Products of float32 rows with packed weights, accumulated in float32 (bfloat16) or exactly in integers (int8, int4).
//
// Activations are prepared once per product: rounded to bfloat16, or to 15-bit integers with one scale per row (two
// signed bytes, 128 * high + low), so that quantised products lose nothing that a bfloat16 activation would keep.
#pragma once

#include <cstdint>

#include "isa.h"
#include "packed.h"

ERNIE_FOR_EACH_ISA(
  // Bytes of the buffer (64-byte aligned) for `rows` prepared rows.
  int64_t activation_bytes(const PackedMatrix& weight, int64_t rows);

  // Prepares rows first .. last - 1 of the buffer: row r from row r of x, or from row sources[r] unless that is null.
  void prepare_activations(const PackedMatrix& weight, const float* x, int64_t x_stride, const int64_t* sources,
                           int64_t rows, int64_t first, int64_t last, void* buffer);

  // y[r, columns of the panels] = row r of the buffer (of `rows` rows) times those columns of the weight, for r in
  // first_row .. last_row - 1 and the panels first_panel .. last_panel - 1.
  void multiply_panels(const PackedMatrix& weight, const void* buffer, int64_t rows, int64_t first_row,
                       int64_t last_row, int64_t first_panel, int64_t last_panel, float* y, int64_t y_stride);

  // out [rows, columns] += x [rows, inner] times weight [inner, columns], all float32: the router.
  void accumulate_rows(const float* x, int64_t x_stride, const float* weight, int64_t rows, int64_t inner,
                       int64_t columns, float* out);

  // One bfloat16 tile: c [rows, 64] = a [rows, 2 * pairs] times panel [pairs][64][2]. Meanwhile it asks for memory that
  // is needed next: pieces of 256 bytes, `ahead_stride` bytes apart, from `ahead` on; null for none.
  void multiply_tile(const uint16_t* a, int64_t a_stride, int64_t rows, const uint16_t* panel, int64_t pairs, float* c,
                     int64_t c_stride, const void* ahead = nullptr, int64_t ahead_stride = 0);
)

namespace ernie {

// y [rows, out] = x [rows, in] times the weight, on all threads.
void linear(const PackedMatrix& weight, const float* x, int64_t x_stride, int64_t rows, float* y, int64_t y_stride);

}  // namespace ernie

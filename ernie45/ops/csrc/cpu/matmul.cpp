#include "matmul.h"

#include <immintrin.h>

#include <cstring>
#include <type_traits>

#include "tile.h"
#include "transpose.h"

namespace ernie::ERNIE_ISA {
namespace {

// The same matrix as a right or left side: `outer` counts its columns or rows, `inner` what is summed over.
template <class Item>
struct Side {
  const Item* data;
  int64_t stride, outer, inner;
  bool inner_contiguous;
};

template <class Item>
Side<Item> left_side(const Matrix& a) {
  return {static_cast<const Item*>(a.data), a.stride, a.rows, a.columns, !a.transposed};
}

template <class Item>
Side<Item> right_side(const Matrix& b) {
  return {static_cast<const Item*>(b.data), b.stride, b.columns, b.rows, b.transposed};
}

#ifdef __AVX512F__

constexpr int kTileRows = 6;

__mmask16 lanes(int64_t count) { return count >= 16 ? 0xFFFF : count <= 0 ? 0 : (1u << count) - 1; }

// 16 numbers of which `count` exist, as bfloat16.
__m256i round_16(const float* x, int64_t count) {
  return (__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(lanes(count), x));
}
__m256i round_16(const uint16_t* x, int64_t count) { return _mm256_maskz_loadu_epi16(lanes(count), x); }

// Sixteen pairs of neighbours.
template <class Item>
__m512i pairs_along(const Item* x, int64_t count) {
  return _mm512_inserti64x4(_mm512_castsi256_si512(round_16(x, count)), round_16(x + 16, count - 16), 1);
}

// Sixteen pairs of an element and the one below it.
template <class Item>
__m512i pairs_down(const Item* x, int64_t stride, int64_t rows, int64_t count) {
  const __m512i upper = _mm512_cvtepu16_epi32(round_16(x, rows > 0 ? count : 0));
  const __m512i lower = _mm512_cvtepu16_epi32(round_16(x + stride, rows > 1 ? count : 0));
  return _mm512_or_si512(upper, _mm512_slli_epi32(lower, 16));
}

// Sixteen of the outer times 32 of the inner axis: vectors of pairs for one place of the outer axis each, or, with
// `across`, vectors of sixteen such places for one pair each. Zero where the matrix ends.
template <class Item>
void load_block(const Side<Item>& side, int64_t outer, int64_t inner, bool across, __m512i block[16]) {
  const int64_t outers = side.outer - outer, inners = side.inner - inner;
  if (side.inner_contiguous) {
    const Item* start = side.data + outer * side.stride + inner;
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) block[i] = pairs_along(start + i * side.stride, i < outers ? inners : 0);
  } else {
    const Item* start = side.data + inner * side.stride + outer;
#pragma GCC unroll 16
    for (int p = 0; p < 16; ++p)
      block[p] = pairs_down(start + 2 * p * side.stride, side.stride, inners - 2 * p, outers);
  }
  if (side.inner_contiguous == across) transpose(block);
}

template <class Item>
void pack_left(const Side<Item>& side, int64_t first_row, int64_t rows, int64_t first, int64_t count, uint16_t* out,
               int64_t out_stride) {
  __m512i block[16];
  for (int64_t row = 0; row < rows; row += kPackedRows)
    for (int64_t i = 0; i < count; i += kPackedInner) {
      load_block(side, first_row + row, first + i, false, block);
      const int64_t left = rows - row < 16 ? rows - row : 16;
      for (int64_t r = 0; r < left; ++r) _mm512_storeu_si512(out + (row + r) * out_stride + i, block[r]);
    }
}

template <class Item>
void pack_right(const Side<Item>& side, int64_t column, int64_t first, int64_t count, uint16_t* panel) {
  __m512i block[16];
  for (int64_t i = 0; i < count; i += kPackedInner)
    for (int64_t c = 0; c < kPanel; c += 16) {
      load_block(side, column + c, first + i, true, block);
#pragma GCC unroll 16
      for (int p = 0; p < 16; ++p) _mm512_storeu_si512(panel + (i / 2 + p) * 2 * kPanel + 2 * c, block[p]);
    }
}

#else

constexpr int kTileRows = 4;

uint16_t rounded(float x) { return float_to_bfloat16(x); }
uint16_t rounded(uint16_t x) { return x; }

template <class Item>
uint16_t element(const Side<Item>& side, int64_t outer, int64_t inner) {
  if (outer >= side.outer || inner >= side.inner) return 0;
  return rounded(side.inner_contiguous ? side.data[outer * side.stride + inner] : side.data[inner * side.stride + outer]);
}

template <class Item>
void pack_left(const Side<Item>& side, int64_t first_row, int64_t rows, int64_t first, int64_t count, uint16_t* out,
               int64_t out_stride) {
  for (int64_t i = 0; i < count; i += kPackedInner)  // in blocks, so that neither order strides through memory
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t inner = i; inner < i + kPackedInner; ++inner)
        out[row * out_stride + inner] = element(side, first_row + row, first + inner);
}

template <class Item>
void pack_right(const Side<Item>& side, int64_t column, int64_t first, int64_t count, uint16_t* panel) {
  for (int64_t i = 0; i < count; i += kPackedInner)
    for (int64_t c = 0; c < kPanel; ++c)
      for (int64_t inner = i; inner < i + kPackedInner; ++inner)
        panel[(inner / 2 * kPanel + c) * 2 + inner % 2] = element(side, column + c, first + inner);
}

#endif

template <int Rows, int Vectors>
void multiply(const uint16_t* a, int64_t a_stride, const uint16_t* panel, int64_t pairs, float* c, int64_t c_stride,
              bool add) {
  static constexpr float kOnes[] = {1, 1, 1, 1, 1, 1};
  static_assert(Rows <= sizeof kOnes / sizeof *kOnes, "one factor for each row");
  bfloat16_tile<Rows, Vectors>(a, a_stride, panel, 2 * kPanel, pairs, c, c_stride, add ? kOnes : nullptr);
}

template <int Vectors = kPanel / kVector>
void multiply_tile(const uint16_t* a, int64_t a_stride, int64_t rows, const uint16_t* panel, int64_t pairs, float* c,
                   int64_t c_stride, bool add) {
  switch (rows) {
    case 1: return multiply<1, Vectors>(a, a_stride, panel, pairs, c, c_stride, add);
    case 2: return multiply<2, Vectors>(a, a_stride, panel, pairs, c, c_stride, add);
    case 3: return multiply<3, Vectors>(a, a_stride, panel, pairs, c, c_stride, add);
#ifdef __AVX512F__
    case 4: return multiply<4, Vectors>(a, a_stride, panel, pairs, c, c_stride, add);
    case 5: return multiply<5, Vectors>(a, a_stride, panel, pairs, c, c_stride, add);
#endif
    default: return multiply<kTileRows, Vectors>(a, a_stride, panel, pairs, c, c_stride, add);
  }
}

// Moves a tile [rows, 64] into columns of c that are fewer, or bfloat16.
void store_tile(const float* tile, int64_t rows, int64_t columns, const Target& c, int64_t row, int64_t column) {
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t place = (row + r) * c.stride + column;
    if (c.bfloat16) {
      round_row(tile + r * kPanel, columns, static_cast<uint16_t*>(c.data) + place);
      continue;
    }
    float* out = static_cast<float*>(c.data) + place;
    for (int64_t i = 0; i < columns; ++i) out[i] = c.add ? out[i] + tile[r * kPanel + i] : tile[r * kPanel + i];
  }
}

}  // namespace

void pack_rows(const Matrix& a, int64_t first_row, int64_t rows, int64_t first, int64_t count, uint16_t* out,
               int64_t out_stride) {
  if (a.bfloat16) return pack_left(left_side<uint16_t>(a), first_row, rows, first, count, out, out_stride);
  pack_left(left_side<float>(a), first_row, rows, first, count, out, out_stride);
}

void pack_panel(const Matrix& b, int64_t column, int64_t first, int64_t count, uint16_t* panel) {
  if (b.bfloat16) return pack_right(right_side<uint16_t>(b), column, first, count, panel);
  pack_right(right_side<float>(b), column, first, count, panel);
}

void multiply_rows(const uint16_t* a, int64_t a_stride, int64_t rows, const uint16_t* panels, int64_t panel_size,
                   int64_t pairs, int64_t columns, const Target& c) {
  alignas(64) float tile[kTileRows * kPanel];
  const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
  for (int64_t t = 0; t < tiles; ++t) {  // nearly equally high
    const int64_t row = rows * t / tiles, height = rows * (t + 1) / tiles - row;
    for (int64_t column = 0; column < columns; column += kPanel) {
      const uint16_t* panel = panels + column / kPanel * panel_size;
      const int64_t width = columns - column < kPanel ? columns - column : kPanel;
      if (width == kPanel && !c.bfloat16) {
        float* out = static_cast<float*>(c.data) + row * c.stride + column;
        multiply_tile(a + row * a_stride, a_stride, height, panel, pairs, out, c.stride, c.add);
        continue;
      }
      if (width <= kVector)  // as of the narrow matrices of an adapter
        multiply_tile<1>(a + row * a_stride, a_stride, height, panel, pairs, tile, kPanel, false);
      else
        multiply_tile(a + row * a_stride, a_stride, height, panel, pairs, tile, kPanel, false);
      store_tile(tile, height, width, c, row, column);
    }
  }
}

}  // namespace ernie::ERNIE_ISA

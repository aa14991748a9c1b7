#include "fp8.h"

#include <immintrin.h>

#include <cstring>

#include "exp.h"

namespace ernie::ERNIE_ISA {
namespace {

// Inner loops always run over a whole block, which is a multiple of every vector length. Padding (0, or NaN once it has
// been multiplied) does not change a block's scale and is never stored.
constexpr int kBlock = kFp8Block;
constexpr uint32_t kMagnitude = 0x7fffffff, kInfinity = 0x7f800000;

inline float float_of_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline float widen(float value) { return value; }
inline float widen(uint16_t bfloat16) { return float_of_bits(static_cast<uint32_t>(bfloat16) << 16); }

inline void narrow(float value, float* out) { *out = value; }
inline void narrow(float value, uint16_t* out) {
  const uint32_t bits = float_bits(value);
  const uint32_t rounded = bits + 0x7fff + ((bits >> 16) & 1);
  *out = static_cast<uint16_t>(((bits & kMagnitude) > kInfinity ? bits | 0x400000 : rounded) >> 16);
}

inline int size_of_block(int64_t first, int64_t end) {
  return static_cast<int>(end - first < kBlock ? end - first : kBlock);
}

// The bits of |value|, whose order as integers is that of the values; 0 for infinity and NaN.
inline uint32_t finite_magnitude(float value) {
  const uint32_t magnitude = float_bits(value) & kMagnitude;
  return magnitude & (0u - (magnitude < kInfinity));  // a mask, because a choice ends as a jump in some loops
}

uint32_t largest_magnitude(const float* values) {
  uint32_t largest = 0;
#pragma omp simd reduction(max : largest)
  for (int i = 0; i < kBlock; ++i) {
    const uint32_t magnitude = finite_magnitude(values[i]);
    largest = largest > magnitude ? largest : magnitude;
  }
  return largest;
}

float scale_for(uint32_t largest, bool as_power_of_two) {
  if (largest == 0) return 1.0f;
  if (as_power_of_two) {
    // 448 is 1.75 * 2^8: subtract 8 from the exponent, after adding 1 to it where the mantissa is above 1.75.
    const uint32_t exponent = (largest + 0x1fffff) >> 23;
    return float_of_bits((exponent > 9 ? exponent - 8 : 1) << 23);
  }
  const float scale = float_of_bits(largest) / 448.0f;
  return scale > 0x1p-126f ? scale : 0x1p-126f;
}

inline uint32_t encode(float value) {
  const uint32_t bits = float_bits(value), magnitude = bits & kMagnitude;
  // Cuts the mantissa to 3 bits; the exponent's bias is 127 in float and 7 here.
  const uint32_t normal = ((magnitude + 0x7ffff + ((magnitude >> 20) & 1)) >> 20) - (120 << 3);
  // Below 2^-6 codes count steps of 2^-9, which is the last bit of a float at 2^14: the addition rounds.
  const uint32_t subnormal = float_bits(float_of_bits(magnitude) + 0x1p14f) - 0x46800000;
  uint32_t code = magnitude < 0x3c800000 ? subnormal : normal;
  code = code < 0x7e ? code : 0x7e;
  code = magnitude > kInfinity ? 0x7f : code;
  return code | (bits >> 24 & 0x80);
}

inline float decode(uint8_t code) {
  const uint32_t magnitude = code & 0x7f, sign = static_cast<uint32_t>(code & 0x80) << 24;
  const uint32_t normal = (magnitude << 20) + (120u << 23);
  const uint32_t subnormal = float_bits(static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-9f);
  const uint32_t bits = magnitude < 8 ? subnormal : normal;
  return float_of_bits(sign | (magnitude == 0x7f ? 0x7fc00000 : bits));
}

// values [128] times a factor for all, or one for each.
void encode_block(const float* values, float factor, uint8_t* codes) {
#pragma omp simd
  for (int i = 0; i < kBlock; ++i) codes[i] = static_cast<uint8_t>(encode(values[i] * factor));
}

void encode_block(const float* values, const float* factors, uint8_t* codes) {
#pragma omp simd
  for (int i = 0; i < kBlock; ++i) codes[i] = static_cast<uint8_t>(encode(values[i] * factors[i]));
}

template <class T>
void load_block(const T* x, int count, float* values) {
  if (count == kBlock) {
#pragma omp simd
    for (int i = 0; i < kBlock; ++i) values[i] = widen(x[i]);
    return;
  }
  for (int i = 0; i < kBlock; ++i) values[i] = i < count ? widen(x[i]) : 0.0f;
}

void store_block(const uint8_t* codes, int count, uint8_t* out) {
  if (count == kBlock)
    std::memcpy(out, codes, kBlock);  // of constant size, and so two vectors instead of a call
  else
    std::memcpy(out, codes, static_cast<size_t>(count));
}

void quantize_block(const float* values, int count, bool as_power_of_two, uint8_t* codes, float* scale) {
  alignas(64) uint8_t whole[kBlock];
  *scale = scale_for(largest_magnitude(values), as_power_of_two);
  encode_block(values, 1.0f / *scale, whole);
  store_block(whole, count, codes);
}

// Four perfect shuffles of the 16 rows transpose 16 x 16 bytes.
void transpose_16(const uint8_t* in, uint8_t* out) {
  __m128i a[16], b[16];
  for (int i = 0; i < 16; ++i) a[i] = _mm_load_si128(reinterpret_cast<const __m128i*>(in + i * kBlock));
  for (int round = 0; round < 2; ++round) {
    for (int i = 0; i < 8; ++i) {
      b[2 * i] = _mm_unpacklo_epi8(a[i], a[i + 8]);
      b[2 * i + 1] = _mm_unpackhi_epi8(a[i], a[i + 8]);
    }
    for (int i = 0; i < 8; ++i) {
      a[2 * i] = _mm_unpacklo_epi8(b[i], b[i + 8]);
      a[2 * i + 1] = _mm_unpackhi_epi8(b[i], b[i + 8]);
    }
  }
  for (int i = 0; i < 16; ++i) _mm_store_si128(reinterpret_cast<__m128i*>(out + i * kBlock), a[i]);
}

// A part of the matrix, padded with zeros to 128 columns.
struct Tile {
  alignas(64) float values[kBlock * kBlock];
  alignas(64) uint8_t codes[kBlock * kBlock];
  int64_t first_row, first_column;
  int rows, columns;

  const float* row(int i) const { return values + i * kBlock; }
};

template <class T>
void load_tile(const T* x, const Fp8Quantization& wanted, Tile& tile) {
  tile.rows = size_of_block(tile.first_row, wanted.rows);
  tile.columns = size_of_block(tile.first_column, wanted.columns);
  for (int i = 0; i < tile.rows; ++i)
    load_block(x + (tile.first_row + i) * wanted.columns + tile.first_column, tile.columns, tile.values + i * kBlock);
}

// Writes the transpose of the tile's codes. What lies under its last row is transposed too, but not stored.
void store_transposed(const Tile& tile, const Fp8Quantization& wanted) {
  alignas(64) uint8_t transposed[kBlock * kBlock];
  for (int i = 0; i < tile.rows; i += 16)
    for (int j = 0; j < tile.columns; j += 16) transpose_16(tile.codes + i * kBlock + j, transposed + j * kBlock + i);
  uint8_t* out = wanted.transposed_codes + tile.first_column * wanted.rows + tile.first_row;
  for (int j = 0; j < tile.columns; ++j) store_block(transposed + j * kBlock, tile.rows, out + j * wanted.rows);
}

// Raises each of largest [128] to the magnitude in this row.
void raise_to_row(const float* row, uint32_t* largest) {
#pragma omp simd
  for (int j = 0; j < kBlock; ++j) {
    const uint32_t magnitude = finite_magnitude(row[j]), before = largest[j];
    largest[j] = before > magnitude ? before : magnitude;
  }
}

// The scale of each column of the tile, and its reciprocal.
void column_scales(const Tile& tile, bool as_power_of_two, float* scales, float* reciprocals) {
  alignas(64) uint32_t largest[kBlock] = {};
  for (int i = 0; i < tile.rows; ++i) raise_to_row(tile.row(i), largest);
  for (int j = 0; j < kBlock; ++j) {
    scales[j] = scale_for(largest[j], as_power_of_two);
    reciprocals[j] = 1.0f / scales[j];
  }
}

float tile_scale(const Tile& tile, bool as_power_of_two) {
  uint32_t largest = 0;
  for (int i = 0; i < tile.rows; ++i) {
    const uint32_t magnitude = largest_magnitude(tile.row(i));
    largest = largest > magnitude ? largest : magnitude;
  }
  return scale_for(largest, as_power_of_two);
}

void quantize_by_rows(const Tile& tile, const Fp8Quantization& wanted) {
  uint8_t* codes = wanted.codes + tile.first_row * wanted.columns + tile.first_column;
  const int64_t column_blocks = fp8_blocks(wanted.columns);
  float* scales = wanted.scales + tile.first_row * column_blocks + tile.first_column / kBlock;
  for (int i = 0; i < tile.rows; ++i)
    quantize_block(tile.row(i), tile.columns, wanted.power_of_two, codes + i * wanted.columns,
                   scales + i * column_blocks);
}

void quantize_by_columns(Tile& tile, const Fp8Quantization& wanted) {
  float scales[kBlock], reciprocals[kBlock];
  column_scales(tile, wanted.power_of_two, scales, reciprocals);
  const int64_t row_blocks = fp8_blocks(wanted.rows);
  float* out = wanted.transposed_scales + tile.first_column * row_blocks + tile.first_row / kBlock;
  for (int j = 0; j < tile.columns; ++j) out[j * row_blocks] = scales[j];
  for (int i = 0; i < tile.rows; ++i) encode_block(tile.row(i), reciprocals, tile.codes + i * kBlock);
  store_transposed(tile, wanted);
}

void quantize_square(Tile& tile, const Fp8Quantization& wanted) {
  const float scale = tile_scale(tile, wanted.power_of_two);
  for (int i = 0; i < tile.rows; ++i) encode_block(tile.row(i), 1.0f / scale, tile.codes + i * kBlock);
  const int64_t row_block = tile.first_row / kBlock, column_block = tile.first_column / kBlock;
  if (wanted.codes) {
    wanted.scales[row_block * fp8_blocks(wanted.columns) + column_block] = scale;
    uint8_t* codes = wanted.codes + tile.first_row * wanted.columns + tile.first_column;
    for (int i = 0; i < tile.rows; ++i) store_block(tile.codes + i * kBlock, tile.columns, codes + i * wanted.columns);
  }
  if (wanted.transposed_codes) {
    wanted.transposed_scales[column_block * fp8_blocks(wanted.rows) + row_block] = scale;
    store_transposed(tile, wanted);
  }
}

}  // namespace

template <class T>
void fp8_quantize_rows(const T* x, int64_t rows, int64_t columns, bool power_of_two, uint8_t* codes, float* scales) {
  for (int64_t row = 0; row < rows; ++row, x += columns, codes += columns)
    for (int64_t first = 0; first < columns; first += kBlock) {
      alignas(64) float values[kBlock];
      const int count = size_of_block(first, columns);
      load_block(x + first, count, values);
      quantize_block(values, count, power_of_two, codes + first, scales++);
    }
}

template <class T>
void fp8_quantize_tile(const T* x, const Fp8Quantization& wanted, int64_t first_row, int64_t first_column) {
  Tile tile;
  tile.first_row = first_row;
  tile.first_column = first_column;
  load_tile(x, wanted, tile);
  if (wanted.square) return quantize_square(tile, wanted);
  if (wanted.codes) quantize_by_rows(tile, wanted);
  if (wanted.transposed_codes) quantize_by_columns(tile, wanted);
}

template <class T>
void fp8_dequantize_rows(const uint8_t* codes, const float* scales, int64_t block_rows, int64_t first_row,
                         int64_t rows, int64_t columns, T* out) {
  for (int64_t row = first_row; row < first_row + rows; ++row, codes += columns, out += columns)
    for (int64_t first = 0; first < columns; first += kBlock) {
      const float scale = scales[row / block_rows * fp8_blocks(columns) + first / kBlock];
      const int count = size_of_block(first, columns);
#pragma omp simd
      for (int i = 0; i < count; ++i) narrow(decode(codes[first + i]) * scale, out + first + i);
    }
}

template <class T>
void swiglu_fp8_quantize_rows(const T* x, const float* prob, int64_t rows, int64_t width, bool power_of_two,
                              uint8_t* codes, float* scales) {
  for (int64_t row = 0; row < rows; ++row, x += 2 * width, codes += width) {
    const float factor = prob ? prob[row] : 1.0f;
    for (int64_t first = 0; first < width; first += kBlock) {
      alignas(64) float gate[kBlock], up[kBlock];
      const int count = size_of_block(first, width);
      load_block(x + first, count, gate);
      load_block(x + width + first, count, up);
#pragma omp simd
      for (int i = 0; i < kBlock; ++i) up[i] = gate[i] * up[i] / (1.0f + exp(-gate[i])) * factor;
      quantize_block(up, count, power_of_two, codes + first, scales++);
    }
  }
}

template void fp8_quantize_rows(const float*, int64_t, int64_t, bool, uint8_t*, float*);
template void fp8_quantize_rows(const uint16_t*, int64_t, int64_t, bool, uint8_t*, float*);
template void fp8_quantize_tile(const float*, const Fp8Quantization&, int64_t, int64_t);
template void fp8_quantize_tile(const uint16_t*, const Fp8Quantization&, int64_t, int64_t);
template void fp8_dequantize_rows(const uint8_t*, const float*, int64_t, int64_t, int64_t, int64_t, float*);
template void fp8_dequantize_rows(const uint8_t*, const float*, int64_t, int64_t, int64_t, int64_t, uint16_t*);
template void swiglu_fp8_quantize_rows(const float*, const float*, int64_t, int64_t, bool, uint8_t*, float*);
template void swiglu_fp8_quantize_rows(const uint16_t*, const float*, int64_t, int64_t, bool, uint8_t*, float*);

}  // namespace ernie::ERNIE_ISA

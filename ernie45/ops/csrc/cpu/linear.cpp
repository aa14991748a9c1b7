#include "linear.h"

#include <immintrin.h>

#include <cmath>
#include <cstring>
#include <type_traits>

#include "memory.h"
#include "tile.h"

namespace ernie::ERNIE_ISA {
namespace {

constexpr float kLargest = 128 * 127;  // of a 15-bit activation: two signed bytes, high and low
constexpr float kSmallest = 1e-30f;    // rows below it count as zero: the inverse of their scale would be infinite

// Prepared integer activations. AVX-512 multiplies the two bytes separately; AVX2 has no exact byte product and takes
// the same integers as floats.
struct IntegerRows {
  int64_t in;          // padded
  int64_t groups;      // 1 for int8
  float* scales;       // [rows]
  int32_t* sums_high;  // [rows, groups]
  int32_t* sums_low;   // [rows, groups]
#ifdef __AVX512F__
  int8_t* high;  // [rows, in]
  int8_t* low;   // [rows, in]
#else
  float* values;  // [rows, in]
#endif
};

int64_t padded_in(const PackedMatrix& weight) {
  const int64_t multiple = weight.kind == Kind::kBfloat16 ? 2 : weight.kind == Kind::kInt8 ? 4 : kGroup;
  return (weight.in + multiple - 1) / multiple * multiple;
}

IntegerRows integer_rows(const PackedMatrix& weight, int64_t rows, void* buffer, int64_t* bytes) {
  IntegerRows result{};
  result.in = padded_in(weight);
  result.groups = weight.kind == Kind::kInt4 ? result.in / kGroup : 1;
  uint8_t* start = static_cast<uint8_t*>(buffer);
  uint8_t* next = start;
  auto take = [&next](int64_t size) {
    uint8_t* taken = next;
    next += whole_lines(size);
    return taken;
  };
  result.scales = reinterpret_cast<float*>(take(rows * 4));
  result.sums_high = reinterpret_cast<int32_t*>(take(rows * result.groups * 4));
  result.sums_low = reinterpret_cast<int32_t*>(take(rows * result.groups * 4));
#ifdef __AVX512F__
  result.high = reinterpret_cast<int8_t*>(take(rows * result.in));
  result.low = reinterpret_cast<int8_t*>(take(rows * result.in));
#else
  result.values = reinterpret_cast<float*>(take(rows * result.in * 4));
#endif
  if (bytes) *bytes = next - start;
  return result;
}

#ifdef __AVX512F__

constexpr int kBfloat16Rows = 6;

void integer_row(const float* x, int64_t count, int64_t row, const IntegerRows& out, int64_t group) {
  __m512 largest = _mm512_setzero_ps();
  const __m512 absolute = _mm512_castsi512_ps(_mm512_set1_epi32(0x7FFFFFFF));
  bool finite = true;
  for (int64_t i = 0; i < count; i += 16) {
    const __mmask16 mask = count - i >= 16 ? 0xFFFF : (1u << (count - i)) - 1;
    const __m512 value = _mm512_and_ps(_mm512_maskz_loadu_ps(mask, x + i), absolute);
    finite = finite && !_mm512_fpclass_ps_mask(value, 0x99);  // NaN or infinite
    largest = _mm512_max_ps(largest, value);
  }
  const float peak = _mm512_reduce_max_ps(largest);
  out.scales[row] = finite ? peak / kLargest : NAN;
  const __m512 inverse = _mm512_set1_ps(finite && peak > kSmallest ? kLargest / peak : 0);
  int8_t* high = out.high + row * out.in;
  int8_t* low = out.low + row * out.in;
  for (int64_t g = 0; g < out.groups; ++g) {
    __m512i sum_high = _mm512_setzero_si512(), sum_low = _mm512_setzero_si512();
    const int64_t last = group ? (g + 1) * group : out.in;
    for (int64_t i = group ? g * group : 0; i < last; i += 16) {
      const int64_t left = count - i, room = last - i;
      const __mmask16 mask = left >= 16 ? 0xFFFF : left <= 0 ? 0 : (1u << left) - 1;
      const __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_maskz_loadu_ps(mask, x + i), inverse));
      const __m512i upper = _mm512_srai_epi32(_mm512_add_epi32(whole, _mm512_set1_epi32(64)), 7);
      const __m512i lower = _mm512_sub_epi32(whole, _mm512_slli_epi32(upper, 7));
      sum_high = _mm512_add_epi32(sum_high, upper);
      sum_low = _mm512_add_epi32(sum_low, lower);
      const __mmask16 inside = room >= 16 ? 0xFFFF : (1u << room) - 1;
      _mm512_mask_cvtepi32_storeu_epi8(high + i, inside, upper);
      _mm512_mask_cvtepi32_storeu_epi8(low + i, inside, lower);
    }
    out.sums_high[row * out.groups + g] = _mm512_reduce_add_epi32(sum_high);
    out.sums_low[row * out.groups + g] = _mm512_reduce_add_epi32(sum_low);
  }
}

// sum += four products of unsigned and signed bytes per lane. GCC 12 moves every accumulator through memory around its
// own intrinsic.
inline void dot(__m512i& sum, __m512i codes, __m512i x) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(x));
}

inline __m512i four(const int8_t* x) {
  int32_t bytes;
  std::memcpy(&bytes, x, 4);
  return _mm512_set1_epi32(bytes);
}

template <int Rows>
void int8_tile(const IntegerRows& a, int64_t row, const uint8_t* panel, const float* column_scales, float* c,
               int64_t c_stride) {
  __m512i high[Rows][4], low[Rows][4];
#pragma GCC unroll 4
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {  // codes are stored with 128 added
      high[r][v] = _mm512_set1_epi32(-128 * a.sums_high[row + r]);
      low[r][v] = _mm512_set1_epi32(-128 * a.sums_low[row + r]);
    }
  const int8_t* x_high = a.high + row * a.in;
  const int8_t* x_low = a.low + row * a.in;
  for (int64_t k = 0; k < a.in; k += 4, panel += 4 * kPanel) {
    __m512i w[4];
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) w[v] = _mm512_loadu_si512(panel + 64 * v);
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) {
      const __m512i upper = four(x_high + r * a.in + k), lower = four(x_low + r * a.in + k);
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) {
        dot(high[r][v], w[v], upper);
        dot(low[r][v], w[v], lower);
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
      const __m512 whole = _mm512_fmadd_ps(_mm512_cvtepi32_ps(high[r][v]), _mm512_set1_ps(128),
                                           _mm512_cvtepi32_ps(low[r][v]));
      const __m512 scale = _mm512_mul_ps(_mm512_loadu_ps(column_scales + 16 * v), _mm512_set1_ps(a.scales[row + r]));
      _mm512_storeu_ps(c + r * c_stride + 16 * v, _mm512_mul_ps(whole, scale));
    }
}

template <int Rows>
void int4_tile(const IntegerRows& a, int64_t row, const uint8_t* panel, float* c, int64_t c_stride) {
  const __m512i nibble = _mm512_set1_epi8(15);
  __m512 sum[Rows][4];
#pragma GCC unroll 4
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) sum[r][v] = _mm512_setzero_ps();
  const int8_t* x_high = a.high + row * a.in;
  const int8_t* x_low = a.low + row * a.in;
  for (int64_t g = 0; g < a.groups; ++g) {
    __m512i high[Rows][4], low[Rows][4];
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) {  // codes are stored with 8 added
        high[r][v] = _mm512_set1_epi32(-8 * a.sums_high[(row + r) * a.groups + g]);
        low[r][v] = _mm512_set1_epi32(-8 * a.sums_low[(row + r) * a.groups + g]);
      }
    for (int64_t k = g * kGroup; k < (g + 1) * kGroup; k += 8, panel += 4 * kPanel) {
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) {
        const __m512i both = _mm512_loadu_si512(panel + 64 * v);
        const __m512i first = _mm512_and_si512(both, nibble);
        const __m512i second = _mm512_and_si512(_mm512_srli_epi16(both, 4), nibble);
#pragma GCC unroll 4
        for (int r = 0; r < Rows; ++r) {
          dot(high[r][v], first, four(x_high + r * a.in + k));
          dot(low[r][v], first, four(x_low + r * a.in + k));
          dot(high[r][v], second, four(x_high + r * a.in + k + 4));
          dot(low[r][v], second, four(x_low + r * a.in + k + 4));
        }
      }
    }
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
      const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(panel + 32 * v));
      const __m512 scale = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
#pragma GCC unroll 4
      for (int r = 0; r < Rows; ++r) {
        const __m512i whole = _mm512_add_epi32(_mm512_slli_epi32(high[r][v], 7), low[r][v]);
        sum[r][v] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(whole), scale, sum[r][v]);
      }
    }
    panel += 2 * kPanel;
  }
#pragma GCC unroll 4
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v)
      _mm512_storeu_ps(c + r * c_stride + 16 * v, _mm512_mul_ps(sum[r][v], _mm512_set1_ps(a.scales[row + r])));
}

constexpr int kInt8Rows = 3;
constexpr int kInt4Rows = 2;

#else  // AVX2: widen weights to float32 and multiply; the same numbers, except for the order of additions

constexpr int kBfloat16Rows = 4;

void integer_row(const float* x, int64_t count, int64_t row, const IntegerRows& out, int64_t) {
  float peak = 0;
  bool finite = true;
  for (int64_t i = 0; i < count; ++i) {
    finite = finite && std::isfinite(x[i]);
    peak = std::fabs(x[i]) > peak ? std::fabs(x[i]) : peak;
  }
  out.scales[row] = finite ? peak / kLargest : NAN;
  const float inverse = finite && peak > kSmallest ? kLargest / peak : 0;
  float* values = out.values + row * out.in;
  for (int64_t i = 0; i < out.in; ++i) values[i] = i < count && finite ? std::nearbyintf(x[i] * inverse) : 0;
}

template <int Rows>
void int8_tile(const IntegerRows& a, int64_t row, const uint8_t* panel, const float* column_scales, float* c,
               int64_t c_stride) {
  const __m256i byte = _mm256_set1_epi32(255), zero = _mm256_set1_epi32(128);
  for (int64_t column = 0; column < kPanel; column += 8) {
    __m256 sum[Rows];
    for (int r = 0; r < Rows; ++r) sum[r] = _mm256_setzero_ps();
    for (int64_t k = 0; k < a.in; k += 4) {
      const __m256i codes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(panel + k * kPanel + column * 4));
      for (int j = 0; j < 4; ++j) {
        const __m256i code = _mm256_sub_epi32(_mm256_and_si256(_mm256_srli_epi32(codes, 8 * j), byte), zero);
        const __m256 w = _mm256_cvtepi32_ps(code);
#pragma GCC unroll 4
        for (int r = 0; r < Rows; ++r)
          sum[r] = _mm256_fmadd_ps(w, _mm256_set1_ps(a.values[(row + r) * a.in + k + j]), sum[r]);
      }
    }
    for (int r = 0; r < Rows; ++r) {
      const __m256 scale = _mm256_mul_ps(_mm256_loadu_ps(column_scales + column), _mm256_set1_ps(a.scales[row + r]));
      _mm256_storeu_ps(c + r * c_stride + column, _mm256_mul_ps(sum[r], scale));
    }
  }
}

template <int Rows>
void int4_tile(const IntegerRows& a, int64_t row, const uint8_t* panel, float* c, int64_t c_stride) {
  const __m256i nibble = _mm256_set1_epi32(15), zero = _mm256_set1_epi32(8);
  for (int64_t column = 0; column < kPanel; column += 8) {
    __m256 total[Rows];
    for (int r = 0; r < Rows; ++r) total[r] = _mm256_setzero_ps();
    for (int64_t g = 0; g < a.groups; ++g) {
      const uint8_t* group = panel + g * kGroupBytes;
      __m256 sum[Rows];
      for (int r = 0; r < Rows; ++r) sum[r] = _mm256_setzero_ps();
      for (int64_t k = 0; k < kGroup; k += 8) {
        const __m256i codes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(group + (k / 8 * kPanel + column) * 4));
        for (int j = 0; j < 8; ++j) {
          const int shift = j < 4 ? 8 * j : 8 * (j - 4) + 4;
          const __m256i code = _mm256_sub_epi32(_mm256_and_si256(_mm256_srli_epi32(codes, shift), nibble), zero);
          const __m256 w = _mm256_cvtepi32_ps(code);
#pragma GCC unroll 4
          for (int r = 0; r < Rows; ++r)
            sum[r] = _mm256_fmadd_ps(w, _mm256_set1_ps(a.values[(row + r) * a.in + g * kGroup + k + j]), sum[r]);
        }
      }
      const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(group + kGroupCodes + 2 * column));
      const __m256 scale = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
      for (int r = 0; r < Rows; ++r) total[r] = _mm256_fmadd_ps(sum[r], scale, total[r]);
    }
    for (int r = 0; r < Rows; ++r)
      _mm256_storeu_ps(c + r * c_stride + column, _mm256_mul_ps(total[r], _mm256_set1_ps(a.scales[row + r])));
  }
}

constexpr int kInt8Rows = 3;
constexpr int kInt4Rows = 2;

#endif

// Calls tile(first row, integral constant of the number of rows) for row tiles of nearly equal height.
template <int Most, class Tile>
void for_each_tile(int64_t rows, const Tile& tile) {
  const int64_t tiles = (rows + Most - 1) / Most;
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t first = rows * t / tiles, count = rows * (t + 1) / tiles - first;
    tile(first, count);
  }
}

void int8_rows(const IntegerRows& a, int64_t row, int64_t count, const uint8_t* panel, const float* scales, float* c,
               int64_t c_stride) {
  switch (count) {
    case 1: return int8_tile<1>(a, row, panel, scales, c, c_stride);
    case 2: return int8_tile<2>(a, row, panel, scales, c, c_stride);
    default: return int8_tile<kInt8Rows>(a, row, panel, scales, c, c_stride);
  }
}

void int4_rows(const IntegerRows& a, int64_t row, int64_t count, const uint8_t* panel, float* c, int64_t c_stride) {
  if (count == 1) return int4_tile<1>(a, row, panel, c, c_stride);
  int4_tile<kInt4Rows>(a, row, panel, c, c_stride);
}

}  // namespace

int64_t activation_bytes(const PackedMatrix& weight, int64_t rows) {
  if (weight.kind == Kind::kBfloat16) return whole_lines(rows * padded_in(weight) * 2);
  int64_t bytes;
  integer_rows(weight, rows, nullptr, &bytes);
  return bytes;
}

void prepare_activations(const PackedMatrix& weight, const float* x, int64_t x_stride, const int64_t* sources,
                         int64_t rows, int64_t first, int64_t last, void* buffer) {
  const int64_t padded = padded_in(weight), group = weight.kind == Kind::kInt4 ? kGroup : 0;
  const bool rounded = weight.kind == Kind::kBfloat16;
  const IntegerRows out = rounded ? IntegerRows{} : integer_rows(weight, rows, buffer, nullptr);
  for (int64_t row = first; row < last; ++row) {
    const float* source = x + (sources ? sources[row] : row) * x_stride;
    if (!rounded) {
      integer_row(source, weight.in, row, out, group);
      continue;
    }
    uint16_t* target = static_cast<uint16_t*>(buffer) + row * padded;
    round_row(source, weight.in, target);
    if (padded > weight.in) target[weight.in] = 0;
  }
}

void accumulate_rows(const float* x, int64_t x_stride, const float* weight, int64_t rows, int64_t inner,
                     int64_t columns, float* out) {
  for (int64_t row = 0; row < rows; ++row) {
    float* sum = out + row * columns;
    for (int64_t i = 0; i < inner; ++i) {
      const float value = x[row * x_stride + i];
      const float* line = weight + i * columns;
#pragma omp simd
      for (int64_t c = 0; c < columns; ++c) sum[c] += value * line[c];
    }
  }
}

void multiply_tile(const uint16_t* a, int64_t a_stride, int64_t rows, const uint16_t* panel, int64_t pairs, float* c,
                   int64_t c_stride, const void* ahead, int64_t ahead_stride) {
  for_each_tile<kBfloat16Rows>(rows, [&](int64_t first, int64_t count) {
    const uint16_t* a_rows = a + first * a_stride;
    float* c_rows = c + first * c_stride;
    const char* next = static_cast<const char*>(ahead);
    auto tile = [&](auto height) {
      bfloat16_tile<decltype(height)::value, kPanel / kVector>(a_rows, a_stride, panel, 2 * kPanel, pairs, c_rows,
                                                               c_stride, nullptr, next, ahead_stride);
    };
    switch (count) {
      case 1: tile(std::integral_constant<int, 1>{}); break;
      case 2: tile(std::integral_constant<int, 2>{}); break;
      case 3: tile(std::integral_constant<int, 3>{}); break;
      case 4: tile(std::integral_constant<int, 4>{}); break;
      case 5: tile(std::integral_constant<int, 5>{}); break;
      default: tile(std::integral_constant<int, kBfloat16Rows>{});
    }
    if (ahead) ahead = static_cast<const char*>(ahead) + pairs / 2 * ahead_stride;
  });
}

void multiply_panels(const PackedMatrix& weight, const void* buffer, int64_t rows, int64_t first_row, int64_t last_row,
                     int64_t first_panel, int64_t last_panel, float* y, int64_t y_stride) {
  const int64_t padded = padded_in(weight);
  const IntegerRows integers =
      weight.kind == Kind::kBfloat16 ? IntegerRows{} : integer_rows(weight, rows, const_cast<void*>(buffer), nullptr);
  alignas(64) float edge[kBfloat16Rows * kPanel];
  const int64_t all = last_row - first_row;
  const bool two_tiles = kBfloat16Rows < all && all <= 2 * kBfloat16Rows;
  auto each = [&](int64_t panel, int64_t row, int64_t count, float* c, int64_t c_stride) {
    const uint8_t* data = weight.panel(panel);
    if (weight.kind == Kind::kBfloat16) {
      // With two tiles of rows, each fetches half of the next panel, which hides the memory behind the arithmetic. One
      // tile is a stream that the hardware follows, and more take longer than the memory does.
      const bool fetch = two_tiles && panel + 1 < panels(weight.out);
      const int64_t half = row == first_row ? 0 : padded / 2 * kPanel * 2;
      multiply_tile(static_cast<const uint16_t*>(buffer) + row * padded, padded, count,
                    reinterpret_cast<const uint16_t*>(data), padded / 2, c, c_stride,
                    fetch ? weight.panel(panel + 1) + half : nullptr, 4 * kPanel);
    } else if (weight.kind == Kind::kInt8) {
      int8_rows(integers, row, count, data, weight.scales + panel * kPanel, c, c_stride);
    } else {
      int4_rows(integers, row, count, data, c, c_stride);
    }
  };
  auto tiles = [&](auto&& tile) {
    if (weight.kind == Kind::kBfloat16) return for_each_tile<kBfloat16Rows>(all, tile);
    if (weight.kind == Kind::kInt8) return for_each_tile<kInt8Rows>(all, tile);
    return for_each_tile<kInt4Rows>(all, tile);
  };
  for (int64_t panel = first_panel; panel < last_panel; ++panel) {
    const int64_t columns = weight.out - panel * kPanel;
    tiles([&](int64_t tile_row, int64_t count) {
      const int64_t row = first_row + tile_row;
      if (columns >= kPanel) return each(panel, row, count, y + row * y_stride + panel * kPanel, y_stride);
      each(panel, row, count, edge, kPanel);
      for (int64_t r = 0; r < count; ++r)
        std::memcpy(y + (row + r) * y_stride + panel * kPanel, edge + r * kPanel, columns * sizeof(float));
    });
  }
}

}  // namespace ernie::ERNIE_ISA

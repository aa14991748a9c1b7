// The innermost product of bfloat16 rows with a panel of weights, keys or values, in float32, and the rounding of rows
// for it. Only for sources that are compiled once per instruction set.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "packed.h"

namespace ernie::ERNIE_ISA {

constexpr int kVector = 16;  // columns that the kernels take at a time: a vector of AVX-512, two of AVX2

// out [count] = x in bfloat16, to the nearest or, of two as near, the even one.
inline void round_row(const float* x, int64_t count, uint16_t* out) {
  int64_t i = 0;
#ifdef __AVX512F__
  for (; i + kVector <= count; i += kVector)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(x + i)));
#endif
  for (; i < count; ++i) out[i] = float_to_bfloat16(x[i]);
}

// c [Rows, 16 * Vectors] = a [Rows, 2 * pairs] times panel [pairs][columns][2], of which pair p begins `panel_stride`
// numbers after pair p - 1. With `factors` [Rows], the rows of c, times their factors, are added to. Meanwhile, it asks
// for memory that is needed next: pieces of 256 bytes, `ahead_stride` bytes apart, from `ahead` on; null for none.
template <int Rows, int Vectors>
inline void bfloat16_tile(const uint16_t* a, int64_t a_stride, const uint16_t* panel, int64_t panel_stride,
                          int64_t pairs, float* c, int64_t c_stride, const float* factors = nullptr,
                          const char* ahead = nullptr, int64_t ahead_stride = 0) {
#ifdef __AVX512F__
  __m512 sum[Rows][Vectors];
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v)
      sum[r][v] = factors ? _mm512_mul_ps(_mm512_loadu_ps(c + r * c_stride + kVector * v), _mm512_set1_ps(factors[r]))
                          : _mm512_setzero_ps();
  for (int64_t p = 0; p < pairs; ++p, panel += panel_stride) {
    if (ahead) {
      const char* half = ahead + (p / 2) * ahead_stride + p % 2 * 128;
      _mm_prefetch(half, _MM_HINT_T1);
      _mm_prefetch(half + 64, _MM_HINT_T1);
    }
    __m512bh w[Vectors];
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) w[v] = (__m512bh)_mm512_loadu_si512(panel + 2 * kVector * v);
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      int32_t pair;
      std::memcpy(&pair, a + r * a_stride + 2 * p, 4);
      const __m512bh x = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v) sum[r][v] = _mm512_dpbf16_ps(sum[r][v], w[v], x);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) _mm512_storeu_ps(c + r * c_stride + kVector * v, sum[r][v]);
#else  // AVX2 widens both sides and multiplies: the same numbers, except for the order of additions
  const __m256i upper = _mm256_set1_epi32(static_cast<int>(0xFFFF0000));
  for (int column = 0; column < kVector * Vectors; column += kVector) {
    __m256 sum[Rows][2];
    for (int r = 0; r < Rows; ++r)
      for (int v = 0; v < 2; ++v)
        sum[r][v] = factors ? _mm256_mul_ps(_mm256_loadu_ps(c + r * c_stride + column + 8 * v),
                                            _mm256_set1_ps(factors[r]))
                            : _mm256_setzero_ps();
    for (int64_t p = 0; p < pairs; ++p) {
      const uint16_t* w = panel + p * panel_stride + column * 2;
      const __m256i left = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w));
      const __m256i right = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + 16));
      const __m256 even[2] = {_mm256_castsi256_ps(_mm256_slli_epi32(left, 16)),
                              _mm256_castsi256_ps(_mm256_slli_epi32(right, 16))};
      const __m256 odd[2] = {_mm256_castsi256_ps(_mm256_and_si256(left, upper)),
                             _mm256_castsi256_ps(_mm256_and_si256(right, upper))};
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) {
        const __m256 x0 = _mm256_set1_ps(bfloat16_to_float(a[r * a_stride + 2 * p]));
        const __m256 x1 = _mm256_set1_ps(bfloat16_to_float(a[r * a_stride + 2 * p + 1]));
        for (int v = 0; v < 2; ++v)
          sum[r][v] = _mm256_fmadd_ps(odd[v], x1, _mm256_fmadd_ps(even[v], x0, sum[r][v]));
      }
    }
    for (int r = 0; r < Rows; ++r)
      for (int v = 0; v < 2; ++v) _mm256_storeu_ps(c + r * c_stride + column + 8 * v, sum[r][v]);
  }
#endif
}

}  // namespace ernie::ERNIE_ISA

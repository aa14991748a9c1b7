// The transpose of a packed weight as the right side of a product, for the gradient of a layer's input.
#include "matmul.h"

#include <immintrin.h>

#include <cstring>

#include "transpose.h"

namespace ernie::ERNIE_ISA {
namespace {

// Inputs in a 32-bit word of a panel.
constexpr int64_t inputs_of_word(Kind kind) { return kind == Kind::kBfloat16 ? 2 : kind == Kind::kInt8 ? 4 : 8; }

// The words of 64 outputs from the panel's word of `input` on; null beyond the last one.
template <Kind kind>
const uint8_t* words_at(const PackedMatrix& weight, int64_t panel, int64_t input) {
  const int64_t word = input / inputs_of_word(kind) * kPanel * 4;
  if (kind != Kind::kInt4) return word < panel_bytes(kind, weight.in) ? weight.panel(panel) + word : nullptr;
  const int64_t group = input / kGroup * kGroupBytes;  // scales lie between the groups
  if (group >= panel_bytes(kind, weight.in)) return nullptr;
  return weight.panel(panel) + group + input % kGroup / inputs_of_word(kind) * kPanel * 4;
}

// The scales of a group of 4-bit weights, bfloat16 [64 outputs].
const uint8_t* scales_at(const PackedMatrix& weight, int64_t panel, int64_t input) {
  return weight.panel(panel) + input / kGroup * kGroupBytes + kGroupCodes;
}

#ifdef __AVX512F__

// Pairs of neighbouring inputs, in bfloat16.
__m512i rounded_pairs(__m512 even, __m512 odd) {
  const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(even));
  const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(odd));
  return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}

// The values of codes of `bits` bits from `shift` on in every word.
template <int bits>
__m512 values(__m512i words, int shift, __m512 scales) {
  const __m512i mask = _mm512_set1_epi32((1 << bits) - 1), zero = _mm512_set1_epi32(1 << (bits - 1));
  const __m512i codes = _mm512_and_si512(_mm512_srli_epi32(words, shift), mask);
  return _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(codes, zero)), scales);
}

// Pairs of the 32 inputs from `input` on, each of 16 outputs: `first` and the next in the panel.
template <Kind kind>
void load_pairs(const PackedMatrix& weight, int64_t panel, int64_t first, int64_t input, __m512i pairs[16]) {
  constexpr int64_t kInputs = inputs_of_word(kind);
  __m512 scales = _mm512_setzero_ps();
  if (kind == Kind::kInt8) scales = _mm512_loadu_ps(weight.scales + panel * kPanel + first);
  if (kind == Kind::kInt4 && words_at<kind>(weight, panel, input)) {
    const void* bits = scales_at(weight, panel, input) + 2 * first;
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(bits)));
    scales = _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
  }
#pragma GCC unroll 16
  for (int64_t i = 0; i < 32; i += kInputs) {
    const uint8_t* line = words_at<kind>(weight, panel, input + i);
    const __m512i words = line ? _mm512_loadu_si512(line + 4 * first) : _mm512_setzero_si512();
    if (kind == Kind::kBfloat16) {
      pairs[i / 2] = words;
      continue;
    }
    constexpr int kBits = kind == Kind::kInt8 ? 8 : 4;
#pragma GCC unroll 4
    for (int64_t j = 0; j < kInputs; j += 2) {
      // Four inputs are the low or, for int4, the high nibbles of four bytes.
      const int shift = static_cast<int>(8 * (j % 4) + j / 4 * 4);
      const __m512 even = values<kBits>(words, shift, scales), odd = values<kBits>(words, shift + 8, scales);
      pairs[(i + j) / 2] = line ? rounded_pairs(even, odd) : words;
    }
  }
}

// From 16 pairs of inputs with 16 outputs each to 8 pairs of outputs with 32 inputs each, 64 words apart.
void store_transposed(__m512i pairs[16], uint16_t* out) {
  alignas(64) static constexpr uint16_t kHalves[] = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30,
                                                     1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31};
  alignas(64) static constexpr int32_t kInTurns[] = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
  const __m512i halves = _mm512_load_si512(kHalves), first = _mm512_load_si512(kInTurns);
  const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
#pragma GCC unroll 16
  for (int p = 0; p < 16; ++p) pairs[p] = _mm512_permutexvar_epi16(halves, pairs[p]);  // pairs of outputs, by input
  transpose(pairs);  // by pair of outputs: even inputs in the first eight, odd ones in the others
#pragma GCC unroll 8
  for (int q = 0; q < 8; ++q) {
    uint16_t* line = out + q * 2 * kPanel;
    _mm512_storeu_si512(line, _mm512_permutex2var_epi32(pairs[q], first, pairs[q + 8]));
    _mm512_storeu_si512(line + 32, _mm512_permutex2var_epi32(pairs[q], second, pairs[q + 8]));
  }
}

template <Kind kind>
void pack(const PackedMatrix& weight, int64_t input, int64_t first, int64_t count, uint16_t* panel) {
  __m512i pairs[16];
  for (int64_t o = 0; o < count; o += 16)
    for (int64_t i = 0; i < kPanel; i += 32) {
      load_pairs<kind>(weight, (first + o) / kPanel, (first + o) % kPanel, input + i, pairs);
      store_transposed(pairs, panel + o * kPanel + 2 * i);
    }
}

#else

// Input `inner` of a word, in bfloat16.
template <Kind kind>
uint16_t element(uint32_t word, int64_t inner, float scale) {
  if (kind == Kind::kBfloat16) return static_cast<uint16_t>(word >> 16 * inner);
  const int bits = kind == Kind::kInt8 ? 8 : 4;
  const int code = static_cast<int>(word >> (8 * (inner % 4) + inner / 4 * 4) & ((1 << bits) - 1));
  return float_to_bfloat16(static_cast<float>(code - (1 << (bits - 1))) * scale);
}

template <Kind kind>
float scale_of(const PackedMatrix& weight, int64_t output, int64_t input) {
  if (kind == Kind::kBfloat16) return 1;
  if (kind == Kind::kInt8) return weight.scales[output];
  uint16_t rounded;
  std::memcpy(&rounded, scales_at(weight, output / kPanel, input) + output % kPanel * 2, 2);
  return bfloat16_to_float(rounded);
}

template <Kind kind>
void pack(const PackedMatrix& weight, int64_t input, int64_t first, int64_t count, uint16_t* panel) {
  constexpr int64_t kInputs = inputs_of_word(kind);
  for (int64_t o = 0; o < count; ++o)
    for (int64_t i = 0; i < kPanel; i += kInputs) {
      const int64_t output = first + o;
      const uint8_t* line = words_at<kind>(weight, output / kPanel, input + i);
      uint16_t* out = panel + (o / 2 * kPanel + i) * 2 + o % 2;
      uint32_t word = 0;
      if (line) std::memcpy(&word, line + output % kPanel * 4, 4);
      const float scale = line ? scale_of<kind>(weight, output, input + i) : 0;
      for (int64_t j = 0; j < kInputs; ++j) out[2 * j] = line ? element<kind>(word, j, scale) : 0;
    }
}

#endif

}  // namespace

void pack_transposed_panel(const PackedMatrix& weight, int64_t input, int64_t first, int64_t count, uint16_t* panel) {
  switch (weight.kind) {
    case Kind::kBfloat16: return pack<Kind::kBfloat16>(weight, input, first, count, panel);
    case Kind::kInt8: return pack<Kind::kInt8>(weight, input, first, count, panel);
    default: pack<Kind::kInt4>(weight, input, first, count, panel);
  }
}

}  // namespace ernie::ERNIE_ISA

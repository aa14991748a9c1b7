#include "attention.h"

#include <immintrin.h>

#include <cmath>
#include <cstring>

#include "exp.h"
#include "linear.h"
#include "memory.h"

namespace ernie::ERNIE_ISA {
namespace {

constexpr int64_t kKeys = kPanel;  // keys per block
constexpr int64_t kFewRows = 12;   // queries that leave time to fetch

// One thread's buffers for the rows (tokens of a block times heads of a kv head) of one piece.
struct Scratch {
  uint16_t* query;          // [rows, head_dim] bfloat16, scaled
  uint16_t* key_panel;      // [head_dim / 2][64][2]
  uint16_t* value_panels;   // [head_dim / 64][32][64][2]
  float* scores;            // [rows, 64]
  uint16_t* probabilities;  // [rows, 64] bfloat16
  float* sums;              // [rows, head_dim]
  float* product;           // [rows, 64]
  float* largest;           // [rows]
  float* total;             // [rows]
};

Scratch carve(void* buffer, int64_t rows, int64_t head_dim) {
  uint8_t* next = static_cast<uint8_t*>(buffer);
  auto take = [&next](int64_t bytes) {
    uint8_t* taken = next;
    next += whole_lines(bytes);
    return static_cast<void*>(taken);
  };
  const int64_t padded = (head_dim + kPanel - 1) / kPanel * kPanel;
  Scratch s;
  s.query = static_cast<uint16_t*>(take(rows * head_dim * 2));
  s.key_panel = static_cast<uint16_t*>(take(head_dim * kKeys * 2));
  s.value_panels = static_cast<uint16_t*>(take(padded * kKeys * 2));
  s.scores = static_cast<float*>(take(rows * kKeys * 4));
  s.probabilities = static_cast<uint16_t*>(take(rows * kKeys * 2));
  s.sums = static_cast<float*>(take(rows * padded * 4));
  s.product = static_cast<float*>(take(rows * kPanel * 4));
  s.largest = static_cast<float*>(take(rows * 4));
  s.total = static_cast<float*>(take(rows * 4));
  return s;
}

#ifdef __AVX512F__
// Transposes 16 x 16 words; `in` has one row per stride, `out` one per 64 words.
void transpose_16(const uint32_t* in, int64_t stride, uint32_t* out) {
  __m512i a[16], b[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_si512(in + i * stride);
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    b[2 * i] = _mm512_unpacklo_epi32(a[2 * i], a[2 * i + 1]);
    b[2 * i + 1] = _mm512_unpackhi_epi32(a[2 * i], a[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    a[4 * i] = _mm512_unpacklo_epi64(b[4 * i], b[4 * i + 2]);
    a[4 * i + 1] = _mm512_unpackhi_epi64(b[4 * i], b[4 * i + 2]);
    a[4 * i + 2] = _mm512_unpacklo_epi64(b[4 * i + 1], b[4 * i + 3]);
    a[4 * i + 3] = _mm512_unpackhi_epi64(b[4 * i + 1], b[4 * i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    b[i] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0x88);
    b[i + 4] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0xDD);
    b[i + 8] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0x88);
    b[i + 12] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0xDD);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    _mm512_storeu_si512(out + (i + 0) * kKeys, _mm512_shuffle_i32x4(b[i], b[i + 8], 0x88));
    _mm512_storeu_si512(out + (i + 8) * kKeys, _mm512_shuffle_i32x4(b[i], b[i + 8], 0xDD));
    _mm512_storeu_si512(out + (i + 4) * kKeys, _mm512_shuffle_i32x4(b[i + 4], b[i + 12], 0x88));
    _mm512_storeu_si512(out + (i + 12) * kKeys, _mm512_shuffle_i32x4(b[i + 4], b[i + 12], 0xDD));
  }
}
#endif

// keys [count, head_dim] -> [head_dim / 2][64][2]; absent keys are zero.
void pack_keys(const uint16_t* keys, int64_t stride, int64_t count, int64_t head_dim, uint16_t* panel) {
  const int64_t pairs = head_dim / 2;
  uint32_t* out = reinterpret_cast<uint32_t*>(panel);
  int64_t done = 0;
#ifdef __AVX512F__
  if (pairs % 16 == 0)
    for (; done + 16 <= count; done += 16)
      for (int64_t p = 0; p < pairs; p += 16)
        transpose_16(reinterpret_cast<const uint32_t*>(keys + done * stride) + p, stride / 2, out + p * kKeys + done);
#endif
  for (int64_t p = 0; p < pairs; ++p) {
    for (int64_t k = done; k < count; ++k) std::memcpy(out + p * kKeys + k, keys + k * stride + 2 * p, 4);
    std::memset(out + p * kKeys + count, 0, (kKeys - count) * 4);
  }
}

// values [count, head_dim] -> [head_dim / 64][32][64][2]; absent rows and columns, and rows in front of `first`, which
// nobody sees and which may hold anything, are zero.
void pack_values(const uint16_t* values, int64_t stride, int64_t first, int64_t count, int64_t head_dim,
                 uint16_t* panels) {
  for (int64_t column = 0; column < head_dim; column += kPanel) {
    const int64_t columns = head_dim - column < kPanel ? head_dim - column : kPanel;
    uint32_t* out = reinterpret_cast<uint32_t*>(panels + column * kKeys);
    for (int64_t k = 0; k < kKeys; k += 2, out += kPanel) {
      const uint16_t* upper = values + k * stride + column;
      const uint16_t* lower = upper + stride;
      if (first <= k && k + 1 < count && columns == kPanel) {
        for (int64_t c = 0; c < kPanel; ++c)
          out[c] = static_cast<uint32_t>(upper[c]) | static_cast<uint32_t>(lower[c]) << 16;
      } else {
        for (int64_t c = 0; c < kPanel; ++c)
          out[c] = c >= columns ? 0
                                : (first <= k && k < count ? upper[c] : 0u) |
                                      static_cast<uint32_t>(first <= k + 1 && k + 1 < count ? lower[c] : 0u) << 16;
      }
    }
  }
}

// Turns one row of scores into bfloat16 probabilities relative to the largest score so far; returns the factor that
// makes the earlier sums relative to it too.
float soften(float* scores, int64_t first, int64_t last, float* largest, float* total, uint16_t* probabilities) {
  float peak = *largest;
  int nan = 0;
  for (int64_t k = 0; k < kKeys; ++k)
    if (k < first || k >= last) scores[k] = -INFINITY;
#pragma omp simd reduction(max : peak) reduction(| : nan)
  for (int64_t k = 0; k < kKeys; ++k) {
    peak = scores[k] > peak ? scores[k] : peak;
    nan |= scores[k] != scores[k];
  }
  if (peak == -INFINITY) {
    if (!nan) {  // nothing visible yet
      std::memset(probabilities, 0, kKeys * 2);
      return 1;
    }
    peak = 0;  // any number: it is the total that becomes NaN
  }
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t k = 0; k < kKeys; ++k) {
    const float value = exp(scores[k] - peak);
    scores[k] = value;
    sum += value;
  }
#ifdef __AVX512F__
  for (int64_t k = 0; k < kKeys; k += 16)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(probabilities + k),
                        (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(scores + k)));
#else
  for (int64_t k = 0; k < kKeys; ++k) probabilities[k] = float_to_bfloat16(scores[k]);
#endif
  const float factor = *largest == -INFINITY ? 0 : exp(*largest - peak);
  *total = *total * factor + sum;
  *largest = peak;
  return factor;
}

void scale_row(float* row, int64_t count, float factor) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) row[i] *= factor;
}

}  // namespace

void attend(const AttentionTask& task, const AttentionPlan& plan, int64_t piece, void* buffer, float* partial) {
  const int64_t split = piece % plan.splits, block = piece / plan.splits % plan.blocks;
  const int64_t kv_head = piece / plan.splits / plan.blocks % task.kv_heads;
  const int64_t row = piece / plan.splits / plan.blocks / task.kv_heads;
  const int64_t dim = task.head_dim, group = task.heads / task.kv_heads;
  const int64_t token = block * plan.block;
  const int64_t tokens = task.tokens - token < plan.block ? task.tokens - token : plan.block;
  const int64_t rows = tokens * group;
  const int64_t padded = (dim + kPanel - 1) / kPanel * kPanel;
  const Scratch s = carve(buffer, plan.block * group, dim);

  for (int64_t r = 0; r < rows; ++r) {
    const float* source = task.query + (row * task.tokens + token + r / group) * task.query_stride +
                          (kv_head * group + r % group) * dim;
    for (int64_t i = 0; i < dim; ++i) s.query[r * dim + i] = float_to_bfloat16(source[i] * task.scale);
    s.largest[r] = -INFINITY;
    s.total[r] = 0;
    std::memset(s.sums + r * padded, 0, padded * sizeof(float));
  }

  // Token t sees keys first .. length - (tokens of the task - 1 - t) - 1.
  const int64_t seen = task.length[row] - (task.tokens - 1);
  const int64_t begin = task.first[row] / kKeys * kKeys, end = seen + token + tokens - 1;
  const int64_t blocks = end > begin ? (end - begin + kKeys - 1) / kKeys : 0;
  const int64_t stride = task.kv_heads * dim;
  const int64_t base = row * task.capacity * stride + kv_head * dim;
  for (int64_t b = blocks * split / plan.splits; b < blocks * (split + 1) / plan.splits; ++b) {
    const int64_t key = begin + b * kKeys, count = end - key < kKeys ? end - key : kKeys;
    pack_keys(task.keys + base + key * stride, stride, count, dim, s.key_panel);
    pack_values(task.values + base + key * stride, stride, task.first[row] - key, count, dim, s.value_panels);
    // While a few queries are multiplied, the next block comes nearer; its rows lie too far apart for the hardware to
    // guess. Many queries take longer than the memory does.
    const bool fetch = rows <= kFewRows && key + 2 * kKeys <= end;
    const uint16_t* next_keys = fetch ? task.keys + base + (key + kKeys) * stride : nullptr;
    const uint16_t* next_values = fetch ? task.values + base + (key + kKeys) * stride : nullptr;
    multiply_tile(s.query, dim, rows, s.key_panel, dim / 2, s.scores, kKeys, next_keys, stride * 2);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t visible = seen + token + r / group - key;
      const float factor = soften(s.scores + r * kKeys, task.first[row] - key, visible, s.largest + r, s.total + r,
                                  s.probabilities + r * kKeys);
      if (factor != 1) scale_row(s.sums + r * padded, padded, factor);
    }
    for (int64_t column = 0; column < dim; column += kPanel) {
      const uint16_t* ahead = fetch ? next_values + column / kPanel * (kKeys / 2) * stride : nullptr;
      multiply_tile(s.probabilities, kKeys, rows, s.value_panels + column * kKeys, kKeys / 2, s.product, kPanel, ahead,
                    stride * 2);
      for (int64_t r = 0; r < rows; ++r) {
        float* sum = s.sums + r * padded + column;
        const float* more = s.product + r * kPanel;
#pragma omp simd
        for (int64_t i = 0; i < kPanel; ++i) sum[i] += more[i];
      }
    }
  }

  for (int64_t r = 0; r < rows; ++r) {
    const int64_t line = row * task.tokens + token + r / group, head = kv_head * group + r % group;
    if (plan.splits == 1) {
      float* out = task.out + (line * task.heads + head) * dim;
      const float inverse = s.total[r] > 0 ? 1 / s.total[r] : s.total[r] == 0 ? 0 : NAN;
      for (int64_t i = 0; i < dim; ++i) out[i] = s.sums[r * padded + i] * inverse;
    } else {
      float* out = partial + ((line * task.heads + head) * plan.splits + split) * (dim + 2);
      out[0] = s.largest[r];
      out[1] = s.total[r];
      std::memcpy(out + 2, s.sums + r * padded, dim * sizeof(float));
    }
  }
}

void join_splits(const AttentionTask& task, const AttentionPlan& plan, const float* partial, int64_t first,
                 int64_t last) {
  const int64_t dim = task.head_dim;
  for (int64_t i = first * task.heads; i < last * task.heads; ++i) {
    const float* parts = partial + i * plan.splits * (dim + 2);
    float peak = -INFINITY;
    for (int64_t p = 0; p < plan.splits; ++p) peak = parts[p * (dim + 2)] > peak ? parts[p * (dim + 2)] : peak;
    float* out = task.out + i * dim;
    float total = 0;
    std::memset(out, 0, dim * sizeof(float));
    for (int64_t p = 0; p < plan.splits && peak != -INFINITY; ++p) {
      const float* part = parts + p * (dim + 2);
      const float factor = part[0] == -INFINITY ? 0 : exp(part[0] - peak);
      total += part[1] * factor;
      for (int64_t d = 0; d < dim; ++d) out[d] += part[2 + d] * factor;
    }
    scale_row(out, dim, total > 0 ? 1 / total : total == 0 ? 0 : NAN);
  }
}

}  // namespace ernie::ERNIE_ISA

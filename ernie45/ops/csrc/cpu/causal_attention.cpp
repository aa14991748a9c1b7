#include "causal_attention.h"

#include <cmath>
#include <cstring>

#include "exp.h"
#include "matmul.h"
#include "memory.h"
#include "tile.h"

namespace ernie::ERNIE_ISA {
namespace {

constexpr int64_t kQueries = 64;  // of a block: the more, the more scores behind the diagonal are computed in vain

int64_t rounded_up(int64_t count, int64_t size) { return (count + size - 1) / size * size; }

// One thread's buffers. Rows are [queries, padded numbers], panels as of matmul.h.
struct Buffers {
  int64_t keys, dims;          // padded numbers of keys and of a head
  float *scores, *incoming;    // [kQueries, keys]: probabilities, and the gradient of them
  uint16_t *probabilities, *of_scores;  // [kQueries, keys]
  uint16_t *rows;              // [kQueries, dims]
  uint16_t *across;            // [keys, kQueries]
  uint16_t *left, *right;      // panels [dims, keys] of keys and values
  uint16_t *down;              // panels [keys, dims] of values, or keys
  uint16_t *block;             // panels [kQueries, dims]
};

Buffers carve(const CausalAttention& task, void* memory, int64_t* bytes) {
  Buffers b{};
  b.keys = rounded_up(task.tokens, kPanel);
  b.dims = rounded_up(task.head_dim, kPanel);
  uint8_t* start = static_cast<uint8_t*>(memory);
  int64_t used = 0;
  auto take = [&](int64_t size) {
    void* taken = start + used;
    used += whole_lines(size);
    return taken;
  };
  b.scores = static_cast<float*>(take(kQueries * b.keys * 4));
  b.incoming = static_cast<float*>(take(kQueries * b.keys * 4));
  b.probabilities = static_cast<uint16_t*>(take(kQueries * b.keys * 2));
  b.of_scores = static_cast<uint16_t*>(take(kQueries * b.keys * 2));
  b.rows = static_cast<uint16_t*>(take(kQueries * b.dims * 2));
  b.across = static_cast<uint16_t*>(take(b.keys * kQueries * 2));
  b.left = static_cast<uint16_t*>(take(b.dims * b.keys * 2));
  b.right = static_cast<uint16_t*>(take(b.dims * b.keys * 2));
  b.down = static_cast<uint16_t*>(take(b.dims * b.keys * 2));
  b.block = static_cast<uint16_t*>(take(kQueries * b.dims * 2));
  if (bytes) *bytes = used;
  return b;
}

// One head of [batch, tokens, heads, head_dim], from a token on: [count, head_dim].
template <class Item>
Matrix head_of(const CausalAttention& task, const Item* data, int64_t heads, int64_t row, int64_t head,
               int64_t first, int64_t count) {
  const int64_t stride = heads * task.head_dim;
  return {data + (row * task.tokens + first) * stride + head * task.head_dim, sizeof(Item) == 2, false, count,
          task.head_dim, stride};
}

Matrix transposed(const Matrix& matrix) {
  return {matrix.data, matrix.bfloat16, !matrix.transposed, matrix.columns, matrix.rows, matrix.stride};
}

void pack_panels(const Matrix& b, uint16_t* panels) {
  const int64_t room = rounded_up(b.rows, kPanel);
  for (int64_t column = 0; column < b.columns; column += kPanel)
    pack_panel(b, column, 0, room, panels + column * room);
}

// The queries of a block and the keys that any of them sees.
struct Block {
  int64_t first, count, visible;
};

// Calls body for every block of queries.
template <class Body>
void for_each_block(const CausalAttention& task, const Body& body) {
  for (int64_t first = 0; first < task.tokens; first += kQueries) {
    const int64_t last = first + kQueries < task.tokens ? first + kQueries : task.tokens;
    body(Block{first, last - first, last});
  }
}

// The probabilities of query number `query`, in place of its scores, and rounded. Zero behind the keys that it sees.
void soften(const CausalAttention& task, const int64_t* ends, int64_t query, int64_t room, float* scores,
            uint16_t* rounded) {
  const int64_t count = query + 1;
#pragma omp simd
  for (int64_t k = 0; k < count; ++k) scores[k] *= task.scale;
  if (ends)
    for (int64_t k = 0; k < count; ++k) scores[k] = ends[k] > query ? scores[k] : -INFINITY;
  float largest = -INFINITY;
#pragma omp simd reduction(max : largest)
  for (int64_t k = 0; k < count; ++k) largest = scores[k] > largest ? scores[k] : largest;
  bool blind = ends != nullptr;
  for (int64_t k = 0; blind && k < count; ++k) blind = ends[k] <= query;
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t k = 0; k < count; ++k) {
    scores[k] = exp(scores[k] - largest);
    sum += scores[k];
  }
  const float inverse = 1 / sum;
#pragma omp simd
  for (int64_t k = 0; k < count; ++k) scores[k] *= inverse;
  const int64_t zeros = blind ? 0 : count;
  std::memset(scores + zeros, 0, (room - zeros) * sizeof(float));
  round_row(scores, room, rounded);
}

// Probabilities [block.count, room] of the block, in float32 and rounded.
void probabilities(const CausalAttention& task, const Buffers& b, int64_t row, int64_t head, const Block& block,
                   int64_t room) {
  const Matrix query = head_of(task, task.query, task.heads, row, head, block.first, block.count);
  pack_rows(query, 0, block.count, 0, b.dims, b.rows, b.dims);
  multiply_rows(b.rows, b.dims, block.count, b.left, b.dims * kPanel, b.dims / 2, room,
                {b.scores, false, false, b.keys});
  const int64_t* ends = task.ends ? task.ends + row * task.tokens : nullptr;
  for (int64_t i = 0; i < block.count; ++i)
    soften(task, ends, block.first + i, room, b.scores + i * b.keys, b.probabilities + i * b.keys);
}

// Gradients of the scores from those of the probabilities, rounded: p (dp - sum of p dp) scale.
void score_gradients(const CausalAttention& task, const Buffers& b, int64_t count, int64_t room) {
  for (int64_t i = 0; i < count; ++i) {
    const float* p = b.scores + i * b.keys;
    float* dp = b.incoming + i * b.keys;
    float mean = 0;
#pragma omp simd reduction(+ : mean)
    for (int64_t k = 0; k < room; ++k) mean += p[k] * dp[k];
#pragma omp simd
    for (int64_t k = 0; k < room; ++k) dp[k] = p[k] * (dp[k] - mean) * task.scale;
    round_row(dp, room, b.of_scores + i * b.keys);
  }
}

// sums [block.visible, head_dim] += transpose of weights [block.count, keys] times rows [block.count, head_dim].
void add_across(const CausalAttention& task, const Buffers& b, const uint16_t* weights, const Block& block,
                const Matrix& rows, float* sums) {
  const Matrix across{weights, true, true, block.visible, block.count, b.keys};
  pack_rows(across, 0, block.visible, 0, kQueries, b.across, kQueries);
  pack_panels(rows, b.block);
  multiply_rows(b.across, kQueries, block.visible, b.block, rounded_up(block.count, kPanel) * kPanel,
                (block.count + 1) / 2, task.head_dim, {sums, false, true, task.heads * task.head_dim});
}

}  // namespace

int64_t causal_attention_bytes(const CausalAttention& task) {
  int64_t bytes;
  carve(task, nullptr, &bytes);
  return bytes;
}

void causal_attention(const CausalAttention& task, int64_t row, int64_t head, void* memory, float* out) {
  const Buffers b = carve(task, memory, nullptr);
  const int64_t kv_head = head / (task.heads / task.kv_heads), stride = task.heads * task.head_dim;
  pack_panels(transposed(head_of(task, task.key, task.kv_heads, row, kv_head, 0, task.tokens)), b.left);
  pack_panels(head_of(task, task.value, task.kv_heads, row, kv_head, 0, task.tokens), b.down);
  for_each_block(task, [&](const Block& block) {
    const int64_t room = rounded_up(block.visible, kPanel);
    probabilities(task, b, row, head, block, room);
    float* to = out + (row * task.tokens + block.first) * stride + head * task.head_dim;
    multiply_rows(b.probabilities, b.keys, block.count, b.down, b.keys * kPanel, room / 2, task.head_dim,
                  {to, false, false, stride});
  });
}

void causal_attention_gradient(const CausalAttention& task, int64_t row, int64_t head, void* memory,
                               const CausalAttentionGradient& gradient) {
  const Buffers b = carve(task, memory, nullptr);
  const int64_t kv_head = head / (task.heads / task.kv_heads), stride = task.heads * task.head_dim;
  const int64_t begin = row * task.tokens * stride + head * task.head_dim;
  const Matrix keys = head_of(task, task.key, task.kv_heads, row, kv_head, 0, task.tokens);
  pack_panels(transposed(keys), b.left);
  pack_panels(transposed(head_of(task, task.value, task.kv_heads, row, kv_head, 0, task.tokens)), b.right);
  pack_panels(keys, b.down);
  for (int64_t token = 0; token < task.tokens; ++token) {
    std::memset(gradient.key + begin + token * stride, 0, task.head_dim * sizeof(float));
    std::memset(gradient.value + begin + token * stride, 0, task.head_dim * sizeof(float));
  }
  for_each_block(task, [&](const Block& block) {
    const int64_t room = rounded_up(block.visible, kPanel);
    probabilities(task, b, row, head, block, room);
    const Matrix out = head_of(task, gradient.out, task.heads, row, head, block.first, block.count);
    add_across(task, b, b.probabilities, block, out, gradient.value + begin);
    pack_rows(out, 0, block.count, 0, b.dims, b.rows, b.dims);
    multiply_rows(b.rows, b.dims, block.count, b.right, b.dims * kPanel, b.dims / 2, room,
                  {b.incoming, false, false, b.keys});
    score_gradients(task, b, block.count, room);
    multiply_rows(b.of_scores, b.keys, block.count, b.down, b.keys * kPanel, room / 2, task.head_dim,
                  {gradient.query + begin + block.first * stride, false, false, stride});
    add_across(task, b, b.of_scores, block, head_of(task, task.query, task.heads, row, head, block.first, block.count),
               gradient.key + begin);
  });
}

}  // namespace ernie::ERNIE_ISA

// compiled once
// Products and attention on all threads, for callers outside a parallel region.
#include "attention.h"
#include "linear.h"
#include "memory.h"
#include "parallel.h"

namespace ernie {
namespace {

constexpr int64_t kRowsOfBlock = 128;  // query rows per piece: enough to pay for packing the keys

}  // namespace

void linear(const PackedMatrix& weight, const float* x, int64_t x_stride, int64_t rows, float* y, int64_t y_stride) {
  if (!rows || !weight.out) return;
  const Memory activations = allocate_lines(ERNIE_DISPATCH(activation_bytes, weight, rows));
  parallel_for(rows, 4, [&](int64_t first, int64_t last) {
    ERNIE_DISPATCH(prepare_activations, weight, x, x_stride, nullptr, rows, first, last, activations.get());
  });
  parallel_for(panels(weight.out), 1, [&](int64_t first, int64_t last) {
    ERNIE_DISPATCH(multiply_panels, weight, activations.get(), rows, 0, rows, first, last, y, y_stride);
  });
}

AttentionPlan plan_attention(const AttentionTask& task, int64_t threads) {
  const int64_t group = task.heads / task.kv_heads;
  AttentionPlan plan;
  plan.block = std::max<int64_t>(1, std::min(task.tokens, kRowsOfBlock / group));
  plan.blocks = (task.tokens + plan.block - 1) / plan.block;
  const int64_t pieces = task.batch * task.kv_heads * plan.blocks;
  plan.splits = pieces && pieces < threads ? (threads + pieces - 1) / pieces : 1;
  return plan;
}

int64_t partial_bytes(const AttentionTask& task, const AttentionPlan& plan) {
  if (plan.splits == 1) return 0;
  return task.batch * task.tokens * task.heads * plan.splits * (task.head_dim + 2) * 4;
}

int64_t attention_scratch_bytes(const AttentionTask& task, const AttentionPlan& plan) {
  const int64_t rows = plan.block * (task.heads / task.kv_heads);
  const int64_t padded = (task.head_dim + kPanel - 1) / kPanel * kPanel;
  const int64_t per_row = task.head_dim * 2 + kPanel * (4 + 2 + 4) + padded * 4 + 8;
  const int64_t bytes = rows * per_row + (task.head_dim + padded) * kPanel * 2 + 9 * 64;
  return whole_lines(bytes);  // one after the other, the threads' buffers begin at whole cache lines
}

void attention(const AttentionTask& task) {
  if (!task.batch || !task.tokens) return;
  const AttentionPlan plan = plan_attention(task, num_threads());
  const int64_t bytes = attention_scratch_bytes(task, plan);
  const Memory partial = allocate_lines(partial_bytes(task, plan));
  parallel_for(plan.pieces(task), 1, [&](int64_t first, int64_t last) {
    const Memory scratch = allocate_lines(bytes);
    for (int64_t piece = first; piece < last; ++piece)
      ERNIE_DISPATCH(attend, task, plan, piece, scratch.get(), reinterpret_cast<float*>(partial.get()));
  });
  if (plan.splits == 1) return;
  parallel_for(task.batch * task.tokens, 1, [&](int64_t first, int64_t last) {
    ERNIE_DISPATCH(join_splits, task, plan, reinterpret_cast<float*>(partial.get()), first, last);
  });
}

}  // namespace ernie

// compiled once
// Products and attention on all threads, for callers outside a parallel region.
#include "attention.h"
#include "linear.h"
#include "matmul.h"
#include "memory.h"
#include "parallel.h"

#include <cstring>

namespace ernie {
namespace {

constexpr int64_t kRowsOfBlock = 128;  // query rows per piece: enough to pay for packing the keys

// Sizes of the pieces of a product, in numbers of bfloat16: the right side's share of one thread stays in its second
// cache, the left side in the third.
constexpr int64_t kInner = 4096;         // summed over at a time
constexpr int64_t kLeftNumbers = 1 << 22;
constexpr int64_t kRightNumbers = 3 << 16;
constexpr int64_t kGrain = 1 << 19;      // multiplications of one thread at least

constexpr int64_t parts(int64_t count, int64_t size) { return (count + size - 1) / size; }

uint8_t* at(const Target& c, int64_t row, int64_t column) {
  return static_cast<uint8_t*>(c.data) + (row * c.stride + column) * (c.bfloat16 ? 2 : 4);
}

void clear(const Target& c, int64_t rows, int64_t columns) {
  for (int64_t row = 0; row < rows; ++row) std::memset(at(c, row, 0), 0, columns * (c.bfloat16 ? 2 : 4));
}

// How c is cut into pieces that threads compute independently: groups of panels, and rows if these are too few.
struct Pieces {
  int64_t panels, groups, splits;

  int64_t count() const { return groups * splits; }
  int64_t largest_group() const { return parts(panels, groups); }
  int64_t first_panel(int64_t group) const { return panels * group / groups; }
};

Pieces cut(int64_t rows, int64_t columns, int64_t inner) {
  const int64_t all = panels(columns), threads = num_threads();
  const int64_t fitting = std::max<int64_t>(1, kRightNumbers / (inner * kPanel));
  const int64_t groups = std::min(all, parts(parts(all, fitting), threads) * threads);
  return {all, groups, std::min(parts(threads, groups), parts(rows, kPackedRows))};
}

// A right side with this many columns. pack(column, first, count, panel) packs a panel of it, as `pack_panel` does.
template <class Pack>
struct Right {
  int64_t columns;
  Pack pack;
};

// c = (packed rows of a) times rows first .. first + count - 1 of b.
template <class Pack>
void multiply_packed(const uint16_t* a, int64_t a_stride, int64_t rows, const Right<Pack>& b, int64_t first,
                     int64_t count, const Target& c) {
  const Pieces pieces = cut(rows, b.columns, count);
  const int64_t room = whole_pieces(count), panel_size = room * kPanel;
  const int64_t work = parts(rows, pieces.splits) * pieces.largest_group() * panel_size;
  parallel_for(pieces.count(), parts(kGrain, work), [&](int64_t begin, int64_t end) {
    const Memory memory = allocate_lines(pieces.largest_group() * panel_size * 2);
    uint16_t* packed = reinterpret_cast<uint16_t*>(memory.get());
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t group = piece / pieces.splits, split = piece % pieces.splits;
      const int64_t panel = pieces.first_panel(group), last_panel = pieces.first_panel(group + 1);
      if (piece == begin || split == 0)
        for (int64_t p = panel; p < last_panel; ++p)
          b.pack(p * kPanel, first, room, packed + (p - panel) * panel_size);
      const int64_t column = panel * kPanel, columns = std::min(last_panel * kPanel, b.columns) - column;
      const int64_t row = rows * split / pieces.splits, last_row = rows * (split + 1) / pieces.splits;
      const Target target{at(c, row, column), c.bfloat16, c.add, c.stride};
      ERNIE_DISPATCH(multiply_rows, a + row * a_stride, a_stride, last_row - row, packed, panel_size, (count + 1) / 2,
                     columns, target);
    }
  });
}

// `rows` rows of a from `row` on, and of these `room` columns from `first` on.
void pack_block(const Matrix& a, int64_t row, int64_t rows, int64_t first, int64_t room, uint16_t* out,
                int64_t out_stride) {
  parallel_for(parts(rows, kPackedRows), parts(kGrain / 16, room), [&](int64_t begin, int64_t end) {
    const int64_t from = begin * kPackedRows, until = std::min(end * kPackedRows, rows);
    ERNIE_DISPATCH(pack_rows, a, row + from, until - from, first, room, out + from * out_stride, out_stride);
  });
}

template <class Pack>
void multiply(const Matrix& a, const Right<Pack>& b, const Target& c) {
  if (!a.rows || !b.columns) return;
  if (!a.columns) return c.add ? void() : clear(c, a.rows, b.columns);
  const int64_t inner = c.bfloat16 ? a.columns : std::min(a.columns, kInner);  // what is rounded has to be the whole sum
  if (a.bfloat16 && !a.transposed && a.columns % 2 == 0) {  // need not be packed
    const uint16_t* rows = static_cast<const uint16_t*>(a.data);
    for (int64_t first = 0; first < a.columns; first += inner)
      multiply_packed(rows + first, a.stride, a.rows, b, first, std::min(inner, a.columns - first),
                      {c.data, c.bfloat16, c.add || first > 0, c.stride});
    return;
  }
  // A cache line more than needed: rows that lie a power of two apart would take each other's places in the cache.
  const int64_t stride = whole_pieces(inner) + kPackedInner;
  const int64_t height = parts(a.rows, parts(a.rows, std::max<int64_t>(kLeftNumbers / stride, 256)));
  const Memory memory = allocate_lines(height * stride * 2);
  uint16_t* packed = reinterpret_cast<uint16_t*>(memory.get());
  for (int64_t row = 0; row < a.rows; row += height)
    for (int64_t first = 0; first < a.columns; first += inner) {
      const int64_t rows = std::min(height, a.rows - row), count = std::min(inner, a.columns - first);
      pack_block(a, row, rows, first, whole_pieces(count), packed, stride);
      multiply_packed(packed, stride, rows, b, first, count,
                      {at(c, row, 0), c.bfloat16, c.add || first > 0, c.stride});
    }
}

// The same with a matrix below the first `rows` rows, which `pack` packs.
template <class Pack>
void multiply_stacked(const Matrix& a, int64_t rows, int64_t columns, const Matrix* below, const Target& c,
                      const Pack& pack) {
  if (!below) return multiply(a, Right<Pack>{columns, pack}, c);
  const int64_t upper = whole_pieces(rows);
  const auto both = [&](int64_t column, int64_t first, int64_t count, uint16_t* panel) {
    const int64_t above = std::clamp<int64_t>(upper - first, 0, count);
    if (above) pack(column, first, above, panel);
    if (above == count) return;
    ERNIE_DISPATCH(pack_panel, *below, column, first + above - upper, count - above, panel + above * kPanel);
  };
  multiply(a, Right<decltype(both)>{columns, both}, c);
}

}  // namespace

void matmul(const Matrix& a, const Matrix& b, const Target& c, const Matrix* below) {
  multiply_stacked(a, b.rows, b.columns, below, c, [&b](int64_t column, int64_t first, int64_t count, uint16_t* panel) {
    ERNIE_DISPATCH(pack_panel, b, column, first, count, panel);
  });
}

void matmul_transposed(const Matrix& a, const PackedMatrix& weight, const Target& c, const Matrix* below) {
  multiply_stacked(a, weight.out, weight.in, below, c,
                   [&weight](int64_t column, int64_t first, int64_t count, uint16_t* panel) {
                     ERNIE_DISPATCH(pack_transposed_panel, weight, column, first, count, panel);
                   });
}

void round_rows(const Matrix& a, uint16_t* out, int64_t out_stride) {
  pack_block(a, 0, a.rows, 0, whole_pieces(a.columns), out, out_stride);
}

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

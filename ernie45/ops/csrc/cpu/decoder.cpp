// compiled once
#include "decoder.h"

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <optional>

#include "attention.h"
#include "barrier.h"
#include "elementwise.h"
#include "isa.h"
#include "linear.h"
#include "memory.h"
#include "moe.h"
#include "parallel.h"

namespace ernie {
namespace {

// Memory that grows and is kept between calls, so that a token does not pay for fresh pages.
class Arena {
 public:
  void reset(int64_t bytes) {
    if (bytes > size_) {
      memory_ = allocate_lines(bytes);
      size_ = bytes;
    }
    used_ = 0;
  }
  template <class T>
  T* take(int64_t count) {
    T* taken = reinterpret_cast<T*>(memory_.get() + used_);
    used_ += whole_lines(count * static_cast<int64_t>(sizeof(T)));
    return taken;
  }
  int64_t used() const { return used_; }

 private:
  Memory memory_;
  int64_t size_ = 0, used_ = 0;
};

// What the layers share. All rows are tokens, [batch * tokens].
struct Buffers {
  float *x, *cos, *sin;  // the residual stream; [rows, head_dim / 2]
  float *normed, *fused, *query, *mixed, *delta, *wide, *active;
  uint8_t* activations;
  float* partial;                           // unfinished attention
  uint8_t* attention_scratch;               // one part per thread
  float *logits, *weights;                  // router: [threads, rows, experts], [rows, k]
  int64_t *indices, *counts, *offsets, *sources, *slots;
  float *slot_wide, *slot_active, *slot_out;  // [rows * k, ...]
};

int64_t activation_need(const PackedMatrix& matrix, int64_t rows) {
  return ERNIE_DISPATCH(activation_bytes, matrix, rows);
}

class Run {
 public:
  Run(const DecoderConfig& config, const DecoderWeights& weights, const DecoderInput& input, int threads,
      Arena& arena)
      : config_(config), weights_(weights), input_(input), threads_(threads), rows_(input.batch * input.tokens),
        barrier_(threads), deals_(threads), taken_(kDeals * threads) {
    length_.assign(input.batch, input.cached + input.tokens);
    task_.query_stride = config.heads * config.head_dim;
    task_.first = input.first;
    task_.length = length_.data();
    task_.batch = input.batch;
    task_.tokens = input.tokens;
    task_.capacity = input.capacity;
    task_.heads = config.heads;
    task_.kv_heads = config.kv_heads;
    task_.head_dim = config.head_dim;
    task_.scale = config.attention_scale;
    plan_ = plan_attention(task_, threads);
    scratch_bytes_ = attention_scratch_bytes(task_, plan_);
    Arena measure;
    carve(measure);
    arena.reset(measure.used());
    carve(arena);
    task_.query = buffers_.query;
    task_.out = buffers_.mixed;
  }

  void decode(int thread) {
    embed(thread);
    for (size_t i = 0; i < weights_.layers.size(); ++i) layer(weights_.layers[i], i > 0, thread);
    const int64_t hidden = config_.hidden;
    rows(thread, [&](int64_t first, int64_t last) {
      ERNIE_DISPATCH(add_rms_norm, buffers_.x + first * hidden, buffers_.delta + first * hidden, weights_.final_norm,
                     config_.epsilon, last - first, hidden, input_.out + first * hidden);
    });
  }

 private:
  void carve(Arena& arena) {
    const int64_t hidden = config_.hidden, query = config_.heads * config_.head_dim;
    const int64_t fused = query + 2 * config_.kv_heads * config_.head_dim;
    int64_t width = 0, expert_width = 0, experts = 0, activations = 0;
    for (const DecoderLayer& layer : weights_.layers) {
      activations = std::max({activations, activation_need(layer.qkv, rows_), activation_need(layer.out, rows_)});
      for (const FeedForward* part : {&layer.dense, &layer.routed}) {
        if (!part->experts) continue;
        const int64_t slots = part == &layer.routed ? rows_ * config_.moe_k : rows_;
        activations = std::max({activations, activation_need(part->up_gate, slots), activation_need(part->down, slots)});
      }
      width = std::max(width, layer.dense.experts ? layer.dense.width() : 0);
      expert_width = std::max(expert_width, layer.routed.experts ? layer.routed.width() : 0);
      experts = std::max(experts, layer.routed.experts);
    }
    const int64_t slots = experts ? rows_ * config_.moe_k : 0;
    Buffers& b = buffers_;
    b.x = arena.take<float>(rows_ * hidden);
    b.cos = arena.take<float>(rows_ * config_.head_dim / 2);
    b.sin = arena.take<float>(rows_ * config_.head_dim / 2);
    b.normed = arena.take<float>(rows_ * hidden);
    b.fused = arena.take<float>(rows_ * fused);
    b.query = arena.take<float>(rows_ * query);
    b.mixed = arena.take<float>(rows_ * query);
    b.delta = arena.take<float>(rows_ * hidden);
    b.wide = arena.take<float>(rows_ * 2 * width);
    b.active = arena.take<float>(rows_ * width);
    b.activations = arena.take<uint8_t>(activations);
    b.partial = arena.take<float>(partial_bytes(task_, plan_) / 4);
    b.attention_scratch = arena.take<uint8_t>(scratch_bytes_ * threads_);
    b.logits = arena.take<float>(threads_ * rows_ * experts);
    b.weights = arena.take<float>(slots);
    b.indices = arena.take<int64_t>(slots);
    b.counts = arena.take<int64_t>(experts);
    b.offsets = arena.take<int64_t>(experts + 1);
    b.sources = arena.take<int64_t>(slots);
    b.slots = arena.take<int64_t>(slots);
    b.slot_wide = arena.take<float>(slots * 2 * expert_width);
    b.slot_active = arena.take<float>(slots * expert_width);
    b.slot_out = arena.take<float>(slots * hidden);
  }

  // body(first, last) on this thread's share of 0 .. count - 1, then everybody waits for everybody.
  template <class Body>
  void share(int64_t count, int thread, const Body& body) {
    const int64_t first = count * thread / threads_, last = count * (thread + 1) / threads_;
    if (first < last) body(first, last);
    barrier_.wait();
  }

  template <class Body>
  void rows(int thread, const Body& body) {
    share(rows_, thread, body);
  }

  // body(item, item + 1) on the items 0 .. count - 1, then all meet. Each thread goes through its share in order, because
  // memory is read fastest in one long stream, and then helps those that have fallen behind.
  template <class Body>
  void deal(int64_t count, int thread, const Body& body) {
    Taken* taken = &taken_[deals_[thread].count++ % kDeals * threads_];
    for (int step = 0; step < threads_; ++step) {
      const int owner = (thread + step) % threads_;
      const int64_t first = count * owner / threads_, last = count * (owner + 1) / threads_;
      for (;;) {
        const int64_t item = first + taken[owner].count.fetch_add(1, std::memory_order_relaxed);
        if (item >= last) break;
        body(item, item + 1);
      }
    }
    barrier_.wait();
    taken[thread].count.store(0, std::memory_order_relaxed);  // used again only after more meetings
  }

  // y = prepared rows times the matrix.
  void product(const PackedMatrix& matrix, float* y, int thread) {
    deal(panels(matrix.out), thread, [&](int64_t first, int64_t last) {
      ERNIE_DISPATCH(multiply_panels, matrix, buffers_.activations, rows_, 0, rows_, first, last, y, matrix.out);
    });
  }

  void prepare(const PackedMatrix& matrix, const float* x, int64_t first, int64_t last) {
    ERNIE_DISPATCH(prepare_activations, matrix, x, matrix.in, nullptr, rows_, first, last, buffers_.activations);
  }

  void embed(int thread) {
    const int64_t pairs = config_.head_dim / 2;
    rows(thread, [&](int64_t first, int64_t last) {
      for (int64_t row = first; row < last; ++row) {
        unpack_column(weights_.embedding, input_.ids[row], buffers_.x + row * config_.hidden);
        for (int64_t pair = 0; pair < pairs; ++pair) {
          const float angle = static_cast<float>(input_.positions[row]) * weights_.frequencies[pair];
          buffers_.cos[row * pairs + pair] = std::cos(angle);
          buffers_.sin[row * pairs + pair] = std::sin(angle);
        }
      }
    });
  }

  void layer(const DecoderLayer& layer, bool pending, int thread) {
    normalise(layer.input_norm, pending, layer.qkv, thread);
    product(layer.qkv, buffers_.fused, thread);
    rotate(layer, thread);
    attention(layer, thread);
    rows(thread, [&](int64_t first, int64_t last) { prepare(layer.out, buffers_.mixed, first, last); });
    product(layer.out, buffers_.delta, thread);
    const FeedForward& first_part = layer.dense.experts ? layer.dense : layer.routed;
    normalise(layer.post_norm, true, first_part.up_gate, thread);
    if (layer.dense.experts) dense(layer.dense, thread);
    if (layer.routed.experts) routed(layer, thread);
  }

  // x += delta (if one is pending), normed = norm(x), and the rows prepared for the product that follows.
  void normalise(const float* weight, bool pending, const PackedMatrix& next, int thread) {
    const int64_t hidden = config_.hidden;
    rows(thread, [&](int64_t first, int64_t last) {
      float *x = buffers_.x + first * hidden, *delta = buffers_.delta + first * hidden;
      float* normed = buffers_.normed + first * hidden;
      if (pending)
        ERNIE_DISPATCH(add_rms_norm, x, delta, weight, config_.epsilon, last - first, hidden, normed);
      else
        ERNIE_DISPATCH(rms_norm, x, weight, config_.epsilon, last - first, hidden, normed);
      prepare(next, buffers_.normed, first, last);
    });
  }

  // Turns queries and keys, and appends keys and values to the cache.
  void rotate(const DecoderLayer& layer, int thread) {
    const int64_t dim = config_.head_dim, heads = config_.heads, groups = config_.kv_heads;
    const bool grouped = heads != groups;  // else q, k and v of each head lie side by side
    const int64_t step = grouped ? dim : 3 * dim, width = (heads + 2 * groups) * dim;
    rows(thread, [&](int64_t first, int64_t last) {
      for (int64_t row = first; row < last; ++row) {
        const float *query = buffers_.fused + row * width, *cos = buffers_.cos + row * dim / 2;
        const float *sin = buffers_.sin + row * dim / 2, *key = query + (grouped ? heads * dim : dim);
        const float* value = query + (grouped ? (heads + groups) * dim : 2 * dim);
        const int64_t token = row / input_.tokens * input_.capacity + input_.cached + row % input_.tokens;
        ERNIE_DISPATCH(rope, query, step, cos, sin, heads, dim, buffers_.query + row * heads * dim, dim);
        float turned[512];
        for (int64_t head = 0; head < groups; ++head) {
          ERNIE_DISPATCH(rope, key + head * step, step, cos, sin, 1, dim, turned, dim);
          const int64_t place = (token * groups + head) * dim;
          for (int64_t i = 0; i < dim; ++i) layer.keys[place + i] = float_to_bfloat16(turned[i]);
          for (int64_t i = 0; i < dim; ++i) layer.values[place + i] = float_to_bfloat16(value[head * step + i]);
        }
      }
    });
  }

  void attention(const DecoderLayer& layer, int thread) {
    AttentionTask task = task_;
    task.keys = layer.keys;
    task.values = layer.values;
    const int64_t pieces = plan_.pieces(task);
    // Later blocks of tokens see more keys: deal the pieces round.
    for (int64_t piece = thread; piece < pieces; piece += threads_)
      ERNIE_DISPATCH(attend, task, plan_, piece, buffers_.attention_scratch + thread * scratch_bytes_,
                     buffers_.partial);
    barrier_.wait();
    if (plan_.splits == 1) return;
    rows(thread, [&](int64_t first, int64_t last) {
      ERNIE_DISPATCH(join_splits, task, plan_, buffers_.partial, first, last);
    });
  }

  void dense(const FeedForward& network, int thread) {
    product(network.up_gate, buffers_.wide, thread);
    const int64_t width = network.width();
    rows(thread, [&](int64_t first, int64_t last) {
      ERNIE_DISPATCH(swiglu, buffers_.wide + first * 2 * width, nullptr, last - first, width,
                     buffers_.active + first * width);
      prepare(network.down, buffers_.active, first, last);
    });
    product(network.down, buffers_.delta, thread);
  }

  void routed(const DecoderLayer& layer, int thread) {
    const FeedForward& network = layer.routed;
    const int64_t hidden = config_.hidden, width = network.width(), k = config_.moe_k, slots = rows_ * k;
    Buffers& b = buffers_;
    choose(layer, thread);
    share(slots, thread, [&](int64_t first, int64_t last) {
      ERNIE_DISPATCH(prepare_activations, network.up_gate, b.normed, hidden, b.sources, slots, first, last,
                     b.activations);
    });
    expert_products(network.up_gate, network.experts, b.slot_wide, thread);
    share(slots, thread, [&](int64_t first, int64_t last) {
      ERNIE_DISPATCH(swiglu, b.slot_wide + first * 2 * width, nullptr, last - first, width,
                     b.slot_active + first * width);
      ERNIE_DISPATCH(prepare_activations, network.down, b.slot_active, width, nullptr, slots, first, last,
                     b.activations);
    });
    expert_products(network.down, network.experts, b.slot_out, thread);
    rows(thread, [&](int64_t first, int64_t last) {
      for (int64_t row = first; row < last; ++row) {
        float *sum = b.normed + row * hidden, *out = b.delta + row * hidden;  // normed is not needed any more
        ERNIE_DISPATCH(moe_combine, b.slot_out, b.slots + row * k, b.weights + row * k, 1, k, hidden, sum);
        if (!layer.dense.experts) std::memset(out, 0, hidden * sizeof(float));
        for (int64_t i = 0; i < hidden; ++i) out[i] += sum[i];
      }
    });
  }

  // Router logits, gate, and the slots of every expert.
  void choose(const DecoderLayer& layer, int thread) {
    const int64_t hidden = config_.hidden, experts = layer.routed.experts, k = config_.moe_k;
    Buffers& b = buffers_;
    float* part = b.logits + thread * rows_ * experts;  // each thread reads its share of the router's rows
    std::memset(part, 0, rows_ * experts * sizeof(float));
    share(hidden, thread, [&](int64_t first, int64_t last) {
      ERNIE_DISPATCH(accumulate_rows, b.normed + first, hidden, layer.router + first * experts, rows_, last - first,
                     experts, part);
    });
    rows(thread, [&](int64_t first, int64_t last) {
      const int64_t skip = first * experts, count = (last - first) * experts;
      for (int other = 1; other < threads_; ++other)
        for (int64_t i = 0; i < count; ++i) b.logits[skip + i] += b.logits[other * rows_ * experts + skip + i];
      ERNIE_DISPATCH(moe_gate, b.logits + skip, layer.router_bias, last - first, experts, k, config_.moe_softmax,
                     config_.moe_normalise, config_.moe_minimum, nullptr, b.indices + first * k,
                     b.weights + first * k);
    });
    if (thread == 0)
      ERNIE_DISPATCH(moe_permute, b.indices, rows_, k, experts, b.counts, b.offsets, b.sources, b.slots);
    barrier_.wait();
  }

  // Products of the slots of every chosen expert with its weights; the other experts are not touched.
  void expert_products(const PackedMatrix& first_expert, int64_t experts, float* y, int thread) {
    const int64_t columns = panels(first_expert.out), slots = rows_ * config_.moe_k, bytes = first_expert.bytes();
    deal(experts * columns, thread, [&](int64_t first, int64_t last) {
      for (int64_t expert = first / columns; expert * columns < last; ++expert) {
        if (!buffers_.counts[expert]) continue;
        PackedMatrix matrix = first_expert;
        matrix.data += expert * bytes;
        if (matrix.scales) matrix.scales += expert * columns * kPanel;
        ERNIE_DISPATCH(multiply_panels, matrix, buffers_.activations, slots, buffers_.offsets[expert],
                       buffers_.offsets[expert + 1], std::max<int64_t>(first - expert * columns, 0),
                       std::min(last - expert * columns, columns), y, matrix.out);
      }
    });
  }

  static constexpr int kDeals = 4;      // counters in use in turn
  struct alignas(64) Deals {
    int64_t count = 0;
  };
  struct alignas(64) Taken {
    std::atomic<int64_t> count{0};
  };

  const DecoderConfig& config_;
  const DecoderWeights& weights_;
  const DecoderInput& input_;
  const int threads_;
  const int64_t rows_;
  std::vector<int64_t> length_;
  AttentionTask task_{};
  AttentionPlan plan_{};
  int64_t scratch_bytes_ = 0;
  Buffers buffers_{};
  Barrier barrier_;
  std::vector<Deals> deals_;
  std::vector<Taken> taken_;
};

}  // namespace

void run_decoder(const DecoderConfig& config, const DecoderWeights& weights, const DecoderInput& input) {
  if (input.batch * input.tokens == 0 || weights.layers.empty()) return;
  static thread_local Arena own;
  Arena& arena = own;  // of the calling thread, for all of them
  std::optional<Run> run;
#pragma omp parallel num_threads(num_threads())
  {
#pragma omp single
    run.emplace(config, weights, input, omp_get_num_threads(), arena);  // as many as there really are
    run->decode(omp_get_thread_num());
  }
}

}  // namespace ernie

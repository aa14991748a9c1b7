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

// Consecutive tokens of one bank.
struct Stretch {
  int64_t bank, first, last;
};

// The tokens of one bank, each in as many slots as it chooses experts. All slots are sorted by bank, then by expert.
struct BankSlots {
  int64_t first = 0, count = 0;
  int64_t activations = 0;  // bytes in front of its prepared rows
};

// An expert that tokens have chosen, its slots in its bank, and the panels of all chosen experts up to it.
struct ChosenExpert {
  int64_t bank, expert, first, last, up_gate_panels, down_panels;
};

// What the layers share. All rows are tokens, [batch * tokens].
struct Buffers {
  float *x, *cos, *sin;  // the residual stream; [rows, head_dim / 2]
  float *normed, *fused, *query, *mixed, *delta, *wide, *active;
  uint8_t* activations;
  float* partial;                           // unfinished attention
  uint8_t* attention_scratch;               // one part per thread
  float *logits, *weights;                  // router: [threads, rows, experts], [rows, k]
  int64_t *indices, *counts, *offsets, *sources, *slots;  // experts are numbered through all banks
  ChosenExpert* chosen;
  float *slot_wide, *slot_active, *slot_out;  // [rows * k, ...]
};

int64_t activation_need(const PackedMatrix& matrix, int64_t rows) {
  return ERNIE_DISPATCH(activation_bytes, matrix, rows);
}

int64_t activation_need(const FeedForward& network, int64_t rows) {
  return std::max(activation_need(network.up_gate, rows), activation_need(network.down, rows));
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
    sort_tokens();
    place_slots();
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
  // Which tokens belong to which bank: the same in all layers.
  void sort_tokens() {
    size_t banks = 0;
    for (const DecoderLayer& layer : weights_.layers) banks = std::max(banks, layer.banks.size());
    banks_.resize(banks);
    for (int64_t row = 0; banks && row < rows_; ++row) {
      const int64_t bank = input_.banks ? input_.banks[row] : 0;
      if (stretches_.empty() || stretches_.back().bank != bank) stretches_.push_back({bank, row, row});
      stretches_.back().last = row + 1;
      banks_[bank].count += config_.moe_k;
    }
  }

  // Where the slots of each bank and their prepared rows begin.
  void place_slots() {
    int64_t first = 0;
    for (size_t i = 0; i < banks_.size(); ++i) {
      BankSlots& slots = banks_[i];
      slots.first = first;
      slots.activations = slot_activations_;
      first += slots.count;
      int64_t bytes = 0;
      for (const DecoderLayer& layer : weights_.layers) {
        if (layer.banks.empty()) continue;
        const FeedForward& network = layer.banks[i].network;
        bytes = std::max(bytes, slots.count ? activation_need(network, slots.count) : 0);
        expert_width_ = std::max(expert_width_, network.width());
      }
      slot_activations_ += whole_lines(bytes);
    }
  }

  void carve(Arena& arena) {
    const int64_t hidden = config_.hidden, query = config_.heads * config_.head_dim;
    const int64_t fused = query + 2 * config_.kv_heads * config_.head_dim;
    int64_t width = 0, experts = 0, widest_router = 0, activations = slot_activations_;
    for (const DecoderLayer& layer : weights_.layers) {
      activations = std::max({activations, activation_need(layer.qkv, rows_), activation_need(layer.out, rows_)});
      if (layer.dense.experts) {
        activations = std::max(activations, activation_need(layer.dense, rows_));
        width = std::max(width, layer.dense.width());
      }
      experts = std::max(experts, all_experts(layer));
      widest_router = std::max(widest_router, most_experts(layer));
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
    b.logits = arena.take<float>(threads_ * rows_ * widest_router);
    b.weights = arena.take<float>(slots);
    b.indices = arena.take<int64_t>(slots);
    b.counts = arena.take<int64_t>(experts);
    b.offsets = arena.take<int64_t>(experts + 1);
    b.sources = arena.take<int64_t>(slots);
    b.slots = arena.take<int64_t>(slots);
    b.chosen = arena.take<ChosenExpert>(experts);
    b.slot_wide = arena.take<float>(slots * 2 * expert_width_);
    b.slot_active = arena.take<float>(slots * expert_width_);
    b.slot_out = arena.take<float>(slots * hidden);
  }

  static int64_t all_experts(const DecoderLayer& layer) {
    int64_t experts = 0;
    for (const ExpertBank& bank : layer.banks) experts += bank.network.experts;
    return experts;
  }

  static int64_t most_experts(const DecoderLayer& layer) {
    int64_t experts = 0;
    for (const ExpertBank& bank : layer.banks) experts = std::max(experts, bank.network.experts);
    return experts;
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

  // body(bank, first, last) on this thread's share of the slots, counted from the bank's first one; then all meet.
  template <class Body>
  void share_slots(int thread, const Body& body) {
    share(rows_ * config_.moe_k, thread, [&](int64_t first, int64_t last) {
      for (size_t bank = 0; bank < banks_.size(); ++bank) {
        const BankSlots& slots = banks_[bank];
        const int64_t from = std::max(first - slots.first, int64_t{0}), to = std::min(last - slots.first, slots.count);
        if (from < to) body(bank, from, to);
      }
    });
  }

  // body(item) for the items 0 .. count - 1, then all meet. Each thread goes through its share in order, because memory
  // is read fastest in one long stream, and then helps those that have fallen behind.
  template <class Body>
  void deal(int64_t count, int thread, const Body& body) {
    Taken* taken = &taken_[deals_[thread].count++ % kDeals * threads_];
    for (int step = 0; step < threads_; ++step) {
      const int owner = (thread + step) % threads_;
      const int64_t first = count * owner / threads_, last = count * (owner + 1) / threads_;
      for (;;) {
        const int64_t item = first + taken[owner].count.fetch_add(1, std::memory_order_relaxed);
        if (item >= last) break;
        body(item);
      }
    }
    barrier_.wait();
    taken[thread].count.store(0, std::memory_order_relaxed);  // used again only after more meetings
  }

  // y = prepared rows times the matrix.
  void product(const PackedMatrix& matrix, float* y, int thread) {
    deal(panels(matrix.out), thread, [&](int64_t panel) {
      ERNIE_DISPATCH(multiply_panels, matrix, buffers_.activations, rows_, 0, rows_, panel, panel + 1, y, matrix.out);
    });
  }

  void prepare(const PackedMatrix& matrix, const float* x, int64_t first, int64_t last) {
    ERNIE_DISPATCH(prepare_activations, matrix, x, matrix.in, nullptr, rows_, first, last, buffers_.activations);
  }

  void embed(int thread) {
    const int64_t pairs = config_.head_dim / 2, hidden = config_.hidden;
    rows(thread, [&](int64_t first, int64_t last) {
      for (int64_t row = first; row < last; ++row) {
        const int64_t id = input_.ids[row], *position = input_.positions + row * input_.axes;
        float* x = buffers_.x + row * hidden;
        if (id < 0)
          std::memcpy(x, input_.features + (-1 - id) * hidden, hidden * sizeof(float));
        else
          unpack_column(weights_.embedding, id, x);
        for (int64_t pair = 0; pair < pairs; ++pair) {
          const bool of_time = input_.axes == 1 || pair >= pairs - config_.time_pairs;
          const float angle = static_cast<float>(position[of_time ? 0 : 1 + pair % 2]) * weights_.frequencies[pair];
          buffers_.cos[row * pairs + pair] = std::cos(angle);
          buffers_.sin[row * pairs + pair] = std::sin(angle);
        }
      }
    });
  }

  void layer(const DecoderLayer& layer, bool pending, int thread) {
    normalise(layer.input_norm, pending, &layer.qkv, thread);
    product(layer.qkv, buffers_.fused, thread);
    rotate(layer, thread);
    attention(layer, thread);
    rows(thread, [&](int64_t first, int64_t last) { prepare(layer.out, buffers_.mixed, first, last); });
    product(layer.out, buffers_.delta, thread);
    normalise(layer.post_norm, true, layer.dense.experts ? &layer.dense.up_gate : nullptr, thread);
    if (layer.dense.experts) dense(layer.dense, thread);
    if (!layer.banks.empty()) routed(layer, thread);
  }

  // x += delta (if one is pending), normed = norm(x), and the rows prepared for the product that follows, if one does.
  void normalise(const float* weight, bool pending, const PackedMatrix* next, int thread) {
    const int64_t hidden = config_.hidden;
    rows(thread, [&](int64_t first, int64_t last) {
      float *x = buffers_.x + first * hidden, *delta = buffers_.delta + first * hidden;
      float* normed = buffers_.normed + first * hidden;
      if (pending)
        ERNIE_DISPATCH(add_rms_norm, x, delta, weight, config_.epsilon, last - first, hidden, normed);
      else
        ERNIE_DISPATCH(rms_norm, x, weight, config_.epsilon, last - first, hidden, normed);
      if (next) prepare(*next, buffers_.normed, first, last);
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
    const int64_t hidden = config_.hidden, k = config_.moe_k;
    Buffers& b = buffers_;
    choose(layer, thread);
    share_slots(thread, [&](size_t bank, int64_t first, int64_t last) {
      const BankSlots& slots = banks_[bank];
      ERNIE_DISPATCH(prepare_activations, layer.banks[bank].network.up_gate, b.normed, hidden, b.sources + slots.first,
                     slots.count, first, last, b.activations + slots.activations);
    });
    expert_products(layer, &FeedForward::up_gate, &ChosenExpert::up_gate_panels, b.slot_wide, 2 * expert_width_,
                    thread);
    share_slots(thread, [&](size_t bank, int64_t first, int64_t last) {
      const BankSlots& slots = banks_[bank];
      const FeedForward& network = layer.banks[bank].network;
      const int64_t width = network.width();
      const float* wide = b.slot_wide + slots.first * 2 * expert_width_;
      float* active = b.slot_active + slots.first * expert_width_;
      ERNIE_DISPATCH(swiglu, wide + first * 2 * width, nullptr, last - first, width, active + first * width);
      ERNIE_DISPATCH(prepare_activations, network.down, active, width, nullptr, slots.count, first, last,
                     b.activations + slots.activations);
    });
    expert_products(layer, &FeedForward::down, &ChosenExpert::down_panels, b.slot_out, hidden, thread);
    rows(thread, [&](int64_t first, int64_t last) {
      for (int64_t row = first; row < last; ++row) {
        float *sum = b.normed + row * hidden, *out = b.delta + row * hidden;  // normed is not needed any more
        ERNIE_DISPATCH(moe_combine, b.slot_out, b.slots + row * k, b.weights + row * k, 1, k, hidden, sum);
        if (!layer.dense.experts) std::memset(out, 0, hidden * sizeof(float));
        for (int64_t i = 0; i < hidden; ++i) out[i] += sum[i];
      }
    });
  }

  // Router logits and gate of every token in its own bank, and the slots of every expert.
  void choose(const DecoderLayer& layer, int thread) {
    const int64_t hidden = config_.hidden, widest = most_experts(layer);
    Buffers& b = buffers_;
    float* part = b.logits + thread * rows_ * widest;  // each thread reads its share of the router's rows
    std::memset(part, 0, rows_ * widest * sizeof(float));
    share(hidden, thread, [&](int64_t first, int64_t last) {
      for (const Stretch& stretch : stretches_) {
        const ExpertBank& bank = layer.banks[stretch.bank];
        const int64_t experts = bank.network.experts, tokens = stretch.last - stretch.first;
        ERNIE_DISPATCH(accumulate_rows, b.normed + stretch.first * hidden + first, hidden,
                       bank.router + first * experts, tokens, last - first, experts, part + stretch.first * widest);
      }
    });
    rows(thread, [&](int64_t first, int64_t last) {
      for (const Stretch& stretch : stretches_) {
        const int64_t from = std::max(first, stretch.first), to = std::min(last, stretch.last);
        if (from < to) gate(layer, stretch, from, to);
      }
    });
    if (thread == 0) {
      ERNIE_DISPATCH(moe_permute, b.indices, rows_, config_.moe_k, all_experts(layer), b.counts, b.offsets, b.sources,
                     b.slots);
      list_chosen(layer);
    }
    barrier_.wait();
  }

  // The choice of the tokens first .. last - 1 of a stretch.
  void gate(const DecoderLayer& layer, const Stretch& stretch, int64_t first, int64_t last) {
    const ExpertBank& bank = layer.banks[stretch.bank];
    const int64_t experts = bank.network.experts, widest = most_experts(layer), k = config_.moe_k;
    Buffers& b = buffers_;
    float* logits = b.logits + stretch.first * widest + (first - stretch.first) * experts;
    for (int other = 1; other < threads_; ++other)
      for (int64_t i = 0; i < (last - first) * experts; ++i) logits[i] += logits[other * rows_ * widest + i];
    ERNIE_DISPATCH(moe_gate, logits, bank.router_bias, last - first, experts, k, config_.moe_softmax,
                   config_.moe_normalise, config_.moe_minimum, nullptr, b.indices + first * k, b.weights + first * k);
    int64_t before = 0;  // experts of the banks in front
    for (int64_t i = 0; i < stretch.bank; ++i) before += layer.banks[i].network.experts;
    for (int64_t i = first * k; i < last * k; ++i) b.indices[i] += before;
  }

  void list_chosen(const DecoderLayer& layer) {
    const int64_t* offset = buffers_.offsets;
    ChosenExpert one{};
    chosen_ = 0;
    for (one.bank = 0; one.bank < static_cast<int64_t>(layer.banks.size()); ++one.bank) {
      const FeedForward& network = layer.banks[one.bank].network;
      for (one.expert = 0; one.expert < network.experts; ++one.expert, ++offset) {
        if (offset[0] == offset[1]) continue;
        one.first = offset[0] - banks_[one.bank].first;
        one.last = offset[1] - banks_[one.bank].first;
        one.up_gate_panels += panels(network.up_gate.out);
        one.down_panels += panels(network.down.out);
        buffers_.chosen[chosen_++] = one;
      }
    }
  }

  // Products of the slots of every chosen expert, of all banks, with its weights. A bank's rows of y begin `y_slot` per
  // slot in front of it.
  void expert_products(const DecoderLayer& layer, PackedMatrix FeedForward::*projection,
                       int64_t ChosenExpert::*panels_so_far, float* y, int64_t y_slot, int thread) {
    const ChosenExpert *begin = buffers_.chosen, *end = begin + chosen_;
    deal(end[-1].*panels_so_far, thread, [&](int64_t item) {
      const auto ends_after = [&](int64_t panel, const ChosenExpert& one) { return panel < one.*panels_so_far; };
      const ChosenExpert& one = *std::upper_bound(begin, end, item, ends_after);
      const BankSlots& slots = banks_[one.bank];
      PackedMatrix matrix = layer.banks[one.bank].network.*projection;
      const int64_t columns = panels(matrix.out), panel = item - (one.*panels_so_far - columns);
      matrix.data += one.expert * matrix.bytes();
      if (matrix.scales) matrix.scales += one.expert * columns * kPanel;
      ERNIE_DISPATCH(multiply_panels, matrix, buffers_.activations + slots.activations, slots.count, one.first,
                     one.last, panel, panel + 1, y + slots.first * y_slot, matrix.out);
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
  std::vector<Stretch> stretches_;
  std::vector<BankSlots> banks_;
  int64_t slot_activations_ = 0, expert_width_ = 0;  // bytes; the largest of all banks
  int64_t chosen_ = 0;
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

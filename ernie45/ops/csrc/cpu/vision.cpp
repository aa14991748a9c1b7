// compiled once
#include "vision.h"

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <optional>

#include "barrier.h"
#include "elementwise.h"
#include "frame_attention.h"
#include "isa.h"
#include "linear.h"
#include "memory.h"
#include "parallel.h"

namespace ernie {
namespace {

constexpr int64_t kMostRows = 128;  // of a chunk: enough to read weights at the speed of arithmetic

// Consecutive queries of one head of a frame.
struct Piece {
  const Frame* frame;
  int64_t head, first, count;
};

// Items of a phase that somebody works on.
struct Taken {
  std::atomic<int64_t> count{0};
};

// What one thread computes with.
struct Scratch {
  Memory activations;          // rows of a chunk, prepared for a product
  Memory normed, wide, delta;  // float32 [chunk, ...]
  Memory attention;
};

float* floats(const Memory& memory) { return reinterpret_cast<float*>(memory.get()); }

class Run {
 public:
  Run(const VisionWeights& weights, const VisionInput& input, int threads)
      : weights_(weights), input_(input), threads_(threads), width_(weights.width()), barrier_(threads),
        taken_(2 * weights.blocks.size() + 1) {
    // The threads get equally many chunks.
    const int64_t rounds = (input.patches + kMostRows * threads - 1) / (kMostRows * threads);
    chunks_ = std::min(input.patches, rounds * threads);
    chunk_rows_ = (input.patches + chunks_ - 1) / chunks_;
    lay_out_frames();
    allocate();
  }

  void encode(int thread) {
    Scratch scratch = make_scratch();
    const int64_t depth = static_cast<int64_t>(weights_.blocks.size());
    clear_values(thread);
    for (int64_t block = 0; block <= depth; ++block) {
      deal(2 * block, chunks_, [&](int64_t chunk) {
        const int64_t first = input_.patches * chunk / chunks_, last = input_.patches * (chunk + 1) / chunks_;
        if (block == 0)
          embed(first, last - first, scratch);
        else
          finish(weights_.blocks[block - 1], first, last - first, scratch);
        if (block < depth)
          begin(weights_.blocks[block], first, last - first, scratch);
        else
          normalise(weights_.norm, first, last - first, row(first));
      });
      if (block == depth) return;
      deal(2 * block + 1, static_cast<int64_t>(pieces_.size()), [&](int64_t index) {
        const Piece& piece = pieces_[index];
        ERNIE_DISPATCH(attend_frame, buffers_, *piece.frame, piece.head, piece.first, piece.count,
                       scratch.attention.get());
      });
    }
  }

 private:
  void lay_out_frames() {
    frames_.reserve(input_.lengths.size());
    frame_of_row_.reserve(input_.patches);
    int64_t row = 0, slot = 0;
    for (int64_t patches : input_.lengths) {
      frames_.push_back({row, slot, patches});
      const Frame* frame = &frames_.back();
      frame_of_row_.insert(frame_of_row_.end(), patches, frame);
      const int64_t cuts = (patches + kFrameQueries - 1) / kFrameQueries;
      for (int64_t head = 0; head < weights_.heads; ++head)
        for (int64_t cut = 0; cut < cuts; ++cut) {
          const int64_t first = patches * cut / cuts;
          pieces_.push_back({frame, head, first, patches * (cut + 1) / cuts - first});
        }
      row += patches;
      slot += frame->slots();
    }
    buffers_ = {weights_.heads, weights_.head_dim, row, slot, nullptr, nullptr, nullptr};
  }

  void allocate() {
    queries_ = allocate_lines(buffers_.heads * buffers_.rows * buffers_.head_dim * 2);
    keys_ = allocate_lines(buffers_.heads * buffers_.slots * buffers_.head_dim * 2);
    values_ = allocate_lines(values_bytes());
    buffers_.queries = reinterpret_cast<uint16_t*>(queries_.get());
    buffers_.keys = reinterpret_cast<uint16_t*>(keys_.get());
    buffers_.values = reinterpret_cast<uint16_t*>(values_.get());
  }

  int64_t values_bytes() const { return buffers_.heads * buffers_.slots * buffers_.padded_dim() * 2; }

  // Slots and columns without a patch stay zero.
  void clear_values(int thread) {
    const int64_t first = values_bytes() * thread / threads_, last = values_bytes() * (thread + 1) / threads_;
    std::memset(values_.get() + first, 0, last - first);
    barrier_.wait();
  }

  Scratch make_scratch() const {
    int64_t activations = ERNIE_DISPATCH(activation_bytes, weights_.patch_embed, chunk_rows_), wide = 3 * width_;
    for (const VisionBlock& block : weights_.blocks) {
      for (const BiasedMatrix* matrix : {&block.qkv, &block.proj, &block.fc1, &block.fc2})
        activations = std::max(activations, ERNIE_DISPATCH(activation_bytes, matrix->weight, chunk_rows_));
      wide = std::max(wide, block.fc1.weight.out);
    }
    auto of_rows = [&](int64_t columns) { return allocate_lines(chunk_rows_ * columns * 4); };
    return {allocate_lines(activations), of_rows(width_), of_rows(wide), of_rows(width_),
            allocate_lines(ERNIE_DISPATCH(frame_scratch_bytes, buffers_))};
  }

  // body(item) on the items 0 .. count - 1, each on the thread that is free first; then all meet.
  template <class Body>
  void deal(int64_t phase, int64_t count, const Body& body) {
    for (;;) {
      const int64_t item = taken_[phase].count.fetch_add(1, std::memory_order_relaxed);
      if (item >= count) break;
      body(item);
    }
    barrier_.wait();
  }

  float* row(int64_t index) const { return input_.out + index * width_; }  // of the residual stream

  static void product(const PackedMatrix& matrix, const float* x, int64_t rows, float* y, Scratch& scratch) {
    void* prepared = scratch.activations.get();
    ERNIE_DISPATCH(prepare_activations, matrix, x, matrix.in, nullptr, rows, 0, rows, prepared);
    ERNIE_DISPATCH(multiply_panels, matrix, prepared, rows, 0, rows, 0, panels(matrix.out), y, matrix.out);
  }

  void normalise(const NormWeights& norm, int64_t first, int64_t rows, float* out) const {
    ERNIE_DISPATCH(layer_norm, row(first), norm.weight, norm.bias, weights_.epsilon, rows, width_, out);
  }

  void embed(int64_t first, int64_t rows, Scratch& scratch) const {
    const PackedMatrix& matrix = weights_.patch_embed;
    product(matrix, input_.pixels + first * matrix.in, rows, row(first), scratch);
  }

  // Everything in front of the attention.
  void begin(const VisionBlock& block, int64_t first, int64_t rows, Scratch& scratch) const {
    float *normed = floats(scratch.normed), *fused = floats(scratch.wide);
    normalise(block.norm1, first, rows, normed);
    product(block.qkv.weight, normed, rows, fused, scratch);
    ERNIE_DISPATCH(store_patches, buffers_, fused, block.qkv.bias, input_.cos, input_.sin, frame_of_row_.data(), first,
                   rows);
  }

  // Everything behind it.
  void finish(const VisionBlock& block, int64_t first, int64_t rows, Scratch& scratch) const {
    float *normed = floats(scratch.normed), *wide = floats(scratch.wide), *delta = floats(scratch.delta);
    gather(first, rows, normed);
    product(block.proj.weight, normed, rows, delta, scratch);
    ERNIE_DISPATCH(add_with_bias, row(first), delta, block.proj.bias, rows, width_);
    normalise(block.norm2, first, rows, normed);
    product(block.fc1.weight, normed, rows, wide, scratch);
    ERNIE_DISPATCH(add_bias_quick_gelu, wide, block.fc1.bias, rows, block.fc1.weight.out);
    product(block.fc2.weight, wide, rows, delta, scratch);
    ERNIE_DISPATCH(add_with_bias, row(first), delta, block.fc2.bias, rows, width_);
  }

  // out [rows, width] = the results of the attention, the heads side by side.
  void gather(int64_t first, int64_t rows, float* out) const {
    const int64_t dim = buffers_.head_dim;
    for (int64_t head = 0; head < buffers_.heads; ++head)
      for (int64_t r = 0; r < rows; ++r)
        ERNIE_DISPATCH(widen, buffers_.queries + (head * buffers_.rows + first + r) * dim, dim,
                       out + r * width_ + head * dim);
  }

  const VisionWeights& weights_;
  const VisionInput& input_;
  const int threads_;
  const int64_t width_;
  int64_t chunks_ = 0, chunk_rows_ = 0;
  std::vector<Frame> frames_;
  std::vector<const Frame*> frame_of_row_;
  std::vector<Piece> pieces_;
  FrameBuffers buffers_{};
  Memory queries_, keys_, values_;
  Barrier barrier_;
  std::vector<Taken> taken_;
};

}  // namespace

void run_vision(const VisionWeights& weights, const VisionInput& input) {
  if (!input.patches) return;
  std::optional<Run> run;
#pragma omp parallel num_threads(num_threads())
  {
#pragma omp single
    run.emplace(weights, input, omp_get_num_threads());  // as many as there really are
    run->encode(omp_get_thread_num());
  }
}

}  // namespace ernie

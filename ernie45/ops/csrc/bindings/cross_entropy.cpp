// Head and cross entropy in one, for some hundred tokens at a time, with the gradients.
#include "../cpu/cross_entropy.h"

#include "../cpu/elementwise.h"
#include "../cpu/linear.h"
#include "../cpu/matmul.h"
#include "../cpu/parallel.h"
#include "packed.h"
#include "tensors.h"

namespace ernie::cross_entropy_op {
namespace {

using paddle::DataType;
using paddle::Tensor;

// A head as a parameter, [vocabulary, width] or [width, vocabulary].
struct PlainHead {
  const Tensor& weight;
  bool outputs_first;

  // As [width, vocabulary], or with `transposed` the other way round.
  Matrix matrix(bool transposed) const {
    const int64_t height = weight.shape()[0], width = weight.shape()[1];
    if (outputs_first != transposed) return {weight.data(), true, true, width, height, width};
    return {weight.data(), true, false, height, width, width};
  }

  void logits(const Matrix& rows, float* out) const {
    matmul(rows, matrix(false), {out, false, false, weight.shape()[outputs_first ? 0 : 1]});
  }
  void hidden_gradient(const Matrix& gradient, const Target& target) const { matmul(gradient, matrix(true), target); }
};

// A packed head, whose logits are those of inference.
struct PackedHead {
  const PackedMatrix& weight;

  void logits(const Matrix& rows, float* out) const {
    linear(weight, static_cast<const float*>(rows.data), rows.stride, rows.rows, out, weight.out);
  }
  void hidden_gradient(const Matrix& gradient, const Target& target) const {
    matmul_transposed(gradient, weight, target);
  }
};

// What the loss of a chunk of tokens, and of all, depends on besides the head.
struct Task {
  Tensor rows, ids;
  int64_t vocabulary, width, tokens, chunk;
  float divisor, z;

  Task(const Tensor& hidden, const Tensor& targets, int64_t outputs, int64_t inputs, int64_t most, float by, float of_z)
      : rows(checked_float32("head_loss", "hidden", hidden, {kAny, inputs})),
        ids(checked("head_loss", "targets", targets, DataType::INT64, {rows.shape()[0]})),
        vocabulary(outputs), width(inputs), tokens(rows.shape()[0]), chunk(most), divisor(by), z(of_z) {
    const int64_t* labels = ids.data<int64_t>();
    for (int64_t i = 0; i < tokens; ++i)
      PD_CHECK(0 <= labels[i] && labels[i] < vocabulary, "head_loss: target ", labels[i], ", expected less than ",
               vocabulary);
    PD_CHECK(chunk > 0, "head_loss: chunk is ", chunk, ", expected a positive number of tokens");
  }
};

// The sum of the losses. With `gradients`, each(first token, rows [count, width], gradient of their logits [count,
// vocabulary] in bfloat16) is called for every chunk, once without rows if there are no tokens.
template <class Head, class Each>
Tensor sum_of_losses(const Task& task, const Head& head, bool gradients, const Each& each) {
  const int64_t vocabulary = task.vocabulary;
  Tensor memory = in_large_pages(empty_float32({std::min(task.chunk, task.tokens), vocabulary}));
  float* logits = memory.data<float>();
  const int64_t* labels = task.ids.data<int64_t>();
  std::vector<float> losses(task.tokens);
  for (int64_t first = 0; first == 0 || first < task.tokens; first += task.chunk) {
    const int64_t count = std::min(task.chunk, task.tokens - first);
    const Matrix x{task.rows.data<float>() + first * task.width, false, false, count, task.width, task.width};
    head.logits(x, logits);
    parallel_for(count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        losses[first + i] = ERNIE_DISPATCH(cross_entropy, logits + i * vocabulary, vocabulary, labels[first + i],
                                           task.z, gradients ? 1 / task.divisor : 0.0f);
    });
    // The gradient lies over the logits: bfloat16 rows, two of their lengths apart.
    if (gradients) each(first, x, Matrix{logits, true, false, count, vocabulary, 2 * vocabulary});
  }
  Tensor loss = empty_float32({1});
  double sum = 0;
  for (const float value : losses) sum += value;
  *loss.data<float>() = static_cast<float>(sum);
  return loss;
}

std::vector<Tensor> head_loss(const Tensor& hidden, const Tensor& weight, const Tensor& targets, bool outputs_first,
                              int64_t chunk, float divisor, float z, bool wants_hidden, bool wants_weight) {
  const Tensor w = checked("head_loss", "weight", weight, DataType::BFLOAT16, {kAny, kAny});
  const int64_t vocabulary = w.shape()[outputs_first ? 0 : 1], width = w.shape()[outputs_first ? 1 : 0];
  const Task task(hidden, targets, vocabulary, width, chunk, divisor, z);
  const PlainHead head{w, outputs_first};
  Tensor of_hidden = empty_float32({wants_hidden ? task.tokens : 0, width});
  Tensor of_weight = in_large_pages(
      paddle::empty(wants_weight ? w.shape() : Shape{0, 0}, DataType::BFLOAT16, paddle::CPUPlace()));
  const bool single = task.tokens <= chunk;
  Tensor total = wants_weight && !single ? in_large_pages(empty_float32(w.shape())) : Tensor();
  Tensor loss = sum_of_losses(
      task, head, wants_hidden || wants_weight, [&](int64_t first, const Matrix& x, const Matrix& gradient) {
        if (wants_hidden)
          head.hidden_gradient(gradient, {of_hidden.data<float>() + first * width, false, false, width});
        if (!wants_weight) return;
        const Target target = single ? Target{of_weight.data(), true, false, w.shape()[1]}
                                     : Target{total.data(), false, first > 0, w.shape()[1]};
        if (outputs_first)
          matmul({gradient.data, true, true, vocabulary, x.rows, gradient.stride}, x, target);
        else
          matmul({x.data, false, true, width, x.rows, x.stride}, gradient, target);
      });
  if (total.impl()) {
    auto* to = reinterpret_cast<uint16_t*>(of_weight.data<phi::dtype::bfloat16>());
    const float* from = total.data<float>();
    parallel_for(of_weight.numel(), 1 << 16, [&](int64_t first, int64_t last) {
      ERNIE_DISPATCH(narrow, from + first, last - first, to + first);
    });
  }
  return {loss, of_hidden, of_weight};
}

std::vector<Shape> head_loss_shape(const Shape& hidden, const Shape& weight, const Shape&, bool, int64_t, float, float,
                                   bool wants_hidden, bool wants_weight) {
  return {{1}, {wants_hidden ? hidden[0] : 0, hidden[1]}, wants_weight ? weight : Shape{0, 0}};
}

std::vector<DataType> head_loss_dtype(DataType, DataType, DataType) {
  return {DataType::FLOAT32, DataType::FLOAT32, DataType::BFLOAT16};
}

std::vector<Tensor> packed_head_loss(const Tensor& hidden, const Tensor& data, const paddle::optional<Tensor>& scales,
                                     const Tensor& targets, int64_t kind, int64_t in, int64_t out, int64_t chunk,
                                     float divisor, float z, bool wants_hidden) {
  const PackedMatrix weight = packed_matrix("head_loss", data, scales ? &*scales : nullptr, {kind, in, out, 1});
  const Task task(hidden, targets, out, in, chunk, divisor, z);
  const PackedHead head{weight};
  Tensor of_hidden = empty_float32({wants_hidden ? task.tokens : 0, in});
  const Tensor loss =
      sum_of_losses(task, head, wants_hidden, [&](int64_t first, const Matrix&, const Matrix& gradient) {
        head.hidden_gradient(gradient, {of_hidden.data<float>() + first * in, false, false, in});
      });
  return {loss, of_hidden};
}

std::vector<Shape> packed_head_loss_shape(const Shape& hidden, const Shape&, const paddle::optional<Shape>&,
                                          const Shape&, int64_t, int64_t, int64_t, int64_t, float, float,
                                          bool wants_hidden) {
  return {{1}, {wants_hidden ? hidden[0] : 0, hidden[1]}};
}

std::vector<DataType> packed_head_loss_dtype(DataType, DataType, const paddle::optional<DataType>&, DataType) {
  return {DataType::FLOAT32, DataType::FLOAT32};
}

}  // namespace
}  // namespace ernie::cross_entropy_op

PD_BUILD_OP(ernie45_head_loss)
    .Inputs({"hidden", "weight", "targets"})
    .Outputs({"loss", "of_hidden", "of_weight"})
    .Attrs({"outputs_first: bool", "chunk: int64_t", "divisor: float", "z: float", "wants_hidden: bool",
            "wants_weight: bool"})
    .SetKernelFn(PD_KERNEL(ernie::cross_entropy_op::head_loss))
    .SetInferShapeFn(PD_INFER_SHAPE(ernie::cross_entropy_op::head_loss_shape))
    .SetInferDtypeFn(PD_INFER_DTYPE(ernie::cross_entropy_op::head_loss_dtype));

PD_BUILD_OP(ernie45_packed_head_loss)
    .Inputs({"hidden", "data", paddle::Optional("scales"), "targets"})
    .Outputs({"loss", "of_hidden"})
    .Attrs({"kind: int64_t", "in_features: int64_t", "out_features: int64_t", "chunk: int64_t", "divisor: float",
            "z: float", "wants_hidden: bool"})
    .SetKernelFn(PD_KERNEL(ernie::cross_entropy_op::packed_head_loss))
    .SetInferShapeFn(PD_INFER_SHAPE(ernie::cross_entropy_op::packed_head_loss_shape))
    .SetInferDtypeFn(PD_INFER_DTYPE(ernie::cross_entropy_op::packed_head_loss_dtype));

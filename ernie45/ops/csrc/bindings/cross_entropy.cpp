// Head and cross entropy in one, for some hundred tokens at a time, with the gradients.
#include "../cpu/cross_entropy.h"

#include "../cpu/elementwise.h"
#include "../cpu/matmul.h"
#include "../cpu/parallel.h"
#include "tensors.h"

namespace ernie::cross_entropy_op {
namespace {

using paddle::DataType;
using paddle::Tensor;

Matrix head_matrix(const Tensor& weight, bool outputs_first, bool transposed) {
  const int64_t height = weight.shape()[0], width = weight.shape()[1];
  // As [width, vocabulary], or with `transposed` the other way round.
  if (outputs_first != transposed) return {weight.data(), true, true, width, height, width};
  return {weight.data(), true, false, height, width, width};
}

Tensor empty_bfloat16(const Shape& shape) {
  return in_large_pages(paddle::empty(shape, DataType::BFLOAT16, paddle::CPUPlace()));
}

std::vector<Tensor> head_loss(const Tensor& hidden, const Tensor& weight, const Tensor& targets, bool outputs_first,
                              int64_t chunk, float divisor, float z, bool wants_hidden, bool wants_weight) {
  const char* op = "head_loss";
  const Tensor w = checked(op, "weight", weight, DataType::BFLOAT16, {kAny, kAny});
  const int64_t vocabulary = w.shape()[outputs_first ? 0 : 1], width = w.shape()[outputs_first ? 1 : 0];
  const Tensor rows = checked_float32(op, "hidden", hidden, {kAny, width});
  const int64_t tokens = rows.shape()[0];
  const Tensor ids = checked(op, "targets", targets, DataType::INT64, {tokens});
  const int64_t* labels = ids.data<int64_t>();
  for (int64_t i = 0; i < tokens; ++i)
    PD_CHECK(0 <= labels[i] && labels[i] < vocabulary, op, ": target ", labels[i], ", expected less than ", vocabulary);
  PD_CHECK(chunk > 0, op, ": chunk is ", chunk, ", expected a positive number of tokens");

  Tensor loss = empty_float32({1});
  Tensor of_hidden = empty_float32({wants_hidden ? tokens : 0, width});
  Tensor of_weight = empty_bfloat16(wants_weight ? w.shape() : Shape{0, 0});
  const bool single = tokens <= chunk, gradients = wants_hidden || wants_weight;
  Tensor total = wants_weight && !single ? in_large_pages(empty_float32(w.shape())) : Tensor();
  Tensor memory = in_large_pages(empty_float32({std::min(chunk, tokens), vocabulary}));
  float* logits = memory.data<float>();
  std::vector<float> losses(tokens);
  for (int64_t first = 0; first == 0 || first < tokens; first += chunk) {  // once without tokens: zeros
    const int64_t count = std::min(chunk, tokens - first);
    const float* x = rows.data<float>() + first * width;
    matmul({x, false, false, count, width, width}, head_matrix(w, outputs_first, false),
           {logits, false, false, vocabulary});
    parallel_for(count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        losses[first + i] = ERNIE_DISPATCH(cross_entropy, logits + i * vocabulary, vocabulary, labels[first + i], z,
                                           gradients ? 1 / divisor : 0.0f);
    });
    // The gradient of the logits: bfloat16 rows, two of their lengths apart.
    const Matrix gradient{logits, true, false, count, vocabulary, 2 * vocabulary};
    const Matrix across{logits, true, true, vocabulary, count, 2 * vocabulary};
    if (wants_hidden)
      matmul(gradient, head_matrix(w, outputs_first, true),
             {of_hidden.data<float>() + first * width, false, false, width});
    if (!wants_weight) continue;
    const Target target = single ? Target{of_weight.data(), true, false, w.shape()[1]}
                                 : Target{total.data(), false, first > 0, w.shape()[1]};
    if (outputs_first)
      matmul(across, {x, false, false, count, width, width}, target);
    else
      matmul({x, false, true, width, count, width}, gradient, target);
  }
  if (total.impl()) {
    auto* to = reinterpret_cast<uint16_t*>(of_weight.data<phi::dtype::bfloat16>());
    const float* from = total.data<float>();
    parallel_for(of_weight.numel(), 1 << 16, [&](int64_t first, int64_t last) {
      ERNIE_DISPATCH(narrow, from + first, last - first, to + first);
    });
  }
  double sum = 0;
  for (const float value : losses) sum += value;
  *loss.data<float>() = static_cast<float>(sum);
  return {loss, of_hidden, of_weight};
}

std::vector<Shape> head_loss_shape(const Shape& hidden, const Shape& weight, const Shape&, bool, int64_t, float, float,
                                   bool wants_hidden, bool wants_weight) {
  return {{1}, {wants_hidden ? hidden[0] : 0, hidden[1]}, wants_weight ? weight : Shape{0, 0}};
}

std::vector<DataType> head_loss_dtype(DataType, DataType, DataType) {
  return {DataType::FLOAT32, DataType::FLOAT32, DataType::BFLOAT16};
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

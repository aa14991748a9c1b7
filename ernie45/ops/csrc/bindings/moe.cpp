// Operators that send tokens to experts and back. All tensors are float32, indices and counts int64.
#include "../cpu/moe.h"

#include "../cpu/parallel.h"
#include "tensors.h"

namespace ernie::moe {
namespace {

using paddle::DataType;
using paddle::Tensor;

Tensor empty_int64(const Shape& shape) { return paddle::empty(shape, DataType::INT64, paddle::CPUPlace()); }

Tensor checked_int64(const char* op, const char* argument, const Tensor& tensor, const Shape& expected) {
  return checked(op, argument, tensor, DataType::INT64, expected);
}

void check_range(const char* op, const char* argument, const Tensor& tensor, int64_t limit) {
  const int64_t* values = tensor.data<int64_t>();
  for (int64_t i = 0; i < tensor.numel(); ++i)
    PD_CHECK(0 <= values[i] && values[i] < limit, op, ": ", argument, " contains ", values[i], ", expected 0 to ",
             limit - 1);
}

// The gate.

std::vector<Tensor> moe_gate(const Tensor& logits, const paddle::optional<Tensor>& bias, int64_t k, bool softmax,
                             bool normalise, float minimum) {
  const Tensor input = checked_float32("moe_gate", "logits", logits, {kAny, kAny});
  const int64_t tokens = input.shape()[0], experts = input.shape()[1];
  PD_CHECK(0 < k && k <= experts, "moe_gate: k is ", k, ", expected 1 to the ", experts, " experts");
  const Tensor shift = bias ? checked_float32("moe_gate", "bias", *bias, {experts}) : Tensor();
  Tensor probabilities = empty_float32({tokens, experts}), weights = empty_float32({tokens, k});
  Tensor indices = empty_int64({tokens, k});
  const float *from = input.data<float>(), *shift_by = bias ? shift.data<float>() : nullptr;
  float *to = probabilities.data<float>(), *to_weights = weights.data<float>();
  int64_t* to_indices = indices.data<int64_t>();
  parallel_for(tokens, grain_for(8 * experts), [&](int64_t first, int64_t last) {
    ERNIE_DISPATCH(moe_gate, from + first * experts, shift_by, last - first, experts, k, softmax, normalise, minimum,
                   to + first * experts, to_indices + first * k, to_weights + first * k);
  });
  return {probabilities, indices, weights};
}

std::vector<Tensor> moe_gate_grad(const Tensor& probabilities, const Tensor& indices, const Tensor& grad_probabilities,
                                  const Tensor& grad_weights, int64_t k, bool softmax, bool normalise, float minimum) {
  const Shape shape = probabilities.shape(), chosen = {shape[0], k};
  const int64_t tokens = shape[0], experts = shape[1];
  const Tensor values = checked_float32("moe_gate_grad", "probabilities", probabilities, shape);
  const Tensor places = checked_int64("moe_gate_grad", "indices", indices, chosen);
  const Tensor incoming =
      checked_float32("moe_gate_grad", "grad_probabilities", or_zeros(grad_probabilities, shape), shape);
  const Tensor incoming_weights =
      checked_float32("moe_gate_grad", "grad_weights", or_zeros(grad_weights, chosen), chosen);
  Tensor grad_logits = empty_float32(shape);
  const float *from = values.data<float>(), *grad = incoming.data<float>();
  const float* by_weight = incoming_weights.data<float>();
  const int64_t* at = places.data<int64_t>();
  float* to = grad_logits.data<float>();
  parallel_for(tokens, grain_for(4 * experts), [&](int64_t first, int64_t last) {
    ERNIE_DISPATCH(moe_gate_grad, from + first * experts, at + first * k, grad + first * experts,
                   by_weight + first * k, last - first, experts, k, softmax, normalise, minimum, to + first * experts);
  });
  return {grad_logits};
}

// Tokens to experts.

std::vector<Tensor> moe_permute(const Tensor& x, const Tensor& indices, int64_t experts) {
  const Tensor input = checked_float32("moe_permute", "x", x, {kAny, kAny});
  const int64_t tokens = input.shape()[0], width = input.shape()[1];
  const Tensor chosen = checked_int64("moe_permute", "indices", indices, {tokens, kAny});
  check_range("moe_permute", "indices", chosen, experts);
  const int64_t k = chosen.shape()[1];
  Tensor rows = empty_float32({tokens * k, width}), sources = empty_int64({tokens * k});
  Tensor counts = empty_int64({experts}), offsets = empty_int64({experts + 1}), slots = empty_int64({tokens, k});
  ERNIE_DISPATCH(moe_permute, chosen.data<int64_t>(), tokens, k, experts, counts.data<int64_t>(),
                 offsets.data<int64_t>(), sources.data<int64_t>(), slots.data<int64_t>());
  const float* from = input.data<float>();
  const int64_t* token = sources.data<int64_t>();
  float* to = rows.data<float>();
  parallel_for(tokens * k, grain_for(width), [&](int64_t first, int64_t last) {
    for (int64_t slot = first; slot < last; ++slot)
      std::copy_n(from + token[slot] * width, width, to + slot * width);
  });
  return {rows, counts, offsets, slots};
}

// Experts to tokens.

Tensor combined(const char* op, const Tensor& rows, const Tensor& slots, const Tensor* weights) {
  const Tensor places = checked_int64(op, "slots", slots, {kAny, kAny});
  const int64_t tokens = places.shape()[0], k = places.shape()[1];
  const Tensor input = checked_float32(op, "rows", rows, {tokens * k, kAny});
  const int64_t width = input.shape()[1];
  check_range(op, "slots", places, tokens * k);
  const Tensor factors = weights ? checked_float32(op, "weights", *weights, {tokens, k}) : Tensor();
  Tensor out = empty_float32({tokens, width});
  const float *from = input.data<float>(), *by = weights ? factors.data<float>() : nullptr;
  const int64_t* at = places.data<int64_t>();
  float* to = out.data<float>();
  parallel_for(tokens, grain_for(k * width), [&](int64_t first, int64_t last) {
    ERNIE_DISPATCH(moe_combine, from, at + first * k, by ? by + first * k : nullptr, last - first, k, width,
                   to + first * width);
  });
  return out;
}

std::vector<Tensor> moe_permute_grad(const Tensor& slots, const Tensor& grad_rows) {
  return {combined("moe_permute_grad", grad_rows, slots, nullptr)};
}

std::vector<Tensor> moe_combine(const Tensor& rows, const Tensor& slots, const Tensor& weights) {
  return {combined("moe_combine", rows, slots, &weights)};
}

std::vector<Tensor> moe_combine_grad(const Tensor& rows, const Tensor& slots, const Tensor& weights,
                                     const Tensor& grad_out) {
  const Shape shape = rows.shape();
  const int64_t tokens = slots.shape()[0], k = slots.shape()[1], width = shape[1];
  const Tensor input = checked_float32("moe_combine_grad", "rows", rows, shape);
  const Tensor places = checked_int64("moe_combine_grad", "slots", slots, {tokens, k});
  const Tensor factors = checked_float32("moe_combine_grad", "weights", weights, {tokens, k});
  const Tensor incoming = checked_float32("moe_combine_grad", "grad_out", grad_out, {tokens, width});
  Tensor grad_rows = empty_float32(shape), grad_weights = empty_float32({tokens, k});
  const float *from = input.data<float>(), *by = factors.data<float>(), *grad = incoming.data<float>();
  const int64_t* at = places.data<int64_t>();
  float *to = grad_rows.data<float>(), *to_weights = grad_weights.data<float>();
  parallel_for(tokens, grain_for(k * width), [&](int64_t first, int64_t last) {
    ERNIE_DISPATCH(moe_combine_grad, from, at + first * k, by + first * k, grad + first * width, last - first, k,
                   width, to, to_weights + first * k);
  });
  return {grad_rows, grad_weights};
}

// Shapes and dtypes of the outputs.

using Shapes = std::vector<Shape>;
using DataTypes = std::vector<DataType>;

Shapes moe_gate_shape(const Shape& logits, const paddle::optional<Shape>&, int64_t k, bool, bool, float) {
  return {logits, {logits[0], k}, {logits[0], k}};
}
DataTypes moe_gate_dtype(DataType logits, const paddle::optional<DataType>&) {
  return {logits, DataType::INT64, logits};
}

Shapes moe_permute_shape(const Shape& x, const Shape& indices, int64_t experts) {
  return {{indices[0] * indices[1], x[1]}, {experts}, {experts + 1}, indices};
}
DataTypes moe_permute_dtype(DataType x, DataType) { return {x, DataType::INT64, DataType::INT64, DataType::INT64}; }

Shapes moe_combine_shape(const Shape& rows, const Shape& slots, const Shape&) { return {{slots[0], rows[1]}}; }
DataTypes moe_combine_dtype(DataType rows, DataType, DataType) { return {rows}; }

}  // namespace
}  // namespace ernie::moe

PD_BUILD_OP(ernie45_moe_gate)
    .Inputs({"Logits", paddle::Optional("Bias")})
    .Outputs({"Probabilities", "Indices", "Weights"})
    .Attrs({"k: int64_t", "softmax: bool", "normalise: bool", "minimum: float"})
    .SetKernelFn(PD_KERNEL(ernie::moe::moe_gate))
    .SetInferShapeFn(PD_INFER_SHAPE(ernie::moe::moe_gate_shape))
    .SetInferDtypeFn(PD_INFER_DTYPE(ernie::moe::moe_gate_dtype));

PD_BUILD_GRAD_OP(ernie45_moe_gate)
    .Inputs({"Probabilities", "Indices", paddle::Grad("Probabilities"), paddle::Grad("Weights")})
    .Outputs({paddle::Grad("Logits")})
    .Attrs({"k: int64_t", "softmax: bool", "normalise: bool", "minimum: float"})
    .SetKernelFn(PD_KERNEL(ernie::moe::moe_gate_grad));

PD_BUILD_OP(ernie45_moe_permute)
    .Inputs({"X", "Indices"})
    .Outputs({"Rows", "Counts", "Offsets", "Slots"})
    .Attrs({"experts: int64_t"})
    .SetKernelFn(PD_KERNEL(ernie::moe::moe_permute))
    .SetInferShapeFn(PD_INFER_SHAPE(ernie::moe::moe_permute_shape))
    .SetInferDtypeFn(PD_INFER_DTYPE(ernie::moe::moe_permute_dtype));

PD_BUILD_GRAD_OP(ernie45_moe_permute)
    .Inputs({"Slots", paddle::Grad("Rows")})
    .Outputs({paddle::Grad("X")})
    .SetKernelFn(PD_KERNEL(ernie::moe::moe_permute_grad));

PD_BUILD_OP(ernie45_moe_combine)
    .Inputs({"Rows", "Slots", "Weights"})
    .Outputs({"Out"})
    .SetKernelFn(PD_KERNEL(ernie::moe::moe_combine))
    .SetInferShapeFn(PD_INFER_SHAPE(ernie::moe::moe_combine_shape))
    .SetInferDtypeFn(PD_INFER_DTYPE(ernie::moe::moe_combine_dtype));

PD_BUILD_GRAD_OP(ernie45_moe_combine)
    .Inputs({"Rows", "Slots", "Weights", paddle::Grad("Out")})
    .Outputs({paddle::Grad("Rows"), paddle::Grad("Weights")})
    .SetKernelFn(PD_KERNEL(ernie::moe::moe_combine_grad));

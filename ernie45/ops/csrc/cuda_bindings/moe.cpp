// Operators on the GPU that send tokens to experts and back. Indices and counts are int64, what the gate computes
// float32, rows float32, float16 or bfloat16. No operator waits for the GPU, so none looks at indices: choices of no
// expert are dropped, and as many rows at the end are left as they were.
#include "../cuda/moe_gate.h"
#include "../cuda/moe_rows.h"
#include "../cuda/moe_sort.h"

#include "tensors.h"

namespace ernie::cuda_moe {
namespace {

using paddle::DataType;
using paddle::Tensor;

Tensor checked_int64(const char* op, const char* argument, const Tensor& tensor, const Shape& expected) {
  return checked(op, argument, tensor, DataType::INT64, expected);
}

// The gate.

std::vector<Tensor> moe_gate(const Tensor& logits, const paddle::optional<Tensor>& bias, int64_t k, bool softmax,
                             bool normalise, float minimum) {
  const char* op = "moe_gate";
  const Tensor input = checked_float32(op, "logits", logits, {kAny, kAny});
  const int64_t tokens = input.shape()[0], experts = input.shape()[1];
  PD_CHECK(0 < k && k <= experts, op, ": k is ", k, ", expected 1 to the ", experts, " experts");
  const Tensor shift = bias ? checked_float32(op, "bias", *bias, {experts}) : Tensor();
  Tensor probabilities = empty({tokens, experts}, DataType::FLOAT32, logits);
  Tensor indices = empty({tokens, k}, DataType::INT64, logits), weights = empty({tokens, k}, DataType::FLOAT32, logits);
  launched(op, logits,
           ernie45_cuda_moe_gate(input.data<float>(), bias ? shift.data<float>() : nullptr, tokens, experts, k, softmax,
                                 normalise, minimum, probabilities.data<float>(), indices.data<int64_t>(),
                                 weights.data<float>(), nullptr, stream_of(logits)));
  return {probabilities, indices, weights};
}

std::vector<Tensor> moe_gate_grad(const Tensor& probabilities, const Tensor& indices, const Tensor& grad_probabilities,
                                  const Tensor& grad_weights, int64_t k, bool softmax, bool normalise, float minimum) {
  const char* op = "moe_gate_grad";
  const Shape shape = probabilities.shape(), chosen = {shape[0], k};
  const Tensor values = checked_float32(op, "probabilities", probabilities, shape);
  const Tensor places = checked_int64(op, "indices", indices, chosen);
  const Tensor* of_probabilities = defined(grad_probabilities);
  const Tensor* of_weights = defined(grad_weights);
  const Tensor direct =
      of_probabilities ? checked_float32(op, "grad_probabilities", *of_probabilities, shape) : Tensor();
  const Tensor incoming = of_weights ? checked_float32(op, "grad_weights", *of_weights, chosen) : Tensor();
  Tensor grad_logits = empty(shape, DataType::FLOAT32, probabilities);
  launched(op, probabilities,
           ernie45_cuda_moe_gate_grad(values.data<float>(), places.data<int64_t>(),
                                      of_probabilities ? direct.data<float>() : nullptr,
                                      of_weights ? incoming.data<float>() : nullptr, shape[0], shape[1], k, softmax,
                                      normalise, minimum, grad_logits.data<float>(), stream_of(probabilities)));
  return {grad_logits};
}

Shapes moe_gate_shape(const Shape& logits, const paddle::optional<Shape>&, int64_t k, bool, bool, float) {
  return {logits, {logits[0], k}, {logits[0], k}};
}
DataTypes moe_gate_dtype(DataType logits, const paddle::optional<DataType>&) {
  return {logits, DataType::INT64, logits};
}

// Tokens to experts, the rows of each a multiple of `multiple`; the rows that this adds are zeros.

std::vector<Tensor> moe_permute(const Tensor& x, const Tensor& indices, int64_t experts, int64_t multiple) {
  const char* op = "moe_permute";
  PD_CHECK(experts >= 1 && multiple >= 1, op, ": found ", experts, " experts and a multiple of ", multiple,
           ", expected 1 or more");
  const Tensor input = checked(op, "x", x, x.dtype(), {kAny, kAny});
  const int64_t tokens = input.shape()[0], hidden = input.shape()[1];
  const Tensor chosen = checked_int64(op, "indices", indices, {tokens, kAny});
  const int64_t k = chosen.shape()[1], rows = ernie45_cuda_moe_sort_rows(tokens, k, experts, multiple);
  Tensor counts = empty({experts}, DataType::INT64, x), offsets = empty({experts + 1}, DataType::INT64, x);
  Tensor slots = empty({tokens, k}, DataType::INT64, x), out = empty({rows, hidden}, x.dtype(), x);
  Tensor sources = multiple == 1 ? Tensor() : empty({rows}, DataType::INT32, x);
  int* token_of_row = multiple == 1 ? nullptr : sources.data<int>();
  Tensor workspace = empty({ernie45_cuda_moe_sort_workspace(tokens, k, experts)}, DataType::UINT8, x);
  launched(op, x,
           ernie45_cuda_moe_sort(chosen.data<int64_t>(), tokens, k, experts, multiple, counts.data<int64_t>(),
                                 offsets.data<int64_t>(), slots.data<int64_t>(), token_of_row, workspace.data(),
                                 stream_of(x)));
  launched(op, x,
           ernie45_cuda_moe_permute(input.data(), slots.data<int64_t>(), token_of_row, tokens, k, hidden, rows,
                                    tag_of_moved(op, "x", x.dtype()), out.data(), stream_of(x)));
  return {out, counts, offsets, slots};
}

std::vector<Tensor> moe_permute_grad(const Tensor& slots, const Tensor& grad_rows) {
  const char* op = "moe_permute_grad";
  const Tensor places = checked_int64(op, "slots", slots, {kAny, kAny});
  const Tensor incoming = checked(op, "grad_rows", grad_rows, grad_rows.dtype(), {kAny, kAny});
  const int64_t tokens = places.shape()[0], rows = incoming.shape()[0], hidden = incoming.shape()[1];
  Tensor grad_x = empty({tokens, hidden}, grad_rows.dtype(), grad_rows);
  launched(op, grad_rows,
           ernie45_cuda_moe_permute_grad(incoming.data(), places.data<int64_t>(), tokens, places.shape()[1], hidden,
                                         rows, tag(op, "grad_rows", grad_rows.dtype()), grad_x.data(),
                                         stream_of(grad_rows)));
  return {grad_x};
}

Shapes moe_permute_shape(const Shape& x, const Shape& indices, int64_t experts, int64_t multiple) {
  const bool known = indices[0] >= 0 && indices[1] >= 0;
  const int64_t rows = known ? ernie45_cuda_moe_sort_rows(indices[0], indices[1], experts, multiple) : kAny;
  return {{rows, x[1]}, {experts}, {experts + 1}, indices};
}
DataTypes moe_permute_dtype(DataType x, DataType) { return {x, DataType::INT64, DataType::INT64, DataType::INT64}; }

// Experts to tokens.

std::vector<Tensor> moe_combine(const Tensor& rows, const Tensor& slots, const Tensor& weights) {
  const char* op = "moe_combine";
  const Tensor input = checked(op, "rows", rows, rows.dtype(), {kAny, kAny});
  const Tensor places = checked_int64(op, "slots", slots, {kAny, kAny});
  const int64_t tokens = places.shape()[0], k = places.shape()[1], hidden = input.shape()[1];
  const Tensor factors = checked(op, "weights", weights, weights.dtype(), {tokens, k});
  Tensor out = empty({tokens, hidden}, rows.dtype(), rows);
  launched(op, rows,
           ernie45_cuda_moe_combine(input.data(), places.data<int64_t>(), factors.data(), tokens, k, hidden,
                                    input.shape()[0], tag(op, "rows", rows.dtype()),
                                    tag(op, "weights", weights.dtype()), out.data(), stream_of(rows)));
  return {out};
}

// Rows that no choice came to, which padding adds, have a gradient of zero.
std::vector<Tensor> moe_combine_grad(const Tensor& rows, const Tensor& slots, const Tensor& weights,
                                     const Tensor& grad_out) {
  const char* op = "moe_combine_grad";
  const Tensor input = checked(op, "rows", rows, rows.dtype(), {kAny, kAny});
  const Tensor places = checked_int64(op, "slots", slots, {kAny, kAny});
  const int64_t tokens = places.shape()[0], k = places.shape()[1], hidden = input.shape()[1], count = input.shape()[0];
  const Tensor factors = checked(op, "weights", weights, weights.dtype(), {tokens, k});
  const Tensor incoming = checked(op, "grad_out", grad_out, rows.dtype(), {tokens, hidden});
  Tensor grad_rows = count == tokens * k ? empty({count, hidden}, rows.dtype(), rows)
                                         : paddle::full({count, hidden}, 0.0, rows.dtype(), rows.place());
  Tensor grad_weights = empty({tokens, k}, weights.dtype(), rows);
  launched(op, rows,
           ernie45_cuda_moe_combine_grad(input.data(), places.data<int64_t>(), factors.data(), incoming.data(), nullptr,
                                         tokens, k, hidden, count, tag(op, "rows", rows.dtype()),
                                         tag(op, "weights", weights.dtype()), grad_rows.data(), grad_weights.data(),
                                         stream_of(rows)));
  return {grad_rows, grad_weights};
}

Shapes moe_combine_shape(const Shape& rows, const Shape& slots, const Shape&) { return {{slots[0], rows[1]}}; }
DataTypes moe_combine_dtype(DataType rows, DataType, DataType) { return {rows}; }

}  // namespace
}  // namespace ernie::cuda_moe

PD_BUILD_OP(ernie45_cuda_moe_gate)
    .Inputs({"Logits", paddle::Optional("Bias")})
    .Outputs({"Probabilities", "Indices", "Weights"})
    .Attrs({"k: int64_t", "softmax: bool", "normalise: bool", "minimum: float"})
    .SetKernelFn(PD_KERNEL(ernie::cuda_moe::moe_gate))
    .SetInferShapeFn(PD_INFER_SHAPE(ernie::cuda_moe::moe_gate_shape))
    .SetInferDtypeFn(PD_INFER_DTYPE(ernie::cuda_moe::moe_gate_dtype));

PD_BUILD_GRAD_OP(ernie45_cuda_moe_gate)
    .Inputs({"Probabilities", "Indices", paddle::Grad("Probabilities"), paddle::Grad("Weights")})
    .Outputs({paddle::Grad("Logits")})
    .Attrs({"k: int64_t", "softmax: bool", "normalise: bool", "minimum: float"})
    .SetKernelFn(PD_KERNEL(ernie::cuda_moe::moe_gate_grad));

PD_BUILD_OP(ernie45_cuda_moe_permute)
    .Inputs({"X", "Indices"})
    .Outputs({"Rows", "Counts", "Offsets", "Slots"})
    .Attrs({"experts: int64_t", "multiple: int64_t"})
    .SetKernelFn(PD_KERNEL(ernie::cuda_moe::moe_permute))
    .SetInferShapeFn(PD_INFER_SHAPE(ernie::cuda_moe::moe_permute_shape))
    .SetInferDtypeFn(PD_INFER_DTYPE(ernie::cuda_moe::moe_permute_dtype));

PD_BUILD_GRAD_OP(ernie45_cuda_moe_permute)
    .Inputs({"Slots", paddle::Grad("Rows")})
    .Outputs({paddle::Grad("X")})
    .SetKernelFn(PD_KERNEL(ernie::cuda_moe::moe_permute_grad));

PD_BUILD_OP(ernie45_cuda_moe_combine)
    .Inputs({"Rows", "Slots", "Weights"})
    .Outputs({"Out"})
    .SetKernelFn(PD_KERNEL(ernie::cuda_moe::moe_combine))
    .SetInferShapeFn(PD_INFER_SHAPE(ernie::cuda_moe::moe_combine_shape))
    .SetInferDtypeFn(PD_INFER_DTYPE(ernie::cuda_moe::moe_combine_dtype));

PD_BUILD_GRAD_OP(ernie45_cuda_moe_combine)
    .Inputs({"Rows", "Slots", "Weights", paddle::Grad("Out")})
    .Outputs({paddle::Grad("Rows"), paddle::Grad("Weights")})
    .SetKernelFn(PD_KERNEL(ernie::cuda_moe::moe_combine_grad));

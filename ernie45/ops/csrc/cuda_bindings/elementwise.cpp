// Operators over rows on the GPU: SwiGLU, RMSNorm and rotary positions, in float32, float16 or bfloat16.
#include "../cuda/rms_norm.h"
#include "../cuda/rope.h"
#include "../cuda/swiglu.h"

#include "tensors.h"

namespace ernie::cuda_elementwise {
namespace {

using paddle::DataType;
using paddle::Tensor;

// RMSNorm, alone and after the addition of a residual.

// A weight [width] in the dtype of x or in float32.
Tensor checked_weight(const char* op, const Tensor& weight, const Tensor& x) {
  const bool wide = weight.dtype() == DataType::FLOAT32;
  return checked(op, "weight", weight, wide ? DataType::FLOAT32 : x.dtype(), {width_of(x.shape())});
}

std::vector<Tensor> rms_norm_of(const char* op, const Tensor& x, const Tensor* residual, const Tensor& weight,
                                float epsilon) {
  const Shape shape = x.shape();
  const Tensor input = checked(op, "x", x, x.dtype(), shape), scale = checked_weight(op, weight, x);
  const Tensor base = residual ? checked(op, "residual", *residual, x.dtype(), shape) : Tensor();
  std::vector<Tensor> outputs = {empty(shape, x.dtype(), x)};
  if (residual) outputs.push_back(empty(shape, x.dtype(), x));
  launched(op, x,
           ernie45_cuda_rms_norm(input.data(), residual ? base.data() : nullptr, scale.data(), epsilon, rows_of(shape),
                                 width_of(shape), tag(op, "x", x.dtype()), tag(op, "weight", scale.dtype()),
                                 outputs[0].data(), residual ? outputs[1].data() : nullptr, stream_of(x)));
  return outputs;
}

// The gradients for x, which is the sum where there was a residual, and for the weight.
std::vector<Tensor> rms_norm_grads_of(const char* op, const Tensor& x, const Tensor& weight, const Tensor& grad_out,
                                      const Tensor* grad_sum, float epsilon) {
  const Shape shape = x.shape();
  const int64_t rows = rows_of(shape), width = width_of(shape);
  const int dtype = tag(op, "x", x.dtype());
  const Tensor input = checked(op, "x", x, x.dtype(), shape), scale = checked_weight(op, weight, x);
  const Tensor incoming = checked(op, "grad_out", grad_out, x.dtype(), shape);
  const Tensor direct = grad_sum ? checked(op, "grad_sum", *grad_sum, x.dtype(), shape) : Tensor();
  Tensor parts = empty({ernie45_cuda_rms_norm_grad_parts(rows, width, dtype), width}, DataType::FLOAT32, x);
  Tensor grad_x = empty(shape, x.dtype(), x), grad_weight = empty({width}, scale.dtype(), x);
  launched(op, x,
           ernie45_cuda_rms_norm_grad(input.data(), scale.data(), incoming.data(), grad_sum ? direct.data() : nullptr,
                                      epsilon, rows, width, dtype, tag(op, "weight", scale.dtype()),
                                      parts.data<float>(), grad_x.data(), grad_weight.data(), stream_of(x)));
  return {grad_x, grad_weight};
}

std::vector<Tensor> rms_norm(const Tensor& x, const Tensor& weight, float epsilon) {
  return rms_norm_of("rms_norm", x, nullptr, weight, epsilon);
}
std::vector<Tensor> rms_norm_grad(const Tensor& x, const Tensor& weight, const Tensor& grad_out, float epsilon) {
  return rms_norm_grads_of("rms_norm_grad", x, weight, grad_out, nullptr, epsilon);
}
std::vector<Tensor> add_rms_norm(const Tensor& x, const Tensor& residual, const Tensor& weight, float epsilon) {
  return rms_norm_of("add_rms_norm", x, &residual, weight, epsilon);
}
// x and residual enter through their sum alone, so their gradients are the same.
std::vector<Tensor> add_rms_norm_grad(const Tensor& sum, const Tensor& weight, const Tensor& grad_out,
                                      const Tensor& grad_sum, float epsilon) {
  const Tensor of_out = defined(grad_out) ? grad_out : paddle::full(sum.shape(), 0.0, sum.dtype(), sum.place());
  const std::vector<Tensor> grads =
      rms_norm_grads_of("add_rms_norm_grad", sum, weight, of_out, defined(grad_sum), epsilon);
  return {grads[0], grads[0], grads[1]};
}

// SwiGLU, alone and multiplied by the probability with which a token came to its expert.

int64_t swiglu_width(const char* op, const Shape& shape) {
  PD_CHECK(!shape.empty() && shape.back() % 2 == 0, op, ": x has shape ", text(shape),
           ", expected an even last axis: gate and up side by side");
  return shape.back() / 2;
}

std::vector<Tensor> swiglu_of(const char* op, const Tensor& x, const Tensor* prob) {
  const Shape shape = x.shape();
  const int64_t width = swiglu_width(op, shape);
  const Tensor input = checked(op, "x", x, x.dtype(), shape);
  const Tensor factors = prob ? checked_float32(op, "prob", *prob, without_width(shape)) : Tensor();
  Tensor out = empty(with_width(shape, width), x.dtype(), x);
  launched(op, x,
           ernie45_cuda_swiglu(input.data(), prob ? factors.data<float>() : nullptr, rows_of(shape), width,
                               tag(op, "x", x.dtype()), out.data(), stream_of(x)));
  return {out};
}

std::vector<Tensor> swiglu_grads_of(const char* op, const Tensor& x, const Tensor* prob, const Tensor& grad_out) {
  const Shape shape = x.shape();
  const int64_t width = swiglu_width(op, shape);
  const Tensor input = checked(op, "x", x, x.dtype(), shape);
  const Tensor factors = prob ? checked_float32(op, "prob", *prob, without_width(shape)) : Tensor();
  const Tensor incoming = checked(op, "grad_out", grad_out, x.dtype(), with_width(shape, width));
  std::vector<Tensor> grads = {empty(shape, x.dtype(), x)};
  if (prob) grads.push_back(empty(without_width(shape), DataType::FLOAT32, x));
  launched(op, x,
           ernie45_cuda_swiglu_grad(input.data(), prob ? factors.data<float>() : nullptr, incoming.data(),
                                    rows_of(shape), width, tag(op, "x", x.dtype()), grads[0].data(),
                                    prob ? grads[1].data<float>() : nullptr, stream_of(x)));
  return grads;
}

std::vector<Tensor> swiglu(const Tensor& x) { return swiglu_of("swiglu", x, nullptr); }
std::vector<Tensor> swiglu_grad(const Tensor& x, const Tensor& grad_out) {
  return swiglu_grads_of("swiglu_grad", x, nullptr, grad_out);
}
std::vector<Tensor> swiglu_prob(const Tensor& x, const Tensor& prob) { return swiglu_of("swiglu", x, &prob); }
std::vector<Tensor> swiglu_prob_grad(const Tensor& x, const Tensor& prob, const Tensor& grad_out) {
  return swiglu_grads_of("swiglu_grad", x, &prob, grad_out);
}

// Rotary positions. The gradient is the rotation by the opposite angle.

std::vector<Tensor> rope_angles(const Tensor& positions, const Tensor& frequencies, int64_t time_pairs) {
  const char* op = "rope_angles";
  const Tensor rates = checked_float32(op, "frequencies", frequencies, {kAny});
  const Shape shape = positions.shape();
  PD_CHECK(shape.size() == 2 || (shape.size() == 3 && shape[2] == 3), op, ": positions has shape ", text(shape),
           ", expected [batch, sequence] or [batch, sequence, 3]");
  const Tensor places = checked(op, "positions", positions, DataType::INT64, shape);
  const int64_t axes = shape.size() == 3 ? 3 : 1, pairs = rates.shape()[0];
  Tensor cos = empty({shape[0], shape[1], 1, pairs}, DataType::FLOAT32, positions);
  Tensor sin = empty(cos.shape(), DataType::FLOAT32, positions);
  launched(op, positions,
           ernie45_cuda_rope_angles(places.data<int64_t>(), axes, rates.data<float>(), shape[0] * shape[1], pairs,
                                    time_pairs, cos.data<float>(), sin.data<float>(), stream_of(positions)));
  return {cos, sin};
}

Tensor rotated(const char* op, const Tensor& x, const Tensor& cos, const Tensor& sin, bool backward) {
  const Shape shape = x.shape();
  PD_CHECK(shape.size() == 4 && shape[3] % 2 == 0, op, ": x has shape ", text(shape),
           ", expected [batch, sequence, heads, head_dim] with an even head_dim");
  const int64_t tokens = shape[0] * shape[1], heads = shape[2], head_dim = shape[3], stride = heads * head_dim;
  // One row of positions serves every sequence of the batch.
  const Shape found = cos.shape();
  const Shape angles = {!found.empty() && found[0] == 1 ? 1 : shape[0], shape[1], 1, head_dim / 2};
  const Tensor input = checked(op, "x", x, x.dtype(), shape);
  const Tensor cosines = checked_float32(op, "cos", cos, angles), sines = checked_float32(op, "sin", sin, angles);
  Tensor out = empty(shape, x.dtype(), x);
  launched(op, x,
           ernie45_cuda_rope(input.data(), stride, heads, nullptr, 0, 0, cosines.data<float>(), sines.data<float>(),
                             tokens, angles[0] * shape[1], head_dim, backward, tag(op, "x", x.dtype()), out.data(),
                             stride, nullptr, 0, stream_of(x)));
  return out;
}

std::vector<Tensor> rope(const Tensor& x, const Tensor& cos, const Tensor& sin) {
  return {rotated("rope", x, cos, sin, false)};
}
std::vector<Tensor> rope_grad(const Tensor& cos, const Tensor& sin, const Tensor& grad_out) {
  return {rotated("rope_grad", grad_out, cos, sin, true)};
}

// Shapes and dtypes of the outputs.

Shapes rms_norm_shape(const Shape& x, const Shape&, float) { return {x}; }
Shapes add_rms_norm_shape(const Shape& x, const Shape&, const Shape&, float) { return {x, x}; }
Shapes swiglu_shape(const Shape& x) { return {with_width(x, half(width_of(x)))}; }
Shapes swiglu_prob_shape(const Shape& x, const Shape&) { return swiglu_shape(x); }

Shapes rope_angles_shape(const Shape& positions, const Shape& frequencies, int64_t) {
  const Shape shape = {positions[0], positions[1], 1, frequencies[0]};
  return {shape, shape};
}
Shapes rope_shape(const Shape& x, const Shape&, const Shape&) { return {x}; }

DataTypes one(DataType x) { return {x}; }
DataTypes one_of_two(DataType x, DataType) { return {x}; }
DataTypes one_of_three(DataType x, DataType, DataType) { return {x}; }
DataTypes two_float32(DataType, DataType) { return {DataType::FLOAT32, DataType::FLOAT32}; }
DataTypes two_of_three(DataType x, DataType, DataType) { return {x, x}; }

}  // namespace
}  // namespace ernie::cuda_elementwise

PD_BUILD_OP(ernie45_cuda_rms_norm)
    .Inputs({"X", "Weight"})
    .Outputs({"Out"})
    .Attrs({"epsilon: float"})
    .SetKernelFn(PD_KERNEL(ernie::cuda_elementwise::rms_norm))
    .SetInferShapeFn(PD_INFER_SHAPE(ernie::cuda_elementwise::rms_norm_shape))
    .SetInferDtypeFn(PD_INFER_DTYPE(ernie::cuda_elementwise::one_of_two));

PD_BUILD_GRAD_OP(ernie45_cuda_rms_norm)
    .Inputs({"X", "Weight", paddle::Grad("Out")})
    .Outputs({paddle::Grad("X"), paddle::Grad("Weight")})
    .Attrs({"epsilon: float"})
    .SetKernelFn(PD_KERNEL(ernie::cuda_elementwise::rms_norm_grad));

PD_BUILD_OP(ernie45_cuda_add_rms_norm)
    .Inputs({"X", "Residual", "Weight"})
    .Outputs({"Out", "Sum"})
    .Attrs({"epsilon: float"})
    .SetKernelFn(PD_KERNEL(ernie::cuda_elementwise::add_rms_norm))
    .SetInferShapeFn(PD_INFER_SHAPE(ernie::cuda_elementwise::add_rms_norm_shape))
    .SetInferDtypeFn(PD_INFER_DTYPE(ernie::cuda_elementwise::two_of_three));

PD_BUILD_GRAD_OP(ernie45_cuda_add_rms_norm)
    .Inputs({"Sum", "Weight", paddle::Grad("Out"), paddle::Grad("Sum")})
    .Outputs({paddle::Grad("X"), paddle::Grad("Residual"), paddle::Grad("Weight")})
    .Attrs({"epsilon: float"})
    .SetKernelFn(PD_KERNEL(ernie::cuda_elementwise::add_rms_norm_grad));

PD_BUILD_OP(ernie45_cuda_swiglu)
    .Inputs({"X"})
    .Outputs({"Out"})
    .SetKernelFn(PD_KERNEL(ernie::cuda_elementwise::swiglu))
    .SetInferShapeFn(PD_INFER_SHAPE(ernie::cuda_elementwise::swiglu_shape))
    .SetInferDtypeFn(PD_INFER_DTYPE(ernie::cuda_elementwise::one));

PD_BUILD_GRAD_OP(ernie45_cuda_swiglu)
    .Inputs({"X", paddle::Grad("Out")})
    .Outputs({paddle::Grad("X")})
    .SetKernelFn(PD_KERNEL(ernie::cuda_elementwise::swiglu_grad));

PD_BUILD_OP(ernie45_cuda_swiglu_prob)
    .Inputs({"X", "Prob"})
    .Outputs({"Out"})
    .SetKernelFn(PD_KERNEL(ernie::cuda_elementwise::swiglu_prob))
    .SetInferShapeFn(PD_INFER_SHAPE(ernie::cuda_elementwise::swiglu_prob_shape))
    .SetInferDtypeFn(PD_INFER_DTYPE(ernie::cuda_elementwise::one_of_two));

PD_BUILD_GRAD_OP(ernie45_cuda_swiglu_prob)
    .Inputs({"X", "Prob", paddle::Grad("Out")})
    .Outputs({paddle::Grad("X"), paddle::Grad("Prob")})
    .SetKernelFn(PD_KERNEL(ernie::cuda_elementwise::swiglu_prob_grad));

PD_BUILD_OP(ernie45_cuda_rope_angles)
    .Inputs({"Positions", "Frequencies"})
    .Outputs({"Cos", "Sin"})
    .Attrs({"time_pairs: int64_t"})
    .SetKernelFn(PD_KERNEL(ernie::cuda_elementwise::rope_angles))
    .SetInferShapeFn(PD_INFER_SHAPE(ernie::cuda_elementwise::rope_angles_shape))
    .SetInferDtypeFn(PD_INFER_DTYPE(ernie::cuda_elementwise::two_float32));

PD_BUILD_OP(ernie45_cuda_rope)
    .Inputs({"X", "Cos", "Sin"})
    .Outputs({"Out"})
    .SetKernelFn(PD_KERNEL(ernie::cuda_elementwise::rope))
    .SetInferShapeFn(PD_INFER_SHAPE(ernie::cuda_elementwise::rope_shape))
    .SetInferDtypeFn(PD_INFER_DTYPE(ernie::cuda_elementwise::one_of_three));

PD_BUILD_GRAD_OP(ernie45_cuda_rope)
    .Inputs({"Cos", "Sin", paddle::Grad("Out")})
    .Outputs({paddle::Grad("X")})
    .SetKernelFn(PD_KERNEL(ernie::cuda_elementwise::rope_grad));

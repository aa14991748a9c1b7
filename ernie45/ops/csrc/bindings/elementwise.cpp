// Operators over rows: RMSNorm, SwiGLU and rotary positions, all in float32, and conversions from bfloat16 and back.
#include "../cpu/elementwise.h"

#include <cmath>

#include "../cpu/parallel.h"
#include "tensors.h"

namespace ernie::elementwise {
namespace {

using paddle::Tensor;

// RMSNorm, alone and after the addition of a residual.

std::vector<Tensor> rms_norm(const Tensor& x, const Tensor& weight, float epsilon) {
  const Shape shape = x.shape();
  const int64_t width = width_of(shape);
  const Tensor input = checked_float32("rms_norm", "x", x, shape);
  const Tensor scale = checked_float32("rms_norm", "weight", weight, {width});
  Tensor out = empty_float32(shape);
  const float *from = input.data<float>(), *by = scale.data<float>();
  float* to = out.data<float>();
  parallel_for(rows_of(shape), grain_for(width), [&](int64_t first, int64_t last) {
    ERNIE_DISPATCH(rms_norm, from + first * width, by, epsilon, last - first, width, to + first * width);
  });
  return {out};
}

std::vector<Tensor> rms_norm_grad(const Tensor& x, const Tensor& weight, const Tensor& grad_out, float epsilon) {
  const Shape shape = x.shape();
  const int64_t width = width_of(shape), rows = rows_of(shape);
  const Tensor input = checked_float32("rms_norm_grad", "x", x, shape);
  const Tensor scale = checked_float32("rms_norm_grad", "weight", weight, {width});
  const Tensor incoming = checked_float32("rms_norm_grad", "grad_out", grad_out, shape);
  Tensor grad_x = empty_float32(shape), grad_weight = empty_float32({width}), inverse_rms = empty_float32({rows});
  const float *from = input.data<float>(), *by = scale.data<float>(), *grad = incoming.data<float>();
  float *to = grad_x.data<float>(), *inverse = inverse_rms.data<float>(), *to_weight = grad_weight.data<float>();
  parallel_for(rows, grain_for(width), [&](int64_t first, int64_t last) {
    const int64_t skip = first * width;
    ERNIE_DISPATCH(rms_norm_grad, from + skip, by, grad + skip, epsilon, last - first, width, to + skip,
                   inverse + first);
  });
  // Threads take columns here, so that the order of the sum does not depend on their number.
  parallel_for(width, std::max<int64_t>(16, grain_for(rows)), [&](int64_t first, int64_t last) {
    ERNIE_DISPATCH(rms_norm_weight_grad, from, grad, inverse, rows, width, first, last, to_weight);
  });
  return {grad_x, grad_weight};
}

std::vector<Tensor> add_rms_norm(const Tensor& x, const Tensor& residual, const Tensor& weight, float epsilon) {
  const Shape shape = x.shape();
  const int64_t width = width_of(shape);
  const Tensor input = checked_float32("add_rms_norm", "x", x, shape);
  const Tensor base = checked_float32("add_rms_norm", "residual", residual, shape);
  const Tensor scale = checked_float32("add_rms_norm", "weight", weight, {width});
  Tensor out = empty_float32(shape), sum = empty_float32(shape);
  const float *from = input.data<float>(), *start = base.data<float>(), *by = scale.data<float>();
  float *to = out.data<float>(), *total = sum.data<float>();
  parallel_for(rows_of(shape), grain_for(width), [&](int64_t first, int64_t last) {
    const int64_t skip = first * width;
    std::copy(start + skip, start + last * width, total + skip);
    ERNIE_DISPATCH(add_rms_norm, total + skip, from + skip, by, epsilon, last - first, width, to + skip);
  });
  return {out, sum};
}

// x and residual enter through their sum alone, so their gradients are the same.
std::vector<Tensor> add_rms_norm_grad(const Tensor& sum, const Tensor& weight, const Tensor& grad_out,
                                      const Tensor& grad_sum, float epsilon) {
  std::vector<Tensor> grads = rms_norm_grad(sum, weight, or_zeros(grad_out, sum.shape()), epsilon);
  const Tensor direct = checked_float32("add_rms_norm_grad", "grad_sum", or_zeros(grad_sum, sum.shape()), sum.shape());
  const float* from = direct.data<float>();
  float* to = grads[0].data<float>();
  for (int64_t i = 0; i < direct.numel(); ++i) to[i] += from[i];
  return {grads[0], grads[0], grads[1]};
}

// SwiGLU, alone and multiplied by the probability with which a token came to its expert.

Tensor swiglu_of(const char* op, const Tensor& x, const Tensor* prob) {
  const Shape shape = x.shape();
  PD_CHECK(!shape.empty() && shape.back() % 2 == 0, op, ": x has shape ", text(shape),
           ", expected an even last axis: gate and up side by side");
  const int64_t width = shape.back() / 2;
  const Tensor input = checked_float32(op, "x", x, shape);
  const Tensor factors = prob ? checked_float32(op, "prob", *prob, without_width(shape)) : Tensor();
  Tensor out = empty_float32(with_width(shape, width));
  const float *from = input.data<float>(), *by = prob ? factors.data<float>() : nullptr;
  float* to = out.data<float>();
  parallel_for(rows_of(shape), grain_for(2 * width), [&](int64_t first, int64_t last) {
    ERNIE_DISPATCH(swiglu, from + first * 2 * width, by ? by + first : nullptr, last - first, width,
                   to + first * width);
  });
  return out;
}

std::vector<Tensor> swiglu_grads_of(const char* op, const Tensor& x, const Tensor* prob, const Tensor& grad_out) {
  const Shape shape = x.shape();
  const int64_t width = shape.back() / 2;
  const Tensor input = checked_float32(op, "x", x, shape);
  const Tensor factors = prob ? checked_float32(op, "prob", *prob, without_width(shape)) : Tensor();
  const Tensor incoming = checked_float32(op, "grad_out", grad_out, with_width(shape, width));
  Tensor grad_x = empty_float32(shape), grad_prob = prob ? empty_float32(without_width(shape)) : Tensor();
  const float *from = input.data<float>(), *grad = incoming.data<float>();
  const float* by = prob ? factors.data<float>() : nullptr;
  float *to = grad_x.data<float>(), *to_prob = prob ? grad_prob.data<float>() : nullptr;
  parallel_for(rows_of(shape), grain_for(2 * width), [&](int64_t first, int64_t last) {
    ERNIE_DISPATCH(swiglu_grad, from + first * 2 * width, by ? by + first : nullptr, grad + first * width,
                   last - first, width, to + first * 2 * width, to_prob ? to_prob + first : nullptr);
  });
  if (!prob) return {grad_x};
  return {grad_x, grad_prob};
}

std::vector<Tensor> swiglu(const Tensor& x) { return {swiglu_of("swiglu", x, nullptr)}; }
std::vector<Tensor> swiglu_grad(const Tensor& x, const Tensor& grad_out) {
  return swiglu_grads_of("swiglu_grad", x, nullptr, grad_out);
}
std::vector<Tensor> swiglu_prob(const Tensor& x, const Tensor& prob) { return {swiglu_of("swiglu", x, &prob)}; }
std::vector<Tensor> swiglu_prob_grad(const Tensor& x, const Tensor& prob, const Tensor& grad_out) {
  return swiglu_grads_of("swiglu_grad", x, &prob, grad_out);
}

// Rotary positions. The gradient is the rotation by the opposite angle.

Tensor rotated(const char* op, const Tensor& x, const Tensor& cos, const Tensor& sin, float direction) {
  const Shape shape = x.shape();
  PD_CHECK(shape.size() == 4 && shape[3] % 2 == 0, op, ": x has shape ", text(shape),
           ", expected [batch, sequence, heads, head_dim] with an even head_dim");
  const int64_t sequence = shape[1], heads = shape[2], head_dim = shape[3], half = head_dim / 2;
  // One row of positions serves every sequence of the batch.
  const Shape found = cos.shape();
  const Shape angles = {!found.empty() && found[0] == 1 ? 1 : shape[0], sequence, 1, half};
  const Tensor input = checked_float32(op, "x", x, shape);
  const Tensor cosines = checked_float32(op, "cos", cos, angles), sines = checked_float32(op, "sin", sin, angles);
  std::vector<float> turns(sines.data<float>(), sines.data<float>() + sines.numel());
  for (float& turn : turns) turn *= direction;
  Tensor out = empty_float32(shape);
  const float *from = input.data<float>(), *cos_rows = cosines.data<float>();
  float* to = out.data<float>();
  const int64_t width = heads * head_dim, period = angles[0] * sequence;
  parallel_for(shape[0] * sequence, grain_for(width), [&](int64_t first, int64_t last) {
    for (int64_t token = first; token < last; ++token) {
      const int64_t angle = token % period * half;
      ERNIE_DISPATCH(rope, from + token * width, head_dim, cos_rows + angle, turns.data() + angle, heads, head_dim,
                     to + token * width, head_dim);
    }
  });
  return out;
}

// cos and sin of positions [batch, sequence, 1 or pairs] times frequencies [pairs].
std::vector<Tensor> rope_angles(const Tensor& positions, const Tensor& frequencies) {
  const Tensor rates = checked_float32("rope_angles", "frequencies", frequencies, {kAny});
  const int64_t pairs = rates.shape()[0];
  const Tensor of_pairs = checked_float32("rope_angles", "positions", positions, {kAny, kAny, kAny});
  const Shape shape = of_pairs.shape();
  PD_CHECK(shape[2] == 1 || shape[2] == pairs, "rope_angles: ", shape[2], " positions per token, expected 1 or ", pairs);
  Tensor cosines = empty_float32({shape[0], shape[1], 1, pairs}), sines = empty_float32(cosines.shape());
  const float *from = of_pairs.data<float>(), *rate = rates.data<float>();
  float *cos = cosines.data<float>(), *sin = sines.data<float>();
  parallel_for(shape[0] * shape[1], 64, [&](int64_t first, int64_t last) {
    for (int64_t token = first; token < last; ++token)
      for (int64_t pair = 0; pair < pairs; ++pair) {
        const float angle = from[token * shape[2] + (shape[2] == 1 ? 0 : pair)] * rate[pair];
        cos[token * pairs + pair] = std::cos(angle);
        sin[token * pairs + pair] = std::sin(angle);
      }
  });
  return {cosines, sines};
}

std::vector<Tensor> rope(const Tensor& x, const Tensor& cos, const Tensor& sin) {
  return {rotated("rope", x, cos, sin, 1.0f)};
}
std::vector<Tensor> rope_grad(const Tensor& cos, const Tensor& sin, const Tensor& grad_out) {
  return {rotated("rope_grad", grad_out, cos, sin, -1.0f)};
}

// Conversions. Each is the gradient of the other.

constexpr int64_t kConversionGrain = 65536;

std::vector<Tensor> widen(const Tensor& x) {
  const Tensor input = checked("widen", "x", x, paddle::DataType::BFLOAT16, x.shape());
  Tensor out = empty_float32(x.shape());
  const auto* from = reinterpret_cast<const uint16_t*>(input.data<phi::dtype::bfloat16>());
  float* to = out.data<float>();
  parallel_for(input.numel(), kConversionGrain, [&](int64_t first, int64_t last) {
    ERNIE_DISPATCH(widen, from + first, last - first, to + first);
  });
  return {out};
}

std::vector<Tensor> narrow(const Tensor& x) {
  const Tensor input = checked_float32("narrow", "x", x, x.shape());
  Tensor out = paddle::empty(x.shape(), paddle::DataType::BFLOAT16, paddle::CPUPlace());
  const float* from = input.data<float>();
  auto* to = reinterpret_cast<uint16_t*>(out.data<phi::dtype::bfloat16>());
  parallel_for(input.numel(), kConversionGrain, [&](int64_t first, int64_t last) {
    ERNIE_DISPATCH(narrow, from + first, last - first, to + first);
  });
  return {out};
}

// Shapes and dtypes of the outputs.

using Shapes = std::vector<Shape>;
using DataTypes = std::vector<paddle::DataType>;

Shapes rms_norm_shape(const Shape& x, const Shape&, float) { return {x}; }
Shapes add_rms_norm_shape(const Shape& x, const Shape&, const Shape&, float) { return {x, x}; }
Shapes swiglu_shape(const Shape& x) { return {with_width(x, width_of(x) / 2)}; }
Shapes swiglu_prob_shape(const Shape& x, const Shape&) { return swiglu_shape(x); }
Shapes rope_angles_shape(const Shape& positions, const Shape& frequencies) {
  const Shape shape = {positions[0], positions[1], 1, frequencies[0]};
  return {shape, shape};
}
Shapes rope_shape(const Shape& x, const Shape&, const Shape&) { return {x}; }
Shapes same_shape(const Shape& x) { return {x}; }

DataTypes one(paddle::DataType x) { return {x}; }
DataTypes one_of_two(paddle::DataType x, paddle::DataType) { return {x}; }
DataTypes two_of_two(paddle::DataType x, paddle::DataType) { return {x, x}; }
DataTypes one_of_three(paddle::DataType x, paddle::DataType, paddle::DataType) { return {x}; }
DataTypes two_of_three(paddle::DataType x, paddle::DataType, paddle::DataType) { return {x, x}; }

DataTypes always_float32(paddle::DataType) { return {paddle::DataType::FLOAT32}; }
DataTypes always_bfloat16(paddle::DataType) { return {paddle::DataType::BFLOAT16}; }

}  // namespace
}  // namespace ernie::elementwise

PD_BUILD_OP(ernie45_rms_norm)
    .Inputs({"X", "Weight"})
    .Outputs({"Out"})
    .Attrs({"epsilon: float"})
    .SetKernelFn(PD_KERNEL(ernie::elementwise::rms_norm))
    .SetInferShapeFn(PD_INFER_SHAPE(ernie::elementwise::rms_norm_shape))
    .SetInferDtypeFn(PD_INFER_DTYPE(ernie::elementwise::one_of_two));

PD_BUILD_GRAD_OP(ernie45_rms_norm)
    .Inputs({"X", "Weight", paddle::Grad("Out")})
    .Outputs({paddle::Grad("X"), paddle::Grad("Weight")})
    .Attrs({"epsilon: float"})
    .SetKernelFn(PD_KERNEL(ernie::elementwise::rms_norm_grad));

PD_BUILD_OP(ernie45_add_rms_norm)
    .Inputs({"X", "Residual", "Weight"})
    .Outputs({"Out", "Sum"})
    .Attrs({"epsilon: float"})
    .SetKernelFn(PD_KERNEL(ernie::elementwise::add_rms_norm))
    .SetInferShapeFn(PD_INFER_SHAPE(ernie::elementwise::add_rms_norm_shape))
    .SetInferDtypeFn(PD_INFER_DTYPE(ernie::elementwise::two_of_three));

PD_BUILD_GRAD_OP(ernie45_add_rms_norm)
    .Inputs({"Sum", "Weight", paddle::Grad("Out"), paddle::Grad("Sum")})
    .Outputs({paddle::Grad("X"), paddle::Grad("Residual"), paddle::Grad("Weight")})
    .Attrs({"epsilon: float"})
    .SetKernelFn(PD_KERNEL(ernie::elementwise::add_rms_norm_grad));

PD_BUILD_OP(ernie45_swiglu)
    .Inputs({"X"})
    .Outputs({"Out"})
    .SetKernelFn(PD_KERNEL(ernie::elementwise::swiglu))
    .SetInferShapeFn(PD_INFER_SHAPE(ernie::elementwise::swiglu_shape))
    .SetInferDtypeFn(PD_INFER_DTYPE(ernie::elementwise::one));

PD_BUILD_GRAD_OP(ernie45_swiglu)
    .Inputs({"X", paddle::Grad("Out")})
    .Outputs({paddle::Grad("X")})
    .SetKernelFn(PD_KERNEL(ernie::elementwise::swiglu_grad));

PD_BUILD_OP(ernie45_swiglu_prob)
    .Inputs({"X", "Prob"})
    .Outputs({"Out"})
    .SetKernelFn(PD_KERNEL(ernie::elementwise::swiglu_prob))
    .SetInferShapeFn(PD_INFER_SHAPE(ernie::elementwise::swiglu_prob_shape))
    .SetInferDtypeFn(PD_INFER_DTYPE(ernie::elementwise::one_of_two));

PD_BUILD_GRAD_OP(ernie45_swiglu_prob)
    .Inputs({"X", "Prob", paddle::Grad("Out")})
    .Outputs({paddle::Grad("X"), paddle::Grad("Prob")})
    .SetKernelFn(PD_KERNEL(ernie::elementwise::swiglu_prob_grad));

PD_BUILD_OP(ernie45_rope_angles)
    .Inputs({"Positions", "Frequencies"})
    .Outputs({"Cos", "Sin"})
    .SetKernelFn(PD_KERNEL(ernie::elementwise::rope_angles))
    .SetInferShapeFn(PD_INFER_SHAPE(ernie::elementwise::rope_angles_shape))
    .SetInferDtypeFn(PD_INFER_DTYPE(ernie::elementwise::two_of_two));

PD_BUILD_OP(ernie45_rope)
    .Inputs({"X", "Cos", "Sin"})
    .Outputs({"Out"})
    .SetKernelFn(PD_KERNEL(ernie::elementwise::rope))
    .SetInferShapeFn(PD_INFER_SHAPE(ernie::elementwise::rope_shape))
    .SetInferDtypeFn(PD_INFER_DTYPE(ernie::elementwise::one_of_three));

PD_BUILD_GRAD_OP(ernie45_rope)
    .Inputs({"Cos", "Sin", paddle::Grad("Out")})
    .Outputs({paddle::Grad("X")})
    .SetKernelFn(PD_KERNEL(ernie::elementwise::rope_grad));

PD_BUILD_OP(ernie45_widen)
    .Inputs({"X"})
    .Outputs({"Out"})
    .SetKernelFn(PD_KERNEL(ernie::elementwise::widen))
    .SetInferShapeFn(PD_INFER_SHAPE(ernie::elementwise::same_shape))
    .SetInferDtypeFn(PD_INFER_DTYPE(ernie::elementwise::always_float32));

PD_BUILD_GRAD_OP(ernie45_widen)
    .Inputs({paddle::Grad("Out")})
    .Outputs({paddle::Grad("X")})
    .SetKernelFn(PD_KERNEL(ernie::elementwise::narrow));

PD_BUILD_OP(ernie45_narrow)
    .Inputs({"X"})
    .Outputs({"Out"})
    .SetKernelFn(PD_KERNEL(ernie::elementwise::narrow))
    .SetInferShapeFn(PD_INFER_SHAPE(ernie::elementwise::same_shape))
    .SetInferDtypeFn(PD_INFER_DTYPE(ernie::elementwise::always_bfloat16));

PD_BUILD_GRAD_OP(ernie45_narrow)
    .Inputs({paddle::Grad("Out")})
    .Outputs({paddle::Grad("X")})
    .SetKernelFn(PD_KERNEL(ernie::elementwise::widen));

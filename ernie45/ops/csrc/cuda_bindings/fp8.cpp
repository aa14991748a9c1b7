// Operators on the GPU that convert to and from FP8 (e4m3). Matrices are float32 or bfloat16, scales float32; nothing
// here has a gradient.
#include "../cuda/fp8.h"

#include "tensors.h"

namespace ernie::cuda_fp8 {
namespace {

using paddle::DataType;
using paddle::Tensor;

constexpr DataType kCode = DataType::FLOAT8_E4M3FN;
constexpr int64_t kBlock = 128;

int64_t blocks(int64_t size, int64_t block) { return size < 0 ? kAny : (size + block - 1) / block; }

// The tag of what is quantised.
int wide_tag(const char* op, const char* argument, DataType dtype) {
  PD_CHECK(dtype == DataType::FLOAT32 || dtype == DataType::BFLOAT16, op, ": ", argument, " is ",
           phi::DataTypeToString(dtype), ", expected float32 or bfloat16");
  return tag(op, argument, dtype);
}

// Whether blocks are 128 x 128 and not 1 x 128; an error if they are neither.
bool checked_square(const char* op, int64_t block_rows) {
  PD_CHECK(block_rows == 1 || block_rows == kBlock, op, ": block_rows is ", block_rows, ", expected 1 or ", kBlock);
  return block_rows == kBlock;
}

Shape scales_shape(int64_t rows, int64_t columns, int64_t block_rows) {
  return {blocks(rows, block_rows), blocks(columns, kBlock)};
}

// Quantisation of a matrix, of its transpose, and of both.

struct Pair {
  Tensor codes, scales;

  Pair(int64_t rows, int64_t columns, int64_t block_rows, const Tensor& like)
      : codes(empty({rows, columns}, kCode, like)),
        scales(empty(scales_shape(rows, columns, block_rows), DataType::FLOAT32, like)) {}
};

std::vector<Tensor> quantized(const char* op, const Tensor& x, int64_t block_rows, bool power_of_two, bool straight,
                              bool transposed) {
  const bool square = checked_square(op, block_rows);
  const Tensor input = checked(op, "x", x, x.dtype(), {kAny, kAny});
  const int64_t rows = input.shape()[0], columns = input.shape()[1];
  std::vector<Pair> pairs;
  if (straight) pairs.emplace_back(rows, columns, block_rows, x);
  if (transposed) pairs.emplace_back(columns, rows, block_rows, x);
  Pair *first = straight ? &pairs.front() : nullptr, *last = transposed ? &pairs.back() : nullptr;
  launched(op, x,
           ernie45_cuda_fp8_quantize(input.data(), rows, columns, wide_tag(op, "x", x.dtype()), square, power_of_two,
                                     first ? first->codes.data() : nullptr,
                                     first ? first->scales.data<float>() : nullptr,
                                     last ? last->codes.data() : nullptr, last ? last->scales.data<float>() : nullptr,
                                     stream_of(x)));
  std::vector<Tensor> outputs;
  for (const Pair& pair : pairs) outputs.insert(outputs.end(), {pair.codes, pair.scales});
  return outputs;
}

std::vector<Tensor> quantize(const Tensor& x, int64_t block_rows, bool power_of_two) {
  return quantized("fp8_quantize", x, block_rows, power_of_two, true, false);
}
std::vector<Tensor> quantize_transposed(const Tensor& x, int64_t block_rows, bool power_of_two) {
  return quantized("fp8_quantize_transposed", x, block_rows, power_of_two, false, true);
}
std::vector<Tensor> quantize_both(const Tensor& x, int64_t block_rows, bool power_of_two) {
  return quantized("fp8_quantize_both", x, block_rows, power_of_two, true, true);
}

Shapes quantize_shapes(const Shape& x, int64_t block_rows, bool) { return {x, scales_shape(x[0], x[1], block_rows)}; }
Shapes quantize_transposed_shapes(const Shape& x, int64_t block_rows, bool) {
  return {{x[1], x[0]}, scales_shape(x[1], x[0], block_rows)};
}
Shapes quantize_both_shapes(const Shape& x, int64_t block_rows, bool power_of_two) {
  const Shapes straight = quantize_shapes(x, block_rows, power_of_two);
  const Shapes transposed = quantize_transposed_shapes(x, block_rows, power_of_two);
  return {straight[0], straight[1], transposed[0], transposed[1]};
}
DataTypes one_pair(DataType) { return {kCode, DataType::FLOAT32}; }
DataTypes two_pairs(DataType) { return {kCode, DataType::FLOAT32, kCode, DataType::FLOAT32}; }

// The weights of experts, stacked: each is a matrix, or a stack of them in one tensor.

std::vector<Tensor> quantize_stack(const std::vector<Tensor>& weights, bool power_of_two) {
  const char* op = "fp8_quantize_stack";
  PD_CHECK(!weights.empty() && weights[0].shape().size() >= 2, op, ": expected matrices, found none");
  const Tensor& like = weights[0];
  const int64_t rows = like.shape().end()[-2], columns = like.shape().end()[-1];
  std::vector<Tensor> kept;
  std::vector<const void*> matrices;
  for (const Tensor& weight : weights) {
    const bool stacked = weight.shape().size() == 3;
    const Shape expected = stacked ? Shape{kAny, rows, columns} : Shape{rows, columns};
    kept.push_back(checked(op, "weights", weight, like.dtype(), expected));
    const auto* first = static_cast<const char*>(kept.back().data());
    const int64_t bytes = rows * columns * static_cast<int64_t>(phi::SizeOf(like.dtype()));
    for (int64_t i = 0; i < (stacked ? weight.shape()[0] : 1); ++i) matrices.push_back(first + i * bytes);
  }
  const int64_t count = matrices.size();
  Tensor codes = empty({count, rows, columns}, kCode, like), transposed = empty({count, columns, rows}, kCode, like);
  Tensor scales = empty({count, blocks(rows, kBlock), blocks(columns, kBlock)}, DataType::FLOAT32, like);
  Tensor transposed_scales = empty({count, blocks(columns, kBlock), blocks(rows, kBlock)}, DataType::FLOAT32, like);
  launched(op, like,
           ernie45_cuda_fp8_quantize_stack(matrices.data(), count, rows, columns, wide_tag(op, "weights", like.dtype()),
                                           power_of_two, codes.data(), scales.data<float>(), transposed.data(),
                                           transposed_scales.data<float>(), stream_of(like)));
  return {codes, scales, transposed, transposed_scales};
}

Shapes quantize_stack_shapes(const std::vector<Shape>& weights, bool) {
  int64_t count = 0;
  for (const Shape& shape : weights) count += shape.size() == 3 ? shape[0] : 1;
  const int64_t rows = weights[0].end()[-2], columns = weights[0].end()[-1];
  return {{count, rows, columns},
          {count, blocks(rows, kBlock), blocks(columns, kBlock)},
          {count, columns, rows},
          {count, blocks(columns, kBlock), blocks(rows, kBlock)}};
}
DataTypes quantize_stack_dtypes(const std::vector<DataType>&) { return two_pairs(kCode); }

// And back.

std::vector<Tensor> dequantize(const Tensor& codes, const Tensor& scales, int64_t block_rows, bool to_bfloat16) {
  const char* op = "fp8_dequantize";
  const bool square = checked_square(op, block_rows);
  const Tensor input = checked(op, "codes", codes, kCode, {kAny, kAny});
  const int64_t rows = input.shape()[0], columns = input.shape()[1];
  const Tensor factors = checked_float32(op, "scales", scales, scales_shape(rows, columns, block_rows));
  Tensor out = empty({rows, columns}, to_bfloat16 ? DataType::BFLOAT16 : DataType::FLOAT32, codes);
  launched(op, codes,
           ernie45_cuda_fp8_dequantize(input.data(), factors.data<float>(), rows, columns, square,
                                       wide_tag(op, "out", out.dtype()), out.data(), stream_of(codes)));
  return {out};
}

Shapes dequantize_shape(const Shape& codes, const Shape&, int64_t, bool) { return {codes}; }
DataTypes dequantize_dtype(DataType, DataType, int64_t, bool to_bfloat16) {
  return {to_bfloat16 ? DataType::BFLOAT16 : DataType::FLOAT32};
}

// Behind SwiGLU.

struct SwigluInput {
  Tensor x, prob;
  int64_t rows, width;

  SwigluInput(const char* op, const Tensor& given, const paddle::optional<Tensor>& factors)
      : x(checked(op, "x", given, given.dtype(), {kAny, kAny})), rows(x.shape()[0]), width(x.shape()[1] / 2) {
    PD_CHECK(x.shape()[1] % 2 == 0, op, ": x has ", x.shape()[1], " columns, expected an even number");
    if (factors) prob = checked_float32(op, "prob", *factors, {rows});
  }
  const float* factors() const { return prob.impl() ? prob.data<float>() : nullptr; }
};

std::vector<Tensor> swiglu_quantize(const Tensor& x, const paddle::optional<Tensor>& prob, bool power_of_two) {
  const char* op = "swiglu_fp8_quantize";
  const SwigluInput input(op, x, prob);
  Pair out(input.rows, input.width, 1, x);
  launched(op, x,
           ernie45_cuda_swiglu_fp8_quantize(input.x.data(), input.factors(), input.rows, input.width,
                                            wide_tag(op, "x", x.dtype()), power_of_two, out.codes.data(),
                                            out.scales.data<float>(), stream_of(x)));
  return {out.codes, out.scales};
}

Shapes swiglu_quantize_shapes(const Shape& x, const paddle::optional<Shape>&, bool) {
  return {{x[0], half(x[1])}, scales_shape(x[0], half(x[1]), 1)};
}
DataTypes swiglu_quantize_dtypes(DataType, const paddle::optional<DataType>&) { return {kCode, DataType::FLOAT32}; }

// The gradients for x and prob, the product that was quantised, computed again, and the gradient for x quantised: for
// widths that are multiples of 128 where it is wanted, else without columns.
std::vector<Tensor> swiglu_quantize_backward(const Tensor& x, const paddle::optional<Tensor>& prob, const Tensor& grad,
                                             bool quantize, bool power_of_two) {
  const char* op = "swiglu_fp8_quantize_backward";
  const SwigluInput input(op, x, prob);
  PD_CHECK(!quantize || input.width % kBlock == 0, op, ": x has ", 2 * input.width,
           " columns, expected a multiple of 256 for its gradient to be quantised");
  const Tensor incoming = checked(op, "grad", grad, x.dtype(), {input.rows, input.width});
  Tensor grad_x = empty(x.shape(), x.dtype(), x), grad_prob = empty({input.rows}, DataType::FLOAT32, x);
  Tensor out = empty(incoming.shape(), x.dtype(), x);
  Pair pair(input.rows, quantize ? 2 * input.width : 0, 1, x);
  launched(op, x,
           ernie45_cuda_swiglu_fp8_quantize_backward(
               input.x.data(), input.factors(), incoming.data(), input.rows, input.width, wide_tag(op, "x", x.dtype()),
               power_of_two, grad_x.data(), quantize ? pair.codes.data() : nullptr,
               quantize ? pair.scales.data<float>() : nullptr, grad_prob.data<float>(), out.data(), stream_of(x)));
  return {grad_x, grad_prob, out, pair.codes, pair.scales};
}

Shapes swiglu_quantize_backward_shapes(const Shape& x, const paddle::optional<Shape>&, const Shape& grad, bool quantize,
                                       bool) {
  const int64_t columns = quantize ? x[1] : 0;
  return {x, {x[0]}, grad, {x[0], columns}, scales_shape(x[0], columns, 1)};
}
DataTypes swiglu_quantize_backward_dtypes(DataType x, const paddle::optional<DataType>&, DataType) {
  return {x, DataType::FLOAT32, x, kCode, DataType::FLOAT32};
}

}  // namespace
}  // namespace ernie::cuda_fp8

PD_BUILD_OP(ernie45_cuda_fp8_quantize)
    .Inputs({"X"})
    .Outputs({"Codes", "Scales"})
    .Attrs({"block_rows: int64_t", "power_of_two: bool"})
    .SetKernelFn(PD_KERNEL(ernie::cuda_fp8::quantize))
    .SetInferShapeFn(PD_INFER_SHAPE(ernie::cuda_fp8::quantize_shapes))
    .SetInferDtypeFn(PD_INFER_DTYPE(ernie::cuda_fp8::one_pair));

PD_BUILD_OP(ernie45_cuda_fp8_quantize_transposed)
    .Inputs({"X"})
    .Outputs({"Codes", "Scales"})
    .Attrs({"block_rows: int64_t", "power_of_two: bool"})
    .SetKernelFn(PD_KERNEL(ernie::cuda_fp8::quantize_transposed))
    .SetInferShapeFn(PD_INFER_SHAPE(ernie::cuda_fp8::quantize_transposed_shapes))
    .SetInferDtypeFn(PD_INFER_DTYPE(ernie::cuda_fp8::one_pair));

PD_BUILD_OP(ernie45_cuda_fp8_quantize_both)
    .Inputs({"X"})
    .Outputs({"Codes", "Scales", "TransposedCodes", "TransposedScales"})
    .Attrs({"block_rows: int64_t", "power_of_two: bool"})
    .SetKernelFn(PD_KERNEL(ernie::cuda_fp8::quantize_both))
    .SetInferShapeFn(PD_INFER_SHAPE(ernie::cuda_fp8::quantize_both_shapes))
    .SetInferDtypeFn(PD_INFER_DTYPE(ernie::cuda_fp8::two_pairs));

PD_BUILD_OP(ernie45_cuda_fp8_quantize_stack)
    .Inputs({paddle::Vec("Weights")})
    .Outputs({"Codes", "Scales", "TransposedCodes", "TransposedScales"})
    .Attrs({"power_of_two: bool"})
    .SetKernelFn(PD_KERNEL(ernie::cuda_fp8::quantize_stack))
    .SetInferShapeFn(PD_INFER_SHAPE(ernie::cuda_fp8::quantize_stack_shapes))
    .SetInferDtypeFn(PD_INFER_DTYPE(ernie::cuda_fp8::quantize_stack_dtypes));

PD_BUILD_OP(ernie45_cuda_fp8_dequantize)
    .Inputs({"Codes", "Scales"})
    .Outputs({"Out"})
    .Attrs({"block_rows: int64_t", "to_bfloat16: bool"})
    .SetKernelFn(PD_KERNEL(ernie::cuda_fp8::dequantize))
    .SetInferShapeFn(PD_INFER_SHAPE(ernie::cuda_fp8::dequantize_shape))
    .SetInferDtypeFn(PD_INFER_DTYPE(ernie::cuda_fp8::dequantize_dtype));

PD_BUILD_OP(ernie45_cuda_swiglu_fp8_quantize)
    .Inputs({"X", paddle::Optional("Prob")})
    .Outputs({"Codes", "Scales"})
    .Attrs({"power_of_two: bool"})
    .SetKernelFn(PD_KERNEL(ernie::cuda_fp8::swiglu_quantize))
    .SetInferShapeFn(PD_INFER_SHAPE(ernie::cuda_fp8::swiglu_quantize_shapes))
    .SetInferDtypeFn(PD_INFER_DTYPE(ernie::cuda_fp8::swiglu_quantize_dtypes));

PD_BUILD_OP(ernie45_cuda_swiglu_fp8_quantize_backward)
    .Inputs({"X", paddle::Optional("Prob"), "Grad"})
    .Outputs({"GradX", "GradProb", "Out", "Codes", "Scales"})
    .Attrs({"quantize: bool", "power_of_two: bool"})
    .SetKernelFn(PD_KERNEL(ernie::cuda_fp8::swiglu_quantize_backward))
    .SetInferShapeFn(PD_INFER_SHAPE(ernie::cuda_fp8::swiglu_quantize_backward_shapes))
    .SetInferDtypeFn(PD_INFER_DTYPE(ernie::cuda_fp8::swiglu_quantize_backward_dtypes));

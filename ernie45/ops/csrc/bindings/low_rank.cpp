// Products with a frozen weight and two narrow matrices beside it: out = x W + h B with h = scale * x A, and the
// gradients of x, A and B.
#include "../cpu/linear.h"
#include "matrices.h"
#include "packed.h"

namespace ernie::low_rank_op {
namespace {

using paddle::DataType;
using paddle::Tensor;

// The weight, a bfloat16 parameter or packed, and A and B.
struct Weights {
  Tensor plain, a, b;
  PackedMatrix packed{};
  int64_t in, out, rank;

  Weights(const char* op, const paddle::optional<Tensor>& weight, const paddle::optional<Tensor>& data,
          const paddle::optional<Tensor>& scales, const Tensor& left, const Tensor& right, int64_t kind, int64_t inputs,
          int64_t outputs)
      : a(checked_float32(op, "a", left, {inputs, kAny})),
        b(checked_float32(op, "b", right, {a.shape()[1], outputs})),
        in(inputs),
        out(outputs),
        rank(a.shape()[1]) {
    PD_CHECK(!weight != !data, op, ": expected either weight or data");
    if (weight) plain = checked(op, "weight", *weight, DataType::BFLOAT16, {in, out});
    if (data) packed = packed_matrix(op, *data, scales ? &*scales : nullptr, {kind, in, out, 1});
  }

  Matrix matrix_a(bool transposed) const { return matrix_of(a, 0, in, rank, transposed); }
  Matrix matrix_b(bool transposed) const { return matrix_of(b, 0, rank, out, transposed); }
};

// Rows of bfloat16 in which `width` numbers stand beside the `rank` numbers that a narrow matrix makes of them, both
// with zeros up to whole pieces: one product of these rows with two stacked matrices is the sum of two products.
struct Rows {
  uint16_t* data;
  int64_t rows, width, rank;

  int64_t start() const { return whole_pieces(width); }
  int64_t stride() const { return start() + whole_pieces(rank); }
  Matrix all() const { return {data, true, false, rows, stride(), stride()}; }
  Matrix wide(bool transposed) const { return part(data, width, transposed); }
  Matrix narrow(bool transposed) const { return part(data + start(), rank, transposed); }

  // Rounds x into them, and puts scale * x times a matrix beside it.
  void fill(const Matrix& x, const Matrix& matrix, float scale) const {
    round_rows(x, data, stride());
    Tensor product = empty_float32({rows, rank});
    float* values = product.data<float>();
    matmul(wide(false), matrix, {values, false, false, rank});
    for (int64_t i = 0; i < rows * rank; ++i) values[i] *= scale;
    round_rows({values, false, false, rows, rank, rank}, data + start(), stride());
  }

 private:
  Matrix part(const uint16_t* first, int64_t count, bool transposed) const {
    if (transposed) return {first, true, true, count, rows, stride()};
    return {first, true, false, rows, count, stride()};
  }
};

Rows rows_in(Tensor& memory, int64_t width, int64_t rank) {
  return {reinterpret_cast<uint16_t*>(memory.data<phi::dtype::bfloat16>()), memory.shape()[0], width, rank};
}

Tensor memory_for(int64_t rows, int64_t width, int64_t rank) {
  return empty({rows, whole_pieces(width) + whole_pieces(rank)}, true);
}

std::vector<Tensor> forward(const Tensor& x, const paddle::optional<Tensor>& weight,
                            const paddle::optional<Tensor>& data, const paddle::optional<Tensor>& scales,
                            const Tensor& a, const Tensor& b, float scale, int64_t kind, int64_t in, int64_t out) {
  const char* op = "low_rank_linear";
  const Weights weights(op, weight, data, scales, a, b, kind, in, out);
  PD_CHECK(width_of(x.shape()) == in, op, ": the last axis of x is ", width_of(x.shape()), ", expected ", in);
  const Tensor input = checked_float32(op, "x", x, x.shape());
  const int64_t count = rows_of(x.shape());
  Tensor kept = memory_for(count, in, weights.rank), result = empty(with_width(x.shape(), out), false);
  const Rows rows = rows_in(kept, in, weights.rank);
  rows.fill(matrix_of(input, 0, count, in, false), weights.matrix_a(false), scale);
  const Matrix below = weights.matrix_b(false);
  float* to = result.data<float>();
  if (weight) {
    matmul(rows.all(), matrix_of(weights.plain, 0, in, out, false), {to, false, false, out}, &below);
  } else {
    linear(weights.packed, input.data<float>(), in, count, to, out);  // as exact as in inference
    matmul(rows.narrow(false), below, {to, false, true, out});
  }
  return {result, kept};
}

std::vector<Tensor> backward(const Tensor& gradient, const Tensor& kept, const paddle::optional<Tensor>& weight,
                             const paddle::optional<Tensor>& data, const paddle::optional<Tensor>& scales,
                             const Tensor& a, const Tensor& b, float scale, int64_t kind, int64_t in, int64_t out,
                             bool wants_x) {
  const char* op = "low_rank_linear_grad";
  const Weights weights(op, weight, data, scales, a, b, kind, in, out);
  const int64_t count = rows_of(gradient.shape()), rank = weights.rank;
  const Tensor incoming = checked_float32(op, "gradient", gradient, gradient.shape());
  Tensor before = checked(op, "kept", kept, DataType::BFLOAT16, {count, whole_pieces(in) + whole_pieces(rank)});
  Tensor memory = memory_for(count, out, rank);
  const Rows x = rows_in(before, in, rank), dy = rows_in(memory, out, rank);
  dy.fill(matrix_of(incoming, 0, count, out, false), weights.matrix_b(true), scale);
  Tensor of_x = empty(wants_x ? with_width(gradient.shape(), in) : Shape{0}, false);
  Tensor of_a = empty_float32({in, rank}), of_b = empty_float32({rank, out});
  matmul(x.wide(true), dy.narrow(false), target_of(of_a, 0, rank));
  matmul(x.narrow(true), dy.wide(false), target_of(of_b, 0, out));
  const Matrix below = weights.matrix_a(true);
  if (wants_x && weight)
    matmul(dy.all(), matrix_of(weights.plain, 0, in, out, true), target_of(of_x, 0, in), &below);
  else if (wants_x)
    matmul_transposed(dy.all(), weights.packed, target_of(of_x, 0, in), &below);
  return {of_x, of_a, of_b};
}

std::vector<Shape> forward_shape(const Shape& x, const paddle::optional<Shape>&, const paddle::optional<Shape>&,
                                 const paddle::optional<Shape>&, const Shape& a, const Shape&, float, int64_t,
                                 int64_t in, int64_t out) {
  return {with_width(x, out), {rows_of(x), whole_pieces(in) + whole_pieces(a[1])}};
}

std::vector<DataType> forward_dtype(DataType, const paddle::optional<DataType>&, const paddle::optional<DataType>&,
                                    const paddle::optional<DataType>&, DataType, DataType) {
  return {DataType::FLOAT32, DataType::BFLOAT16};
}

std::vector<Shape> backward_shape(const Shape& gradient, const Shape&, const paddle::optional<Shape>&,
                                  const paddle::optional<Shape>&, const paddle::optional<Shape>&, const Shape& a,
                                  const Shape& b, float, int64_t, int64_t in, int64_t, bool wants_x) {
  return {wants_x ? with_width(gradient, in) : Shape{0}, a, b};
}

std::vector<DataType> backward_dtype(DataType, DataType, const paddle::optional<DataType>&,
                                     const paddle::optional<DataType>&, const paddle::optional<DataType>&, DataType,
                                     DataType) {
  return {DataType::FLOAT32, DataType::FLOAT32, DataType::FLOAT32};
}

}  // namespace
}  // namespace ernie::low_rank_op

PD_BUILD_OP(ernie45_low_rank_linear)
    .Inputs({"x", paddle::Optional("weight"), paddle::Optional("data"), paddle::Optional("scales"), "a", "b"})
    .Outputs({"out", "kept"})
    .Attrs({"scale: float", "kind: int64_t", "in_features: int64_t", "out_features: int64_t"})
    .SetKernelFn(PD_KERNEL(ernie::low_rank_op::forward))
    .SetInferShapeFn(PD_INFER_SHAPE(ernie::low_rank_op::forward_shape))
    .SetInferDtypeFn(PD_INFER_DTYPE(ernie::low_rank_op::forward_dtype));

PD_BUILD_OP(ernie45_low_rank_linear_backward)
    .Inputs({"gradient", "kept", paddle::Optional("weight"), paddle::Optional("data"), paddle::Optional("scales"), "a",
             "b"})
    .Outputs({"of_x", "of_a", "of_b"})
    .Attrs({"scale: float", "kind: int64_t", "in_features: int64_t", "out_features: int64_t", "wants_x: bool"})
    .SetKernelFn(PD_KERNEL(ernie::low_rank_op::backward))
    .SetInferShapeFn(PD_INFER_SHAPE(ernie::low_rank_op::backward_shape))
    .SetInferDtypeFn(PD_INFER_DTYPE(ernie::low_rank_op::backward_dtype));

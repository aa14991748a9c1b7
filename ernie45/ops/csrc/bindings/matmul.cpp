// Products of training: of two matrices, with packed weights, of rows that are sorted by expert, and the gradient of an
// embedding.
#include "matrices.h"

#include <numeric>

#include "../cpu/parallel.h"
#include "packed.h"

namespace ernie::matmul_op {
namespace {

using paddle::DataType;
using paddle::Tensor;

// Products of matrices. Leading axes of x and y are rows.

std::vector<Tensor> product(const Tensor& x, const Tensor& y, bool transpose_x, bool transpose_y, bool bfloat16) {
  const Tensor left = checked_either("matmul", "x", x, x.shape()), right = checked_either("matmul", "y", y, y.shape());
  const Matrix a = matrix_of(left, 0, rows_of(x.shape()), width_of(x.shape()), transpose_x);
  const Matrix b = matrix_of(right, 0, rows_of(y.shape()), width_of(y.shape()), transpose_y);
  PD_CHECK(a.columns == b.rows, "matmul: sums over ", a.columns, " numbers of x [", a.rows, ", ", a.columns, "] and ",
           b.rows, " of y [", b.rows, ", ", b.columns, "], expected as many of both");
  Tensor out = empty(transpose_x ? Shape{a.rows, b.columns} : with_width(x.shape(), b.columns), bfloat16);
  matmul(a, b, target_of(out, 0, b.columns));
  return {out};
}

std::vector<Shape> product_shape(const Shape& x, const Shape& y, bool transpose_x, bool transpose_y, bool) {
  const int64_t columns = transpose_y ? rows_of(y) : width_of(y);
  return {transpose_x ? Shape{width_of(x), columns} : with_width(x, columns)};
}

std::vector<DataType> product_dtype(DataType, DataType, bool, bool, bool bfloat16) {
  return {bfloat16 ? DataType::BFLOAT16 : DataType::FLOAT32};
}

// Products with the transpose of a packed weight.

std::vector<Tensor> packed_product(const Tensor& x, const Tensor& data, const paddle::optional<Tensor>& scales,
                                   int64_t kind, int64_t in, int64_t out) {
  const char* op = "linear_transposed";
  const PackedMatrix weight = packed_matrix(op, data, scales ? &*scales : nullptr, {kind, in, out, 1});
  PD_CHECK(width_of(x.shape()) == out, op, ": the last axis of x is ", width_of(x.shape()), ", expected ", out);
  const Tensor rows = checked_either(op, "x", x, x.shape());
  Tensor result = empty(with_width(x.shape(), in), false);
  matmul_transposed(matrix_of(rows, 0, rows_of(x.shape()), out, false), weight, target_of(result, 0, in));
  return {result};
}

std::vector<Shape> packed_product_shape(const Shape& x, const Shape&, const paddle::optional<Shape>&, int64_t,
                                        int64_t in, int64_t) {
  return {with_width(x, in)};
}

std::vector<DataType> packed_product_dtype(DataType, DataType, const paddle::optional<DataType>&) {
  return {DataType::FLOAT32};
}

// Products with stacked weights: the next counts[e] rows belong to expert e.

// Calls body(expert, first row, rows) for every expert that has rows.
template <class Body>
void for_each_expert(const char* op, const Tensor& counts, int64_t rows, const Body& body) {
  const Tensor sizes = checked(op, "counts", counts, DataType::INT64, {kAny});
  const int64_t *begin = sizes.data<int64_t>(), *end = begin + sizes.numel();
  const bool whole = std::all_of(begin, end, [](int64_t size) { return size >= 0; }) &&
                     std::accumulate(begin, end, int64_t{0}) == rows;
  PD_CHECK(whole, op, ": counts do not add up to the ", rows, " rows");
  for (int64_t first = 0, expert = 0; expert < sizes.numel(); first += begin[expert++])
    if (begin[expert]) body(expert, first, begin[expert]);
}

std::vector<Tensor> expert_product(const Tensor& rows, const Tensor& counts, const Tensor& weight, bool transposed) {
  const char* op = "expert_linear";
  const Tensor w = checked_either(op, "weight", weight, {counts.numel(), kAny, kAny});
  const int64_t height = w.shape()[1], width = w.shape()[2];
  const int64_t in = transposed ? width : height, out = transposed ? height : width;
  const Tensor x = checked_either(op, "rows", rows, {kAny, in});
  Tensor result = empty({x.shape()[0], out}, false);
  for_each_expert(op, counts, x.shape()[0], [&](int64_t expert, int64_t first, int64_t count) {
    matmul(matrix_of(x, first, count, in, false), matrix_of(w, expert * height, height, width, transposed),
           target_of(result, first, out));
  });
  return {result};
}

std::vector<Shape> expert_product_shape(const Shape& rows, const Shape&, const Shape& weight, bool transposed) {
  return {with_width(rows, weight[transposed ? 1 : 2])};
}

std::vector<DataType> expert_product_dtype(DataType, DataType, DataType) { return {DataType::FLOAT32}; }

// The gradient [experts, in, out] in bfloat16 of the weight; zero for experts without rows.
std::vector<Tensor> expert_gradient(const Tensor& rows, const Tensor& counts, const Tensor& gradient) {
  const char* op = "expert_linear_grad";
  const Tensor x = checked_either(op, "rows", rows, {kAny, kAny});
  const Tensor dy = checked_either(op, "gradient", gradient, {x.shape()[0], kAny});
  const int64_t experts = counts.numel(), in = x.shape()[1], out = dy.shape()[1];
  Tensor result = empty({experts, in, out}, true);
  const int64_t* sizes = counts.data<int64_t>();
  uint16_t* to = reinterpret_cast<uint16_t*>(result.data<phi::dtype::bfloat16>());
  parallel_for(experts, 1, [&](int64_t first, int64_t last) {
    for (int64_t expert = first; expert < last; ++expert)
      if (!sizes[expert]) std::fill_n(to + expert * in * out, in * out, uint16_t{0});
  });
  for_each_expert(op, counts, x.shape()[0], [&](int64_t expert, int64_t first, int64_t count) {
    matmul(matrix_of(x, first, count, in, true), matrix_of(dy, first, count, out, false),
           target_of(result, expert * in, out));
  });
  return {result};
}

std::vector<Shape> expert_gradient_shape(const Shape& rows, const Shape& counts, const Shape& gradient) {
  return {{counts[0], rows[1], gradient[1]}};
}

std::vector<DataType> expert_gradient_dtype(DataType, DataType, DataType) { return {DataType::BFLOAT16}; }

// The gradient [vocabulary, width] in bfloat16 of an embedding: rows of one id are summed in float32 and rounded once.

std::vector<Tensor> embedding_gradient(const Tensor& ids, const Tensor& gradient, int64_t vocabulary) {
  const char* op = "embedding_grad";
  const Tensor places = checked(op, "ids", ids, DataType::INT64, ids.shape());
  const int64_t count = places.numel(), width = width_of(gradient.shape());
  PD_CHECK(rows_of(gradient.shape()) == count, op, ": ", rows_of(gradient.shape()), " rows for ", count, " ids");
  const Tensor rows = checked_float32(op, "gradient", gradient, gradient.shape());
  const int64_t* id = places.data<int64_t>();
  for (int64_t i = 0; i < count; ++i)
    PD_CHECK(0 <= id[i] && id[i] < vocabulary, op, ": id ", id[i], " is outside the vocabulary of ", vocabulary);
  std::vector<int64_t> order(count), starts;  // tokens by id, and where each id begins
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [id](int64_t a, int64_t b) { return id[a] < id[b]; });
  for (int64_t i = 0; i < count; ++i)
    if (i == 0 || id[order[i]] != id[order[i - 1]]) starts.push_back(i);
  starts.push_back(count);
  Tensor result = empty({vocabulary, width}, true);
  uint16_t* to = reinterpret_cast<uint16_t*>(result.data<phi::dtype::bfloat16>());
  const float* from = rows.data<float>();
  parallel_for(vocabulary, grain_for(width), [&](int64_t first, int64_t last) {
    std::fill(to + first * width, to + last * width, uint16_t{0});
  });
  parallel_for(static_cast<int64_t>(starts.size()) - 1, grain_for(width), [&](int64_t first, int64_t last) {
    std::vector<float> sum(width);
    for (int64_t group = first; group < last; ++group) {
      std::fill(sum.begin(), sum.end(), 0.0f);
      for (int64_t i = starts[group]; i < starts[group + 1]; ++i)
        for (int64_t c = 0; c < width; ++c) sum[c] += from[order[i] * width + c];
      uint16_t* row = to + id[order[starts[group]]] * width;
      for (int64_t c = 0; c < width; ++c) row[c] = float_to_bfloat16(sum[c]);
    }
  });
  return {result};
}

std::vector<Shape> embedding_gradient_shape(const Shape&, const Shape& gradient, int64_t vocabulary) {
  return {{vocabulary, width_of(gradient)}};
}

std::vector<DataType> embedding_gradient_dtype(DataType, DataType) { return {DataType::BFLOAT16}; }

}  // namespace
}  // namespace ernie::matmul_op

PD_BUILD_OP(ernie45_matmul)
    .Inputs({"x", "y"})
    .Outputs({"out"})
    .Attrs({"transpose_x: bool", "transpose_y: bool", "bfloat16: bool"})
    .SetKernelFn(PD_KERNEL(ernie::matmul_op::product))
    .SetInferShapeFn(PD_INFER_SHAPE(ernie::matmul_op::product_shape))
    .SetInferDtypeFn(PD_INFER_DTYPE(ernie::matmul_op::product_dtype));

PD_BUILD_OP(ernie45_linear_transposed)
    .Inputs({"x", "data", paddle::Optional("scales")})
    .Outputs({"out"})
    .Attrs({"kind: int64_t", "in_features: int64_t", "out_features: int64_t"})
    .SetKernelFn(PD_KERNEL(ernie::matmul_op::packed_product))
    .SetInferShapeFn(PD_INFER_SHAPE(ernie::matmul_op::packed_product_shape))
    .SetInferDtypeFn(PD_INFER_DTYPE(ernie::matmul_op::packed_product_dtype));

PD_BUILD_OP(ernie45_expert_linear)
    .Inputs({"rows", "counts", "weight"})
    .Outputs({"out"})
    .Attrs({"transposed: bool"})
    .SetKernelFn(PD_KERNEL(ernie::matmul_op::expert_product))
    .SetInferShapeFn(PD_INFER_SHAPE(ernie::matmul_op::expert_product_shape))
    .SetInferDtypeFn(PD_INFER_DTYPE(ernie::matmul_op::expert_product_dtype));

PD_BUILD_OP(ernie45_expert_outer_products)
    .Inputs({"rows", "counts", "gradient"})
    .Outputs({"out"})
    .SetKernelFn(PD_KERNEL(ernie::matmul_op::expert_gradient))
    .SetInferShapeFn(PD_INFER_SHAPE(ernie::matmul_op::expert_gradient_shape))
    .SetInferDtypeFn(PD_INFER_DTYPE(ernie::matmul_op::expert_gradient_dtype));

PD_BUILD_OP(ernie45_sum_rows_by_id)
    .Inputs({"ids", "gradient"})
    .Outputs({"out"})
    .Attrs({"vocabulary: int64_t"})
    .SetKernelFn(PD_KERNEL(ernie::matmul_op::embedding_gradient))
    .SetInferShapeFn(PD_INFER_SHAPE(ernie::matmul_op::embedding_gradient_shape))
    .SetInferDtypeFn(PD_INFER_DTYPE(ernie::matmul_op::embedding_gradient_dtype));

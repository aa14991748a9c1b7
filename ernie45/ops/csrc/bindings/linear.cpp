// Products with packed weights, and attention over the key/value cache.
#include "../cpu/linear.h"

#include "../cpu/attention.h"
#include "packed.h"
#include "tensors.h"

namespace ernie::linear_op {
namespace {

using paddle::DataType;
using paddle::Tensor;

std::vector<Tensor> linear(const Tensor& x, const Tensor& data, const paddle::optional<Tensor>& scales, int64_t kind,
                           int64_t in, int64_t out) {
  const PackedMatrix weight = packed_matrix("linear", data, scales ? &*scales : nullptr, {kind, in, out, 1});
  const Shape shape = x.shape();
  PD_CHECK(width_of(shape) == in, "linear: the last axis of x is ", width_of(shape), ", expected ", in);
  const Tensor input = checked_float32("linear", "x", x, shape);
  Tensor result = empty_float32(with_width(shape, out));
  ernie::linear(weight, input.data<float>(), in, rows_of(shape), result.data<float>(), out);
  return {result};
}

std::vector<std::vector<int64_t>> linear_shape(const Shape& x, const Shape&, const paddle::optional<Shape>&, int64_t,
                                               int64_t, int64_t out) {
  return {with_width(x, out)};
}

std::vector<DataType> linear_dtype(DataType x, DataType, const paddle::optional<DataType>&) { return {x}; }

std::vector<Tensor> decode_attention(const Tensor& query, const Tensor& keys, const Tensor& values, const Tensor& first,
                                     const Tensor& lengths, float scale) {
  const char* op = "decode_attention";
  const Tensor q = checked_float32(op, "query", query, {kAny, kAny, kAny, kAny});
  const int64_t batch = q.shape()[0], tokens = q.shape()[1], heads = q.shape()[2], head_dim = q.shape()[3];
  const Tensor k = checked(op, "keys", keys, DataType::BFLOAT16, {batch, kAny, kAny, head_dim});
  const int64_t capacity = k.shape()[1], kv_heads = k.shape()[2];
  const Tensor v = checked(op, "values", values, DataType::BFLOAT16, k.shape());
  const Tensor from = checked(op, "first", first, DataType::INT64, {batch});
  const Tensor until = checked(op, "lengths", lengths, DataType::INT64, {batch});
  PD_CHECK(kv_heads > 0 && heads > 0 && heads % kv_heads == 0, op, ": ", heads, " heads are no multiple of ", kv_heads, " kv heads");
  PD_CHECK(head_dim % 2 == 0, op, ": head_dim is ", head_dim, ", expected an even number");
  for (int64_t row = 0; row < batch; ++row) {
    const int64_t begin = from.data<int64_t>()[row], end = until.data<int64_t>()[row];
    PD_CHECK(0 <= begin && tokens <= end && end <= capacity, op, ": row ", row, " sees keys ", begin, " to ", end,
             " with ", tokens, " new tokens, but the cache holds ", capacity);
  }
  Tensor out = empty_float32(q.shape());
  AttentionTask task{};
  task.query = q.data<float>();
  task.query_stride = heads * head_dim;
  task.keys = reinterpret_cast<const uint16_t*>(k.data());
  task.values = reinterpret_cast<const uint16_t*>(v.data());
  task.first = from.data<int64_t>();
  task.length = until.data<int64_t>();
  task.batch = batch;
  task.tokens = tokens;
  task.capacity = capacity;
  task.heads = heads;
  task.kv_heads = kv_heads;
  task.head_dim = head_dim;
  task.scale = scale;
  task.out = out.data<float>();
  ernie::attention(task);
  return {out};
}

std::vector<std::vector<int64_t>> attention_shape(const Shape& query, const Shape&, const Shape&, const Shape&,
                                                  const Shape&, float) {
  return {query};
}

std::vector<DataType> attention_dtype(DataType query, DataType, DataType, DataType, DataType) { return {query}; }

}  // namespace
}  // namespace ernie::linear_op

PD_BUILD_OP(ernie45_linear)
    .Inputs({"x", "data", paddle::Optional("scales")})
    .Outputs({"out"})
    .Attrs({"kind: int64_t", "in_features: int64_t", "out_features: int64_t"})
    .SetKernelFn(PD_KERNEL(ernie::linear_op::linear))
    .SetInferShapeFn(PD_INFER_SHAPE(ernie::linear_op::linear_shape))
    .SetInferDtypeFn(PD_INFER_DTYPE(ernie::linear_op::linear_dtype));

PD_BUILD_OP(ernie45_decode_attention)
    .Inputs({"query", "keys", "values", "first", "lengths"})
    .Outputs({"out"})
    .Attrs({"scale: float"})
    .SetKernelFn(PD_KERNEL(ernie::linear_op::decode_attention))
    .SetInferShapeFn(PD_INFER_SHAPE(ernie::linear_op::attention_shape))
    .SetInferDtypeFn(PD_INFER_DTYPE(ernie::linear_op::attention_dtype));

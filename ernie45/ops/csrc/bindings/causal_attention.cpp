// Causal attention for training. The backward pass needs the same inputs.
#include "../cpu/causal_attention.h"

#include "../cpu/memory.h"
#include "../cpu/parallel.h"
#include "tensors.h"

namespace ernie::causal_attention_op {
namespace {

using paddle::DataType;
using paddle::Tensor;

const uint16_t* bits(const Tensor& tensor) { return reinterpret_cast<const uint16_t*>(tensor.data()); }

// The inputs, checked and contiguous, and what kernels want to know of them.
struct Inputs {
  Tensor query, key, value, ends;
  CausalAttention task;

  Inputs(const char* op, const Tensor& q, const Tensor& k, const Tensor& v, const paddle::optional<Tensor>& e,
         float scale)
      : query(checked(op, "query", q, DataType::BFLOAT16, {kAny, kAny, kAny, kAny})) {
    const Shape shape = query.shape();
    key = checked(op, "key", k, DataType::BFLOAT16, {shape[0], shape[1], kAny, shape[3]});
    value = checked(op, "value", v, DataType::BFLOAT16, key.shape());
    if (e) ends = checked(op, "ends", *e, DataType::INT64, {shape[0], shape[1]});
    const int64_t heads = shape[2], kv_heads = key.shape()[2];
    PD_CHECK(kv_heads > 0 && heads % kv_heads == 0, op, ": ", heads, " heads are no multiple of ", kv_heads, " kv heads");
    task = {bits(query), bits(key), bits(value), e ? ends.data<int64_t>() : nullptr, shape[0], shape[1], heads, kv_heads,
            shape[3], scale};
  }
};

// Calls body(row of the batch, head, buffer of the thread) for every head, on all threads.
template <class Body>
void for_each_head(const CausalAttention& task, const Body& body) {
  if (!task.tokens) return;
  const int64_t bytes = ERNIE_DISPATCH(causal_attention_bytes, task);
  parallel_for(task.batch * task.heads, 1, [&](int64_t first, int64_t last) {
    const Memory memory = allocate_lines(bytes);
    for (int64_t i = first; i < last; ++i) body(i / task.heads, i % task.heads, memory.get());
  });
}

std::vector<Tensor> forward(const Tensor& query, const Tensor& key, const Tensor& value,
                            const paddle::optional<Tensor>& ends, float scale) {
  const Inputs inputs("causal_attention", query, key, value, ends, scale);
  Tensor out = empty_float32(query.shape());
  float* to = out.data<float>();
  for_each_head(inputs.task, [&](int64_t row, int64_t head, void* memory) {
    ERNIE_DISPATCH(causal_attention, inputs.task, row, head, memory, to);
  });
  return {out};
}

// heads [batch, tokens, kv_heads, group, head_dim] summed over each group: [batch, tokens, kv_heads, head_dim].
Tensor sum_groups(const Tensor& heads, int64_t kv_heads) {
  const Shape shape = heads.shape();
  const int64_t group = shape[2] / kv_heads, width = shape[3];
  Tensor out = empty_float32({shape[0], shape[1], kv_heads, width});
  const float* from = heads.data<float>();
  float* to = out.data<float>();
  parallel_for(shape[0] * shape[1] * kv_heads, grain_for(group * width), [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      std::copy_n(from + i * group * width, width, to + i * width);
      for (int64_t g = 1; g < group; ++g)
        for (int64_t c = 0; c < width; ++c) to[i * width + c] += from[(i * group + g) * width + c];
    }
  });
  return out;
}

std::vector<Tensor> backward(const Tensor& query, const Tensor& key, const Tensor& value,
                             const paddle::optional<Tensor>& ends, const Tensor& grad_out, float scale) {
  const char* op = "causal_attention_backward";
  const Inputs inputs(op, query, key, value, ends, scale);
  const Tensor incoming = checked_float32(op, "gradient", grad_out, query.shape());
  Tensor of_query = empty_float32(query.shape()), of_key = empty_float32(query.shape());
  Tensor of_value = empty_float32(query.shape());
  const CausalAttentionGradient gradient{incoming.data<float>(), of_query.data<float>(), of_key.data<float>(),
                                         of_value.data<float>()};
  for_each_head(inputs.task, [&](int64_t row, int64_t head, void* memory) {
    ERNIE_DISPATCH(causal_attention_gradient, inputs.task, row, head, memory, gradient);
  });
  const int64_t kv_heads = inputs.task.kv_heads;
  return {of_query, sum_groups(of_key, kv_heads), sum_groups(of_value, kv_heads)};
}

std::vector<Shape> forward_shape(const Shape& query, const Shape&, const Shape&, const paddle::optional<Shape>&, float) {
  return {query};
}
std::vector<Shape> backward_shape(const Shape& query, const Shape& key, const Shape& value,
                                  const paddle::optional<Shape>&, const Shape&, float) {
  return {query, key, value};
}
std::vector<DataType> forward_dtype(DataType, DataType, DataType, const paddle::optional<DataType>&) {
  return {DataType::FLOAT32};
}
std::vector<DataType> backward_dtype(DataType, DataType, DataType, const paddle::optional<DataType>&, DataType) {
  return {DataType::FLOAT32, DataType::FLOAT32, DataType::FLOAT32};
}

}  // namespace
}  // namespace ernie::causal_attention_op

PD_BUILD_OP(ernie45_causal_attention)
    .Inputs({"query", "key", "value", paddle::Optional("ends")})
    .Outputs({"out"})
    .Attrs({"scale: float"})
    .SetKernelFn(PD_KERNEL(ernie::causal_attention_op::forward))
    .SetInferShapeFn(PD_INFER_SHAPE(ernie::causal_attention_op::forward_shape))
    .SetInferDtypeFn(PD_INFER_DTYPE(ernie::causal_attention_op::forward_dtype));

PD_BUILD_OP(ernie45_causal_attention_backward)
    .Inputs({"query", "key", "value", paddle::Optional("ends"), "gradient"})
    .Outputs({"of_query", "of_key", "of_value"})
    .Attrs({"scale: float"})
    .SetKernelFn(PD_KERNEL(ernie::causal_attention_op::backward))
    .SetInferShapeFn(PD_INFER_SHAPE(ernie::causal_attention_op::backward_shape))
    .SetInferDtypeFn(PD_INFER_DTYPE(ernie::causal_attention_op::backward_dtype));

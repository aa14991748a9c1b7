// Packed weights as the operators receive them: a tensor of bytes, for int8 a tensor of scales, and four numbers.
#pragma once

#include "../cpu/packed.h"
#include "tensors.h"

namespace ernie {

struct PackedShape {
  int64_t kind, in, out, count;  // count: stacked matrices
};

// The first of the stacked matrices, after a check that the tensors have the right sizes.
inline PackedMatrix packed_matrix(const char* op, const paddle::Tensor& data, const paddle::Tensor* scales,
                                  const PackedShape& shape) {
  PD_CHECK(0 <= shape.kind && shape.kind <= 2, op, ": kind is ", shape.kind, ", expected 0, 1 or 2");
  PackedMatrix matrix{static_cast<Kind>(shape.kind), shape.in, shape.out, nullptr, nullptr};
  checked(op, "data", data, paddle::DataType::UINT8, {matrix.bytes() * shape.count});
  matrix.data = data.data<uint8_t>();
  if (matrix.kind == Kind::kInt8 && shape.out) {
    PD_CHECK(scales, op, ": int8 weights need scales");
    checked_float32(op, "scales", *scales, {panels(shape.out) * kPanel * shape.count});
    matrix.scales = scales->data<float>();
  }
  return matrix;
}

}  // namespace ernie

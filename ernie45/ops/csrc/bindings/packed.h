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

// Hands out the weights of a whole network in the order in which the operator's Python side lists them: a flat list of
// tensors, and four numbers for each matrix among them.
class WeightReader {
 public:
  WeightReader(const char* op, const std::vector<paddle::Tensor>& tensors, const std::vector<int64_t>& shapes)
      : op_(op), tensors_(tensors), shapes_(shapes) {}

  const float* vector(const char* argument, const Shape& shape) {
    return checked_float32(op_, argument, next(), shape).data<float>();
  }

  // An absent matrix has count 0 and no tensors.
  PackedMatrix matrix(int64_t* count) {
    PD_CHECK(shape_ + 4 <= shapes_.size(), op_, ": the list of shapes is too short");
    const PackedShape shape{shapes_[shape_], shapes_[shape_ + 1], shapes_[shape_ + 2], shapes_[shape_ + 3]};
    shape_ += 4;
    *count = shape.count;
    if (!shape.count) return PackedMatrix{};
    const paddle::Tensor& data = next();
    const paddle::Tensor* scales = shape.kind == static_cast<int64_t>(Kind::kInt8) ? &next() : nullptr;
    return packed_matrix(op_, data, scales, shape);
  }

  bool done() const { return position_ == tensors_.size() && shape_ == shapes_.size(); }

 private:
  const paddle::Tensor& next() {
    PD_CHECK(position_ < tensors_.size(), op_, ": the list of weights is too short");
    return tensors_[position_++];
  }

  const char* op_;
  const std::vector<paddle::Tensor>& tensors_;
  const std::vector<int64_t>& shapes_;
  size_t position_ = 0, shape_ = 0;
};

}  // namespace ernie

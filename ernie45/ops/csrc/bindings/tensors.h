// What the operators ask of their tensors: the checks, and the sizes that kernels want to know.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "paddle/extension.h"

extern "C" void ernie45_use_large_pages(void* data, int64_t bytes);  // of cpu/pack.cpp

namespace ernie {

using Shape = std::vector<int64_t>;

constexpr int64_t kAny = -1;

inline std::string text(const Shape& shape) {
  std::string joined;
  for (int64_t size : shape) joined += (joined.empty() ? "" : ", ") + (size == kAny ? "any" : std::to_string(size));
  return "[" + joined + "]";
}

// The tensor, contiguous, after a check of its dtype and shape; kAny stands for any size. An error names the operator,
// the argument, what was found and what was expected.
inline paddle::Tensor checked(const char* op, const char* argument, const paddle::Tensor& tensor,
                              paddle::DataType dtype, const Shape& expected) {
  PD_CHECK(tensor.is_cpu(), op, ": ", argument, " is not on the CPU; this operator runs there only");
  PD_CHECK(tensor.dtype() == dtype, op, ": ", argument, " is ", phi::DataTypeToString(tensor.dtype()), ", expected ",
           phi::DataTypeToString(dtype));
  const Shape found = tensor.shape();
  const bool fits = std::equal(found.begin(), found.end(), expected.begin(), expected.end(),
                               [](int64_t size, int64_t wanted) { return wanted == kAny || size == wanted; });
  PD_CHECK(fits, op, ": ", argument, " has shape ", text(found), ", expected ", text(expected));
  return tensor.is_contiguous() ? tensor : tensor.contiguous();
}

inline paddle::Tensor checked_float32(const char* op, const char* argument, const paddle::Tensor& tensor,
                                      const Shape& expected) {
  return checked(op, argument, tensor, paddle::DataType::FLOAT32, expected);
}

// Elements of one row and number of rows of x [..., width], also where one of them is 0.
inline int64_t width_of(const Shape& shape) { return shape.empty() ? 1 : shape.back(); }
inline int64_t rows_of(const Shape& shape) {
  int64_t rows = 1;
  for (size_t axis = 0; axis + 1 < shape.size(); ++axis) rows *= shape[axis];
  return rows;
}

// The same leading axes with another last one.
inline Shape with_width(Shape shape, int64_t width) {
  if (!shape.empty()) shape.back() = width;
  return shape;
}

inline Shape without_width(Shape shape) {
  if (!shape.empty()) shape.pop_back();
  return shape;
}

// The same tensor, not yet written to, in large pages where it has room for them: those cost far less to get.
inline paddle::Tensor in_large_pages(paddle::Tensor tensor) {
  if (tensor.numel()) ernie45_use_large_pages(tensor.data(), tensor.numel() * phi::SizeOf(tensor.dtype()));
  return tensor;
}

inline paddle::Tensor empty_float32(const Shape& shape) {
  return paddle::empty(shape, paddle::DataType::FLOAT32, paddle::CPUPlace());
}

// The gradient of an output, which is undefined where nothing was computed from that output.
inline paddle::Tensor or_zeros(const paddle::Tensor& grad, const Shape& shape) {
  return grad.impl() ? grad : paddle::full(shape, 0.0, paddle::DataType::FLOAT32, paddle::CPUPlace());
}

// Rows for one thread at least, so that it has some microseconds of work.
inline int64_t grain_for(int64_t width) { return std::max<int64_t>(1, 16384 / std::max<int64_t>(1, width)); }

}  // namespace ernie

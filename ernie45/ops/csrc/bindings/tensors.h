// What the operators ask of their tensors: the checks, and the sizes that kernels want to know.
#pragma once

#include <cstdint>

#include "paddle/extension.h"

#include "shapes.h"

extern "C" void ernie45_use_large_pages(void* data, int64_t bytes);  // of cpu/pack.cpp

namespace ernie {

// The tensor, contiguous, after a check of its dtype and shape; kAny stands for any size. An error names the operator,
// the argument, what was found and what was expected.
inline paddle::Tensor checked(const char* op, const char* argument, const paddle::Tensor& tensor,
                              paddle::DataType dtype, const Shape& expected) {
  PD_CHECK(tensor.is_cpu(), op, ": ", argument, " is not on the CPU; this operator runs there only");
  PD_CHECK(tensor.dtype() == dtype, op, ": ", argument, " is ", phi::DataTypeToString(tensor.dtype()), ", expected ",
           phi::DataTypeToString(dtype));
  const Shape found = tensor.shape();
  PD_CHECK(fits(found, expected), op, ": ", argument, " has shape ", text(found), ", expected ", text(expected));
  return tensor.is_contiguous() ? tensor : tensor.contiguous();
}

inline paddle::Tensor checked_float32(const char* op, const char* argument, const paddle::Tensor& tensor,
                                      const Shape& expected) {
  return checked(op, argument, tensor, paddle::DataType::FLOAT32, expected);
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

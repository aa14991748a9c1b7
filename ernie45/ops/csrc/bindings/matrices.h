// Tensors as the matrices that products of training take.
#pragma once

#include "../cpu/matmul.h"
#include "tensors.h"

namespace ernie {

// A check of a tensor that may be float32 or bfloat16.
inline paddle::Tensor checked_either(const char* op, const char* argument, const paddle::Tensor& tensor,
                                     const Shape& expected) {
  const bool bfloat16 = tensor.dtype() == paddle::DataType::BFLOAT16;
  return checked(op, argument, tensor, bfloat16 ? paddle::DataType::BFLOAT16 : paddle::DataType::FLOAT32, expected);
}

inline paddle::Tensor empty(const Shape& shape, bool bfloat16) {
  const paddle::DataType dtype = bfloat16 ? paddle::DataType::BFLOAT16 : paddle::DataType::FLOAT32;
  return in_large_pages(paddle::empty(shape, dtype, paddle::CPUPlace()));
}

// `rows` rows of `width` numbers, from row `first` on, and their transpose.
inline Matrix matrix_of(const paddle::Tensor& tensor, int64_t first, int64_t rows, int64_t width, bool transposed) {
  const bool bfloat16 = tensor.dtype() == paddle::DataType::BFLOAT16;
  const uint8_t* start = static_cast<const uint8_t*>(tensor.data()) + first * width * (bfloat16 ? 2 : 4);
  if (transposed) return {start, bfloat16, true, width, rows, width};
  return {start, bfloat16, false, rows, width, width};
}

inline Target target_of(paddle::Tensor& tensor, int64_t first, int64_t width) {
  const bool bfloat16 = tensor.dtype() == paddle::DataType::BFLOAT16;
  return {static_cast<uint8_t*>(tensor.data()) + first * width * (bfloat16 ? 2 : 4), bfloat16, false, width};
}

}  // namespace ernie

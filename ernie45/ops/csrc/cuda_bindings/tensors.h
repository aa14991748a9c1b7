// What the operators on the GPU ask of their tensors: the checks, memory for results, and the call of a kernel.
#pragma once

#include <cstdint>
#include <vector>

// Not paddle/extension.h, which wants the headers of cuDNN and nine other libraries as well.
#include "paddle/phi/api/all.h"

#include "../bindings/shapes.h"
#include "../cuda/types.h"

namespace ernie {

using Shapes = std::vector<Shape>;
using DataTypes = std::vector<paddle::DataType>;

#if defined(PADDLE_WITH_CUDA)
inline bool on_device(const paddle::Tensor& tensor) { return tensor.is_gpu(); }
inline cudaStream_t stream_of(const paddle::Tensor& tensor) { return tensor.stream(); }
inline const char* explain(cudaError_t error) { return cudaGetErrorString(error); }
#else  // Kernels that are emulated, for tests: the device is the host.
inline bool on_device(const paddle::Tensor& tensor) { return tensor.is_cpu(); }
inline cudaStream_t stream_of(const paddle::Tensor&) { return nullptr; }
inline const char* explain(cudaError_t error) { return error == cudaSuccess ? "success" : "it failed"; }
#endif

// The tensor, contiguous, after a check of its dtype and shape; kAny stands for any size. An error names the operator,
// the argument, what was found and what was expected.
inline paddle::Tensor checked(const char* op, const char* argument, const paddle::Tensor& tensor,
                              paddle::DataType dtype, const Shape& expected) {
  PD_CHECK(on_device(tensor), op, ": ", argument, " is not on a GPU; this operator runs there only");
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

// The tag of a floating point dtype that kernels take.
inline int tag(const char* op, const char* argument, paddle::DataType dtype) {
  switch (dtype) {
    case paddle::DataType::FLOAT32: return kErnieFloat32;
    case paddle::DataType::FLOAT16: return kErnieFloat16;
    case paddle::DataType::BFLOAT16: return kErnieBFloat16;
    default:
      PD_THROW(op, ": ", argument, " is ", phi::DataTypeToString(dtype), ", expected float32, float16 or bfloat16");
  }
}

// The same for what is only moved: codes of 8 bits, too.
inline int tag_of_moved(const char* op, const char* argument, paddle::DataType dtype) {
  return dtype == paddle::DataType::FLOAT8_E4M3FN ? kErnieFloat8E4M3 : tag(op, argument, dtype);
}

// Half of a size, which is not known before a program runs if it is negative.
inline int64_t half(int64_t size) { return size < 0 ? kAny : size / 2; }

// Memory that nobody has written, where `like` is.
inline paddle::Tensor empty(const Shape& shape, paddle::DataType dtype, const paddle::Tensor& like) {
  return paddle::empty(shape, dtype, like.place());
}

// The gradient of an output; null where nothing was computed from that output.
inline const paddle::Tensor* defined(const paddle::Tensor& grad) { return grad.impl() ? &grad : nullptr; }

// Throws what CUDA says about the launch of a kernel for the input x.
inline void launched(const char* op, const paddle::Tensor& x, cudaError_t error) {
  PD_CHECK(error != cudaErrorInvalidValue, op, ": an input of shape ", text(x.shape()), " and type ",
           phi::DataTypeToString(x.dtype()), " is more than the kernel takes");
  PD_CHECK(error == cudaSuccess, op, ": the kernel could not be started: ", explain(error));
}

}  // namespace ernie

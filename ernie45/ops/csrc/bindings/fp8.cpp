// Operators that convert to and from FP8 (e4m3). Matrices are float32 or bfloat16, scales float32; nothing here has a
// gradient.
#include "../cpu/fp8.h"

#include "../cpu/parallel.h"
#include "tensors.h"

namespace ernie::fp8 {
namespace {

using paddle::DataType;
using paddle::Tensor;

using Types = std::vector<DataType>;
using Shapes = std::vector<Shape>;

template <class Pointer>
using Pointed = std::remove_const_t<std::remove_pointer_t<Pointer>>;

constexpr DataType kCode = DataType::FLOAT8_E4M3FN;

// The types in which Paddle hands out codes and bfloat16; kernels see their bits.
const uint8_t* bits_of_codes(const Tensor& tensor) {
  return reinterpret_cast<const uint8_t*>(tensor.data<phi::dtype::float8_e4m3fn>());
}
uint8_t* bits_of_codes(Tensor& tensor) {
  return reinterpret_cast<uint8_t*>(tensor.data<phi::dtype::float8_e4m3fn>());
}
const uint16_t* bits_of_bfloat16(const Tensor& tensor) {
  return reinterpret_cast<const uint16_t*>(tensor.data<phi::dtype::bfloat16>());
}
uint16_t* bits_of_bfloat16(Tensor& tensor) {
  return reinterpret_cast<uint16_t*>(tensor.data<phi::dtype::bfloat16>());
}

Tensor empty_codes(int64_t rows, int64_t columns) { return paddle::empty({rows, columns}, kCode, paddle::CPUPlace()); }

// A matrix that is float32 or bfloat16.
Tensor checked_matrix(const char* op, const Tensor& x) {
  PD_CHECK(x.dtype() == DataType::FLOAT32 || x.dtype() == DataType::BFLOAT16, op, ": x is ",
           phi::DataTypeToString(x.dtype()), ", expected float32 or bfloat16");
  return checked(op, "x", x, x.dtype(), {kAny, kAny});
}

// Whether blocks are 128 x 128 and not 1 x 128; an error if they are neither.
bool checked_square(const char* op, int64_t block_rows) {
  PD_CHECK(block_rows == 1 || block_rows == kFp8Block, op, ": block_rows is ", block_rows, ", expected 1 or ",
           kFp8Block);
  return block_rows == kFp8Block;
}

int64_t blocks(int64_t size, int64_t block) { return (size + block - 1) / block; }

// Calls body(pointer to the bits of x): kernels exist for float and for bfloat16 as uint16_t.
template <class Body>
void with_bits(const Tensor& x, const Body& body) {
  if (x.dtype() == DataType::FLOAT32)
    body(x.data<float>());
  else
    body(bits_of_bfloat16(x));
}

void quantize_rows(const Tensor& x, bool power_of_two, uint8_t* codes, float* scales) {
  const int64_t rows = x.shape()[0], columns = x.shape()[1], blocks_in_row = fp8_blocks(columns);
  with_bits(x, [&](auto* from) {
    using T = Pointed<decltype(from)>;
    parallel_for(rows, grain_for(columns), [&](int64_t first, int64_t last) {
      ERNIE_DISPATCH(fp8_quantize_rows<T>, from + first * columns, last - first, columns, power_of_two,
                     codes + first * columns, scales + first * blocks_in_row);
    });
  });
}

void quantize_tiles(const Tensor& x, const Fp8Quantization& wanted) {
  const int64_t tiles_in_row = fp8_blocks(wanted.columns);
  with_bits(x, [&](auto* from) {
    using T = Pointed<decltype(from)>;
    parallel_for(fp8_blocks(wanted.rows) * tiles_in_row, 1, [&](int64_t first, int64_t last) {
      for (int64_t tile = first; tile < last; ++tile)
        ERNIE_DISPATCH(fp8_quantize_tile<T>, from, wanted, tile / tiles_in_row * kFp8Block,
                       tile % tiles_in_row * kFp8Block);
    });
  });
}

// Codes and scales in one or both orientations.
std::vector<Tensor> quantized(const char* op, const Tensor& x, int64_t block_rows, bool power_of_two, bool straight,
                              bool transposed) {
  const Tensor input = checked_matrix(op, x);
  const int64_t rows = input.shape()[0], columns = input.shape()[1];
  Fp8Quantization wanted = {rows, columns, checked_square(op, block_rows), power_of_two};
  std::vector<Tensor> outputs;
  if (straight) {
    outputs.push_back(empty_codes(rows, columns));
    wanted.codes = bits_of_codes(outputs.back());
    outputs.push_back(empty_float32({blocks(rows, block_rows), fp8_blocks(columns)}));
    wanted.scales = outputs.back().data<float>();
  }
  if (transposed) {
    outputs.push_back(empty_codes(columns, rows));
    wanted.transposed_codes = bits_of_codes(outputs.back());
    outputs.push_back(empty_float32({blocks(columns, block_rows), fp8_blocks(rows)}));
    wanted.transposed_scales = outputs.back().data<float>();
  }
  if (straight && !transposed && !wanted.square)
    quantize_rows(input, power_of_two, wanted.codes, wanted.scales);
  else
    quantize_tiles(input, wanted);
  return outputs;
}

std::vector<Tensor> quantize(const Tensor& x, int64_t block_rows, bool power_of_two) {
  return quantized("fp8_quantize", x, block_rows, power_of_two, true, false);
}
std::vector<Tensor> quantize_transposed(const Tensor& x, int64_t block_rows, bool power_of_two) {
  return quantized("fp8_quantize_transposed", x, block_rows, power_of_two, false, true);
}
std::vector<Tensor> quantize_both(const Tensor& x, int64_t block_rows, bool power_of_two) {
  return quantized("fp8_quantize_both", x, block_rows, power_of_two, true, true);
}

Shapes quantize_shapes(const Shape& x, int64_t block_rows, bool) {
  return {x, {blocks(x[0], block_rows), fp8_blocks(x[1])}};
}
Shapes quantize_transposed_shapes(const Shape& x, int64_t block_rows, bool power_of_two) {
  return quantize_shapes({x[1], x[0]}, block_rows, power_of_two);
}
Shapes quantize_both_shapes(const Shape& x, int64_t block_rows, bool power_of_two) {
  const Shapes straight = quantize_shapes(x, block_rows, power_of_two);
  const Shapes transposed = quantize_transposed_shapes(x, block_rows, power_of_two);
  return {straight[0], straight[1], transposed[0], transposed[1]};
}
Types one_pair(DataType) { return {kCode, DataType::FLOAT32}; }
Types two_pairs(DataType) { return {kCode, DataType::FLOAT32, kCode, DataType::FLOAT32}; }

std::vector<Tensor> dequantize(const Tensor& codes, const Tensor& scales, int64_t block_rows, bool to_bfloat16) {
  const char* op = "fp8_dequantize";
  checked_square(op, block_rows);
  const Tensor input = checked(op, "codes", codes, kCode, {kAny, kAny});
  const int64_t rows = input.shape()[0], columns = input.shape()[1];
  const Tensor factors = checked_float32(op, "scales", scales, {blocks(rows, block_rows), fp8_blocks(columns)});
  Tensor out = paddle::empty({rows, columns}, to_bfloat16 ? DataType::BFLOAT16 : DataType::FLOAT32, paddle::CPUPlace());
  const uint8_t* from = bits_of_codes(input);
  const float* by = factors.data<float>();
  const auto fill = [&](auto* to) {
    using T = Pointed<decltype(to)>;
    parallel_for(rows, grain_for(columns), [&](int64_t first, int64_t last) {
      ERNIE_DISPATCH(fp8_dequantize_rows<T>, from + first * columns, by, block_rows, first, last - first, columns,
                     to + first * columns);
    });
  };
  if (to_bfloat16)
    fill(bits_of_bfloat16(out));
  else
    fill(out.data<float>());
  return {out};
}

Shapes dequantize_shape(const Shape& codes, const Shape&, int64_t, bool) { return {codes}; }
Types dequantize_dtype(DataType, DataType, int64_t, bool to_bfloat16) {
  return {to_bfloat16 ? DataType::BFLOAT16 : DataType::FLOAT32};
}

std::vector<Tensor> swiglu_quantize(const Tensor& x, const paddle::optional<Tensor>& prob, bool power_of_two) {
  const char* op = "swiglu_fp8_quantize";
  const Tensor input = checked_matrix(op, x);
  const int64_t rows = input.shape()[0], width = input.shape()[1] / 2, blocks_in_row = fp8_blocks(width);
  PD_CHECK(input.shape()[1] % 2 == 0, op, ": x has ", input.shape()[1], " columns, expected an even number");
  const Tensor factors = prob ? checked_float32(op, "prob", *prob, {rows}) : Tensor();
  const float* by = prob ? factors.data<float>() : nullptr;
  Tensor codes = empty_codes(rows, width), scales = empty_float32({rows, blocks_in_row});
  uint8_t* to = bits_of_codes(codes);
  float* to_scales = scales.data<float>();
  with_bits(input, [&](auto* from) {
    using T = Pointed<decltype(from)>;
    parallel_for(rows, grain_for(2 * width), [&](int64_t first, int64_t last) {
      ERNIE_DISPATCH(swiglu_fp8_quantize_rows<T>, from + first * 2 * width, by ? by + first : nullptr, last - first,
                     width, power_of_two, to + first * width, to_scales + first * blocks_in_row);
    });
  });
  return {codes, scales};
}

Shapes swiglu_quantize_shapes(const Shape& x, const paddle::optional<Shape>&, bool) {
  return {{x[0], x[1] / 2}, {x[0], fp8_blocks(x[1] / 2)}};
}
Types swiglu_quantize_dtypes(DataType, const paddle::optional<DataType>&) { return {kCode, DataType::FLOAT32}; }

}  // namespace
}  // namespace ernie::fp8

PD_BUILD_OP(ernie45_fp8_quantize)
    .Inputs({"X"})
    .Outputs({"Codes", "Scales"})
    .Attrs({"block_rows: int64_t", "power_of_two: bool"})
    .SetKernelFn(PD_KERNEL(ernie::fp8::quantize))
    .SetInferShapeFn(PD_INFER_SHAPE(ernie::fp8::quantize_shapes))
    .SetInferDtypeFn(PD_INFER_DTYPE(ernie::fp8::one_pair));

PD_BUILD_OP(ernie45_fp8_quantize_transposed)
    .Inputs({"X"})
    .Outputs({"Codes", "Scales"})
    .Attrs({"block_rows: int64_t", "power_of_two: bool"})
    .SetKernelFn(PD_KERNEL(ernie::fp8::quantize_transposed))
    .SetInferShapeFn(PD_INFER_SHAPE(ernie::fp8::quantize_transposed_shapes))
    .SetInferDtypeFn(PD_INFER_DTYPE(ernie::fp8::one_pair));

PD_BUILD_OP(ernie45_fp8_quantize_both)
    .Inputs({"X"})
    .Outputs({"Codes", "Scales", "TransposedCodes", "TransposedScales"})
    .Attrs({"block_rows: int64_t", "power_of_two: bool"})
    .SetKernelFn(PD_KERNEL(ernie::fp8::quantize_both))
    .SetInferShapeFn(PD_INFER_SHAPE(ernie::fp8::quantize_both_shapes))
    .SetInferDtypeFn(PD_INFER_DTYPE(ernie::fp8::two_pairs));

PD_BUILD_OP(ernie45_fp8_dequantize)
    .Inputs({"Codes", "Scales"})
    .Outputs({"Out"})
    .Attrs({"block_rows: int64_t", "to_bfloat16: bool"})
    .SetKernelFn(PD_KERNEL(ernie::fp8::dequantize))
    .SetInferShapeFn(PD_INFER_SHAPE(ernie::fp8::dequantize_shape))
    .SetInferDtypeFn(PD_INFER_DTYPE(ernie::fp8::dequantize_dtype));

PD_BUILD_OP(ernie45_swiglu_fp8_quantize)
    .Inputs({"X", paddle::Optional("Prob")})
    .Outputs({"Codes", "Scales"})
    .Attrs({"power_of_two: bool"})
    .SetKernelFn(PD_KERNEL(ernie::fp8::swiglu_quantize))
    .SetInferShapeFn(PD_INFER_SHAPE(ernie::fp8::swiglu_quantize_shapes))
    .SetInferDtypeFn(PD_INFER_DTYPE(ernie::fp8::swiglu_quantize_dtypes));

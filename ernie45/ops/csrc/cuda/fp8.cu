#include "fp8.h"

#include <algorithm>

#include "fp8_tiles.cuh"

namespace ernie::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMostBlocks = 0x7fffffff;

bool takes(int64_t rows, int64_t columns) {
  return rows >= 0 && columns >= 0 && (columns == 0 || rows <= kMostBlocks / ceil_div(columns, kFp8Block));
}

// Blocks of 1 x 128

// Vectors of a thread, all loaded before the first is used.
constexpr int kHeldBlocks = 4;

// Each group of lanes takes blocks of 128 columns, kHeldBlocks of them; there are `total`.
template <typename T, bool kWide>
__global__ void __launch_bounds__(kThreads)
    quantize_rows_kernel(const T* __restrict__ x, int64_t columns, uint32_t total, Divisor column_blocks,
                         bool power_of_two, uint8_t* __restrict__ codes, float* __restrict__ scales) {
  constexpr int kGroupsOfBlock = kThreads / kGroup<T>;
  const uint32_t first = blockIdx.x * (kGroupsOfBlock * kHeldBlocks) + threadIdx.x / kGroup<T>;
  const int lane = threadIdx.x % kGroup<T>;
  Vector held[kHeldBlocks];
  int64_t at[kHeldBlocks];
  int left[kHeldBlocks];
#pragma unroll
  for (int k = 0; k < kHeldBlocks; ++k) {
    const uint32_t i = first + k * kGroupsOfBlock, row = column_blocks.quotient(i);
    const int64_t column = int64_t{i - row * column_blocks.divisor} * kFp8Block + lane * kLanes<T>;
    at[k] = row * columns + column;
    left[k] = i < total ? static_cast<int>(min(columns - column, int64_t{kFp8Block})) : 0;
    held[k] = load_first<kWide>(x + at[k], left[k]);
  }
#pragma unroll
  for (int k = 0; k < kHeldBlocks; ++k) {
    float values[kLanes<T>], scale;
    to_floats<T>(held[k], values);
    store_first<kWide>(encode_block<kGroup<T>>(values, power_of_two, scale), codes + at[k], left[k]);
    const uint32_t i = first + k * kGroupsOfBlock;
    if (lane == 0 && i < total) scales[i] = scale;
  }
}

template <typename T>
cudaError_t quantize_rows(const void* x, const Quantized& out, cudaStream_t stream) {
  const int64_t blocks = ceil_div(out.columns, kFp8Block), total = out.rows * blocks;
  const bool wide = out.columns % kLanes<T> == 0 && aligned(x, out.codes);
  const int64_t taken = kThreads / kGroup<T> * kHeldBlocks;
  return launch(wide ? quantize_rows_kernel<T, true> : quantize_rows_kernel<T, false>,
                static_cast<unsigned>(ceil_div(total, taken)), kThreads, 0, stream, static_cast<const T*>(x),
                out.columns, static_cast<uint32_t>(total), Divisor(blocks), out.power_of_two, out.codes, out.scales);
}

// Tiles of 128 x 128

template <typename T, bool kSquare>
cudaError_t quantize_tiles(const void* const* matrices, int count, const Quantized& out, cudaStream_t stream) {
  const int64_t row_blocks = ceil_div(out.rows, kTile), column_blocks = ceil_div(out.columns, kTile);
  Matrices held{};
  bool wide = out.columns % kLanes<T> == 0 && aligned(out.codes);
  for (int i = 0; i < count; ++i) {
    held.at[i] = matrices[i];
    wide = wide && aligned(matrices[i]);
  }
  // A matrix of a stack starts on a multiple of 16 bytes, or 8 for codes, where all rows do.
  const bool wide_transposed = out.rows % kVectorBytes == 0 && aligned(out.transposed_codes);
  return launch(wide ? quantize_tiles_kernel<T, true, kSquare> : quantize_tiles_kernel<T, false, kSquare>,
                dim3(static_cast<unsigned>(row_blocks * column_blocks), count), kTileThreads<T>, 0, stream, held, out,
                Divisor(column_blocks), wide_transposed);
}

template <typename T>
cudaError_t quantize(const void* x, bool square, const Quantized& out, cudaStream_t stream) {
  if (square) return quantize_tiles<T, true>(&x, 1, out, stream);
  return out.transposed_codes ? quantize_tiles<T, false>(&x, 1, out, stream) : quantize_rows<T>(x, out, stream);
}

template <typename T>
cudaError_t quantize_stack(const void* const* matrices, int64_t count, Quantized out, cudaStream_t stream) {
  const int64_t elements = out.rows * out.columns, blocks = ceil_div(out.rows, kTile) * ceil_div(out.columns, kTile);
  for (int64_t i = 0; i < count; i += kMatrices) {
    const int taken = static_cast<int>(std::min<int64_t>(count - i, kMatrices));
    const cudaError_t error = quantize_tiles<T, true>(matrices + i, taken, out, stream);
    if (error != cudaSuccess) return error;
    if (out.codes) out.codes += taken * elements, out.scales += taken * blocks;
    if (out.transposed_codes) out.transposed_codes += taken * elements, out.transposed_scales += taken * blocks;
  }
  return cudaSuccess;
}

// Back

// Vectors of a thread: of codes as many as make 16 bytes of the output.
constexpr int kHeldVectors = 4;

// Each thread takes vectors of kCount elements, of which a row has `vectors`; there are `total`. A row of scales serves
// 2^log_block_rows rows.
template <typename T, int kCount>
__global__ void __launch_bounds__(kThreads)
    dequantize_kernel(const Float8* __restrict__ codes, const float* __restrict__ scales, uint32_t total,
                      Divisor vectors, uint32_t column_blocks, int log_block_rows, T* __restrict__ out) {
  const uint32_t first = blockIdx.x * (kThreads * kHeldVectors) + threadIdx.x;
  Pack<Float8, kCount> held[kHeldVectors];
  float scale[kHeldVectors];
#pragma unroll
  for (int k = 0; k < kHeldVectors; ++k) {
    // Without a branch, all loads start before the first value arrives.
    const uint32_t i = min(first + k * kThreads, total - 1), row = vectors.quotient(i);
    const uint32_t block = (i - row * vectors.divisor) / (kFp8Block / kCount);
    held[k] = load<kCount>(codes + int64_t{i} * kCount);
    scale[k] = scales[int64_t{row >> log_block_rows} * column_blocks + block];
  }
#pragma unroll
  for (int k = 0; k < kHeldVectors; ++k) {
    const uint32_t i = first + k * kThreads;
    float values[kCount];
    to_floats(held[k], values);
#pragma unroll
    for (int j = 0; j < kCount; ++j) values[j] *= scale[k];
    if (i < total) store(from_floats<T>(values), out + int64_t{i} * kCount);
  }
}

// Rows in pieces of less than 2^31 vectors, which is what the kernel can count, and of whole blocks.
template <typename T, int kCount>
cudaError_t dequantize(const Float8* codes, const float* scales, int64_t rows, int64_t columns, bool square, T* out,
                       cudaStream_t stream) {
  const int64_t vectors = columns / kCount, blocks = ceil_div(columns, kFp8Block);
  const int64_t most = kMostBlocks / vectors / kFp8Block * kFp8Block;
  for (int64_t row = 0; row < rows; row += most) {
    const int64_t total = std::min(most, rows - row) * vectors;
    const cudaError_t error = launch(
        dequantize_kernel<T, kCount>, static_cast<unsigned>(ceil_div(total, kThreads * kHeldVectors)), kThreads, 0,
        stream, codes + row * columns, scales + (square ? row / kFp8Block : row) * blocks, static_cast<uint32_t>(total),
        Divisor(vectors), static_cast<uint32_t>(blocks), square ? 7 : 0, out + row * columns);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

template <typename T>
cudaError_t dequantize(const void* codes, const float* scales, int64_t rows, int64_t columns, bool square, void* out,
                       cudaStream_t stream) {
  const Float8* from = static_cast<const Float8*>(codes);
  T* to = static_cast<T*>(out);
  if (columns % kLanes<T> == 0 && aligned(codes, out))
    return dequantize<T, kLanes<T>>(from, scales, rows, columns, square, to, stream);
  return dequantize<T, 1>(from, scales, rows, columns, square, to, stream);
}

Quantized outputs(int64_t rows, int64_t columns, bool power_of_two, void* codes, float* scales, void* transposed_codes,
                  float* transposed_scales) {
  return {rows,   columns, power_of_two, static_cast<uint8_t*>(codes), scales, static_cast<uint8_t*>(transposed_codes),
          transposed_scales};
}

}  // namespace
}  // namespace ernie::cuda

cudaError_t ernie45_cuda_fp8_quantize(const void* x, int64_t rows, int64_t columns, int dtype, bool square,
                                      bool power_of_two, void* codes, float* scales, void* transposed_codes,
                                      float* transposed_scales, cudaStream_t stream) {
  using namespace ernie::cuda;
  if (!takes(rows, columns)) return cudaErrorInvalidValue;
  if (rows == 0 || columns == 0 || !(codes || transposed_codes)) return cudaSuccess;
  const Quantized out = outputs(rows, columns, power_of_two, codes, scales, transposed_codes, transposed_scales);
  return ERNIE45_FOR_FP8_SOURCE(dtype, quantize<T>(x, square, out, stream));
}

cudaError_t ernie45_cuda_fp8_quantize_stack(const void* const* matrices, int64_t count, int64_t rows, int64_t columns,
                                            int dtype, bool power_of_two, void* codes, float* scales,
                                            void* transposed_codes, float* transposed_scales, cudaStream_t stream) {
  using namespace ernie::cuda;
  if (count < 0 || !takes(rows, columns)) return cudaErrorInvalidValue;
  if (count == 0 || rows == 0 || columns == 0 || !(codes || transposed_codes)) return cudaSuccess;
  const Quantized out = outputs(rows, columns, power_of_two, codes, scales, transposed_codes, transposed_scales);
  return ERNIE45_FOR_FP8_SOURCE(dtype, quantize_stack<T>(matrices, count, out, stream));
}

cudaError_t ernie45_cuda_fp8_dequantize(const void* codes, const float* scales, int64_t rows, int64_t columns,
                                        bool square, int dtype, void* out, cudaStream_t stream) {
  using namespace ernie::cuda;
  if (!takes(rows, columns) || columns > 0x7fffff) return cudaErrorInvalidValue;
  if (rows == 0 || columns == 0) return cudaSuccess;
  return ERNIE45_FOR_FP8_SOURCE(dtype, dequantize<T>(codes, scales, rows, columns, square, out, stream));
}

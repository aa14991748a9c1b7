#include "fp8.h"

#include "fp8.cuh"

namespace ernie::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMostBlocks = 0x7fffffff;

// Vectors of gate and of up that a thread has in flight: all are loaded before the first is used.
constexpr int kHeldBlocks = 2;

// Each group of lanes takes blocks of 128 columns of the output, kHeldBlocks of them; there are `total`.
template <typename T, bool kWide>
__global__ void __launch_bounds__(kThreads)
    swiglu_quantize_kernel(const T* __restrict__ x, const float* __restrict__ prob, int64_t width, uint32_t total,
                           Divisor column_blocks, bool power_of_two, uint8_t* __restrict__ codes,
                           float* __restrict__ scales) {
  constexpr int kGroupsOfBlock = kThreads / kGroup<T>;
  const uint32_t first = blockIdx.x * (kGroupsOfBlock * kHeldBlocks) + threadIdx.x / kGroup<T>;
  const int lane = threadIdx.x % kGroup<T>;
  Vector gate[kHeldBlocks], up[kHeldBlocks];
  float factor[kHeldBlocks];
  int64_t at[kHeldBlocks];
  int left[kHeldBlocks];
#pragma unroll
  for (int k = 0; k < kHeldBlocks; ++k) {
    const uint32_t i = min(first + k * kGroupsOfBlock, total - 1), row = column_blocks.quotient(i);
    const int64_t column = int64_t{i - row * column_blocks.divisor} * kFp8Block + lane * kLanes<T>;
    at[k] = row * width + column;
    left[k] = static_cast<int>(min(width - column, int64_t{kFp8Block}));
    const T* from = x + (at[k] + row * width);  // every row before has two widths, not one
    gate[k] = load_first<kWide>(from, left[k]);
    up[k] = load_first<kWide>(from + width, left[k]);
    factor[k] = prob ? prob[row] : 1.0f;
  }
#pragma unroll
  for (int k = 0; k < kHeldBlocks; ++k) {
    float g[kLanes<T>], u[kLanes<T>], scale;
    to_floats<T>(gate[k], g);
    to_floats<T>(up[k], u);
#pragma unroll
    for (int j = 0; j < kLanes<T>; ++j) {
      g[j] = g[j] * sigmoid<T>(g[j]) * u[j] * factor[k];
      // Where the block ends, gate and up are 0, but the probability may be infinite.
      if (j >= left[k]) g[j] = 0.0f;
    }
    const auto found = encode_block<kGroup<T>>(g, power_of_two, scale);
    const uint32_t i = first + k * kGroupsOfBlock;
    if (i >= total) continue;
    store_first<kWide>(found, codes + at[k], left[k]);
    if (lane == 0) scales[i] = scale;
  }
}

template <typename T>
cudaError_t swiglu_quantize(const void* x, const float* prob, int64_t rows, int64_t width, bool power_of_two,
                            void* codes, float* scales, cudaStream_t stream) {
  const int64_t blocks = ceil_div(width, kFp8Block), taken = kThreads / kGroup<T> * kHeldBlocks;
  const bool wide = width % kLanes<T> == 0 && aligned(x, codes);
  return launch(wide ? swiglu_quantize_kernel<T, true> : swiglu_quantize_kernel<T, false>,
                static_cast<unsigned>(ceil_div(rows * blocks, taken)), kThreads, 0, stream, static_cast<const T*>(x),
                prob, width, static_cast<uint32_t>(rows * blocks), Divisor(blocks), power_of_two,
                static_cast<uint8_t*>(codes), scales);
}

// The way back

template <typename T>
struct Gradients {
  T* x;
  uint8_t* codes;
  float* scales;
  float* prob;
  T* out;
};

// Stores the first `count` values rounded to T, and leaves what they have become.
template <typename T, bool kWide>
__device__ __forceinline__ void store_rounded(float (&values)[kLanes<T>], T* to, int64_t count) {
  const Pack<T, kLanes<T>> rounded = from_floats<T>(values);
  to_floats(rounded, values);
  if (to == nullptr) return;
  if constexpr (kWide) {
    if (count > 0) store(rounded, to);
  } else {
#pragma unroll
    for (int i = 0; i < kLanes<T>; ++i) {
      if (i < count) to[i] = rounded.values[i];
    }
  }
}

// A block of 1 x 128 of grad_x, of which every lane of a group holds a vector, at a place in the matrix.
template <typename T, bool kWide>
__device__ __forceinline__ void store_gradient(float (&values)[kLanes<T>], const Gradients<T>& to, int64_t place,
                                               int64_t count, bool power_of_two) {
  store_rounded<T, kWide>(values, to.x ? to.x + place : nullptr, count);
  if (!to.codes) return;
  float scale;
  const auto codes = encode_block<kGroup<T>>(values, power_of_two, scale);
  store_first<kWide>(codes, to.codes + place, count);
  if (threadIdx.x % kGroup<T> == 0 && count > 0) to.scales[place / kFp8Block] = scale;
}

// A block for each row. All threads of a warp take as many turns: they quantise together.
template <typename T, bool kWide>
__global__ void __launch_bounds__(kThreads)
    swiglu_backward_kernel(const T* __restrict__ x, const float* __restrict__ prob, const T* __restrict__ grad,
                           int64_t width, bool power_of_two, Gradients<T> to) {
  const int64_t row = blockIdx.x;
  const float factor = prob ? prob[row] : 1.0f;
  float sum = 0.0f;
  for (int64_t first = 0; first < width; first += blockDim.x * kLanes<T>) {
    const int64_t column = first + threadIdx.x * kLanes<T>, left = width - column;
    const int64_t place = row * width + column, place_in_x = place + row * width;
    const Vector gate = load_first<kWide>(x + place_in_x, left), up = load_first<kWide>(x + place_in_x + width, left);
    const Vector behind = load_first<kWide>(grad + place, left);
    float g[kLanes<T>], u[kLanes<T>], d[kLanes<T>];
    to_floats<T>(gate, g);
    to_floats<T>(up, u);
    to_floats<T>(behind, d);
#pragma unroll
    for (int j = 0; j < kLanes<T>; ++j) {
      const float share = sigmoid<T>(g[j]), silu = g[j] * share, product = silu * u[j], scaled = d[j] * factor;
      sum += d[j] * product;
      d[j] = product * factor;
      g[j] = scaled * u[j] * (share + silu * (1.0f - share));
      u[j] = scaled * silu;
    }
    if (to.out) store_rounded<T, kWide>(d, to.out + place, left);
    store_gradient<T, kWide>(g, to, place_in_x, left, power_of_two);
    store_gradient<T, kWide>(u, to, place_in_x + width, left, power_of_two);
  }
  if (!to.prob) return;
  sum = block_sum(sum);
  if (threadIdx.x == 0) to.prob[row] = sum;
}

template <typename T>
cudaError_t swiglu_backward(const void* x, const float* prob, const void* grad, int64_t rows, int64_t width,
                            bool power_of_two, void* grad_x, void* codes, float* scales, float* grad_prob, void* out,
                            cudaStream_t stream) {
  // As few threads as take a row in as few turns as kThreads do.
  const int64_t vectors = ceil_div(width, kLanes<T>), turns = ceil_div(vectors, kThreads);
  const auto threads = static_cast<unsigned>(ceil_div(ceil_div(vectors, turns), kWarp) * kWarp);
  const bool wide = width % kLanes<T> == 0 && aligned(x, grad, grad_x, codes, out);
  const Gradients<T> to{static_cast<T*>(grad_x), static_cast<uint8_t*>(codes), scales, grad_prob, static_cast<T*>(out)};
  return launch(wide ? swiglu_backward_kernel<T, true> : swiglu_backward_kernel<T, false>, static_cast<unsigned>(rows),
                threads, 0, stream, static_cast<const T*>(x), prob, static_cast<const T*>(grad), width, power_of_two,
                to);
}

bool takes(int64_t rows, int64_t width) {
  return rows >= 0 && width >= 0 && (width == 0 || rows <= kMostBlocks / ceil_div(width, kFp8Block));
}

}  // namespace
}  // namespace ernie::cuda

cudaError_t ernie45_cuda_swiglu_fp8_quantize(const void* x, const float* prob, int64_t rows, int64_t width, int dtype,
                                             bool power_of_two, void* codes, float* scales, cudaStream_t stream) {
  using namespace ernie::cuda;
  if (!takes(rows, width)) return cudaErrorInvalidValue;
  if (rows == 0 || width == 0) return cudaSuccess;
  return ERNIE45_FOR_FP8_SOURCE(dtype, swiglu_quantize<T>(x, prob, rows, width, power_of_two, codes, scales, stream));
}

cudaError_t ernie45_cuda_swiglu_fp8_quantize_backward(const void* x, const float* prob, const void* grad, int64_t rows,
                                                      int64_t width, int dtype, bool power_of_two, void* grad_x,
                                                      void* codes, float* scales, float* grad_prob, void* out,
                                                      cudaStream_t stream) {
  using namespace ernie::cuda;
  if (!takes(rows, width) || (codes && width % kFp8Block != 0)) return cudaErrorInvalidValue;
  if (rows == 0) return cudaSuccess;
  if (width == 0) return grad_prob ? cudaMemsetAsync(grad_prob, 0, rows * sizeof(float), stream) : cudaSuccess;
  return ERNIE45_FOR_FP8_SOURCE(dtype, swiglu_backward<T>(x, prob, grad, rows, width, power_of_two, grad_x, codes,
                                                          scales, grad_prob, out, stream));
}

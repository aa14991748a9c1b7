#include "swiglu.h"

#include <algorithm>

#include "device.cuh"

namespace ernie::cuda {
namespace {

constexpr int kThreads = 256;
// Blocks of a multiprocessor. Left alone, the compiler aims at more of them with few registers, and loads one after the
// other.
constexpr int kBlocks = 6;
// Vectors of gate and of up that a thread has in flight: all are loaded before the first is used.
constexpr int kHeld = 2;

// The vectors of all rows together, less than 2^31, are cut into tiles of kThreads * kHeld; `vectors` are in a row.
template <typename T, int kCount, bool kWeighted>
__global__ void __launch_bounds__(kThreads, kBlocks)
    swiglu_kernel(const T* __restrict__ x, const float* __restrict__ prob, uint32_t total, Divisor vectors,
                  T* __restrict__ out) {
  const uint32_t first = blockIdx.x * (kThreads * kHeld) + threadIdx.x;
  Pack<T, kCount> gate[kHeld], up[kHeld];
  float factor[kHeld];
#pragma unroll
  for (int k = 0; k < kHeld; ++k) {
    // Without a branch, all loads start before the first value arrives.
    const uint32_t i = min(first + k * kThreads, total - 1), row = vectors.quotient(i);
    const int64_t width = static_cast<int64_t>(vectors.divisor) * kCount;
    const T* from = x + (static_cast<int64_t>(i) * kCount + row * width);  // every row before has two widths, not one
    gate[k] = load<kCount>(from);
    up[k] = load<kCount>(from + width);
    factor[k] = kWeighted ? prob[row] : 1.0f;
  }
#pragma unroll
  for (int k = 0; k < kHeld; ++k) {
    const uint32_t i = first + k * kThreads;
    float g[kCount], u[kCount];
    to_floats(gate[k], g);
    to_floats(up[k], u);
#pragma unroll
    for (int j = 0; j < kCount; ++j) g[j] = g[j] * sigmoid<T>(g[j]) * u[j] * factor[k];
    if (i < total) store(from_floats<T>(g), out + static_cast<int64_t>(i) * kCount);
  }
}

// Gradients of one vector: g, u become those of gate and up; returns the sum of grad * silu(gate) * up.
template <typename T, int kCount>
__device__ __forceinline__ float differentiate(float (&g)[kCount], float (&u)[kCount], const float (&grad)[kCount],
                                               float factor) {
  float sum = 0.0f;
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
    const float share = sigmoid<T>(g[j]), silu = g[j] * share, scaled = grad[j] * factor, up = u[j];
    sum += grad[j] * silu * up;
    g[j] = scaled * up * (share + silu * (1.0f - share));
    u[j] = scaled * silu;
  }
  return sum;
}

// As swiglu_kernel, for x that has no probability.
template <typename T, int kCount>
__global__ void __launch_bounds__(kThreads, kBlocks)
    swiglu_grad_kernel(const T* __restrict__ x, const T* __restrict__ grad_out, uint32_t total, Divisor vectors,
                       T* __restrict__ grad_x) {
  const uint32_t i = blockIdx.x * kThreads + threadIdx.x;
  if (i >= total) return;
  const int64_t width = static_cast<int64_t>(vectors.divisor) * kCount, place = static_cast<int64_t>(i) * kCount;
  const int64_t place_in_x = place + vectors.quotient(i) * width;
  float g[kCount], u[kCount], grad[kCount];
  const Pack<T, kCount> gate = load<kCount>(x + place_in_x), up = load<kCount>(x + place_in_x + width);
  to_floats(load<kCount>(grad_out + place), grad);
  to_floats(gate, g);
  to_floats(up, u);
  differentiate<T>(g, u, grad, 1.0f);
  store(from_floats<T>(g), grad_x + place_in_x);
  store(from_floats<T>(u), grad_x + place_in_x + width);
}

// A block for each row, whose probability has a gradient that sums over the row.
template <typename T, int kCount>
__global__ void __launch_bounds__(kThreads, kBlocks)
    swiglu_prob_grad_kernel(const T* __restrict__ x, const float* __restrict__ prob, const T* __restrict__ grad_out,
                            int64_t width, T* __restrict__ grad_x, float* __restrict__ grad_prob) {
  const int64_t row = blockIdx.x;
  x += row * 2 * width;
  grad_x += row * 2 * width;
  grad_out += row * width;
  const float factor = prob[row];
  float sum = 0.0f;
  for (int64_t i = threadIdx.x * kCount; i < width; i += blockDim.x * kCount) {
    float g[kCount], u[kCount], grad[kCount];
    const Pack<T, kCount> gate = load<kCount>(x + i), up = load<kCount>(x + width + i);
    to_floats(load<kCount>(grad_out + i), grad);
    to_floats(gate, g);
    to_floats(up, u);
    sum += differentiate<T>(g, u, grad, factor);
    store(from_floats<T>(g), grad_x + i);
    store(from_floats<T>(u), grad_x + width + i);
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) grad_prob[row] = sum;
}

// Calls run(first row, vectors) for pieces of the rows that have less than 2^31 vectors, `vectors` in each row.
template <typename Run>
cudaError_t for_pieces(int64_t rows, int64_t vectors, Run run) {
  const int64_t most = 0x7fffffff / vectors;
  for (int64_t row = 0; row < rows; row += most) {
    const cudaError_t error = run(row, std::min(most, rows - row) * vectors);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

template <typename T, int kCount>
cudaError_t swiglu(const T* x, const float* prob, int64_t rows, int64_t width, T* out, cudaStream_t stream) {
  const auto kernel = prob ? swiglu_kernel<T, kCount, true> : swiglu_kernel<T, kCount, false>;
  return for_pieces(rows, width / kCount, [&](int64_t row, int64_t total) {
    const auto blocks = static_cast<unsigned>(ceil_div(total, kThreads * kHeld));
    return launch(kernel, blocks, kThreads, 0, stream, x + row * 2 * width, prob ? prob + row : nullptr,
                  static_cast<uint32_t>(total), Divisor(width / kCount), out + row * width);
  });
}

template <typename T, int kCount>
cudaError_t swiglu_grad(const T* x, const float* prob, const T* grad_out, int64_t rows, int64_t width, T* grad_x,
                        float* grad_prob, cudaStream_t stream) {
  const int64_t vectors = width / kCount;
  if (prob) {
    // As few threads as take the row in as few turns as kThreads do.
    const int64_t turns = ceil_div(vectors, kThreads), threads = ceil_div(ceil_div(vectors, turns), kWarp) * kWarp;
    return launch(swiglu_prob_grad_kernel<T, kCount>, static_cast<unsigned>(rows), static_cast<unsigned>(threads), 0,
                  stream, x, prob, grad_out, width, grad_x, grad_prob);
  }
  return for_pieces(rows, vectors, [&](int64_t row, int64_t total) {
    return launch(swiglu_grad_kernel<T, kCount>, static_cast<unsigned>(ceil_div(total, kThreads)), kThreads, 0, stream,
                  x + row * 2 * width, grad_out + row * width, static_cast<uint32_t>(total), Divisor(vectors),
                  grad_x + row * 2 * width);
  });
}

template <typename T>
cudaError_t swiglu(const void* x, const float* prob, int64_t rows, int64_t width, void* out, cudaStream_t stream) {
  const auto run = width % kLanes<T> == 0 && aligned(x, out) ? swiglu<T, kLanes<T>> : swiglu<T, 1>;
  return run(static_cast<const T*>(x), prob, rows, width, static_cast<T*>(out), stream);
}

template <typename T>
cudaError_t swiglu_grad(const void* x, const float* prob, const void* grad_out, int64_t rows, int64_t width,
                        void* grad_x, float* grad_prob, cudaStream_t stream) {
  const bool wide = width % kLanes<T> == 0 && aligned(x, grad_out, grad_x);
  const auto run = wide ? swiglu_grad<T, kLanes<T>> : swiglu_grad<T, 1>;
  return run(static_cast<const T*>(x), prob, static_cast<const T*>(grad_out), rows, width, static_cast<T*>(grad_x),
             grad_prob, stream);
}

bool valid(int64_t rows, int64_t width) { return rows >= 0 && width >= 0 && width <= 0x7fffffff; }

}  // namespace
}  // namespace ernie::cuda

cudaError_t ernie45_cuda_swiglu(const void* x, const float* prob, int64_t rows, int64_t width, int dtype, void* out,
                                cudaStream_t stream) {
  using namespace ernie::cuda;
  if (!valid(rows, width)) return cudaErrorInvalidValue;
  if (rows == 0 || width == 0) return cudaSuccess;
  return ERNIE45_FOR_FLOAT_TYPE(dtype, swiglu<T>(x, prob, rows, width, out, stream));
}

cudaError_t ernie45_cuda_swiglu_grad(const void* x, const float* prob, const void* grad_out, int64_t rows,
                                     int64_t width, int dtype, void* grad_x, float* grad_prob, cudaStream_t stream) {
  using namespace ernie::cuda;
  if (!valid(rows, width) || rows > 0x7fffffff || (prob && !grad_prob)) return cudaErrorInvalidValue;
  if (rows > 0 && width == 0 && prob) return cudaMemsetAsync(grad_prob, 0, rows * sizeof(float), stream);
  if (rows == 0 || width == 0) return cudaSuccess;
  return ERNIE45_FOR_FLOAT_TYPE(dtype, swiglu_grad<T>(x, prob, grad_out, rows, width, grad_x, grad_prob, stream));
}

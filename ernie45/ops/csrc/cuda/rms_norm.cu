#include "rms_norm.h"

#include <algorithm>

#include "device.cuh"

namespace ernie::cuda {
namespace {

constexpr int64_t kMaxWidth = 8192, kMaxNarrowWidth = 4096;

// How a block holds a row of T in its registers: each thread kHeld vectors of kCount elements, blockDim.x vectors apart.
template <typename T, bool kWide>
struct Layout {
  static constexpr int kCount = kWide ? kLanes<T> : 1;
  static constexpr int kHeld = kWide ? 16 / kCount : 4;
  static constexpr int kMaxThreads = (kWide ? kMaxWidth : kMaxNarrowWidth) / (kCount * kHeld);

  static unsigned threads(int64_t width) {
    return static_cast<unsigned>(ceil_div(width, kCount * kHeld * kWarp) * kWarp);
  }
};

__device__ __forceinline__ float inverse_rms(float squares, int width, float epsilon) {
  return rsqrtf(__fdividef(squares, static_cast<float>(width)) + epsilon);
}

// Every thread of the block gets both sums.
__device__ __forceinline__ float2 block_sums(float a, float b) {
  __shared__ float2 of_warps[kWarp];
  a = warp_sum(a);
  b = warp_sum(b);
  const int warps = blockDim.x / kWarp, lane = threadIdx.x % kWarp;
  if (warps == 1) return make_float2(a, b);
  __syncthreads();  // the sums of a call before are read
  if (lane == 0) of_warps[threadIdx.x / kWarp] = make_float2(a, b);
  __syncthreads();
  const float2 mine = lane < warps ? of_warps[lane] : make_float2(0.0f, 0.0f);
  return make_float2(warp_sum(mine.x), warp_sum(mine.y));
}

// A block for each row. `out` and `sum` may be `x` or `residual`: a thread reads what it writes, and before.
template <typename T, typename W, bool kWide>
__global__ void __launch_bounds__(Layout<T, kWide>::kMaxThreads)
    rms_norm_kernel(const T* x, const T* residual, const W* __restrict__ weight, float epsilon, int width, T* out,
                    T* sum) {
  constexpr int kCount = Layout<T, kWide>::kCount, kHeld = Layout<T, kWide>::kHeld;
  const int64_t start = static_cast<int64_t>(blockIdx.x) * width;
  float values[kHeld][kCount], squares = 0.0f;
  Pack<T, kCount> first[kHeld], second[kHeld];
#pragma unroll
  for (int k = 0; k < kHeld; ++k) {
    const int column = min((static_cast<int>(threadIdx.x) + k * static_cast<int>(blockDim.x)) * kCount, width - kCount);
    first[k] = load<kCount>(x + start + column);
    if (residual) second[k] = load<kCount>(residual + start + column);
  }
#pragma unroll
  for (int k = 0; k < kHeld; ++k) {
    const int column = (threadIdx.x + k * blockDim.x) * kCount;
    to_floats(first[k], values[k]);
    if (residual) {
      float other[kCount];
      to_floats(second[k], other);
#pragma unroll
      for (int j = 0; j < kCount; ++j) values[k][j] += other[j];
    }
    if (column >= width) continue;
#pragma unroll
    for (int j = 0; j < kCount; ++j) squares += values[k][j] * values[k][j];
    if (sum) store(from_floats<T>(values[k]), sum + start + column);
  }
  const float scale = inverse_rms(block_sum(squares), width, epsilon);
#pragma unroll
  for (int k = 0; k < kHeld; ++k) {
    const int column = (threadIdx.x + k * blockDim.x) * kCount;
    if (column >= width) continue;
    float factors[kCount];
    load_floats(weight + column, factors);
#pragma unroll
    for (int j = 0; j < kCount; ++j) factors[j] = values[k][j] * scale * factors[j];
    store(from_floats<T>(factors), out + start + column);
  }
}

// For how many threads the compiler has to share out the registers. Of half types, more than there are: with at most 96
// registers each, four blocks of the usual widths fit on a multiprocessor.
template <typename T, bool kWide>
constexpr int grad_bound() {
  return kWide && sizeof(T) == 2 ? 640 : Layout<T, kWide>::kMaxThreads;
}

// One block takes every gridDim.x-th row and sums the gradient of the weight over them: its row of `parts`. The next row
// is on its way while this one is computed. Rows stay as they were loaded, and the sums are in shared memory, where a
// thread only touches its own, because registers are
// scarce. For the same reason, nothing says that the weight does not overlap grad_x: it is read again for every row.
template <typename T, typename W, bool kWide>
__global__ void __launch_bounds__(grad_bound<T, kWide>())
    rms_norm_grad_kernel(const T* __restrict__ x, const W* weight, const T* __restrict__ grad_out,
                         const T* __restrict__ grad_sum, float epsilon, int rows, int width, float* parts, T* grad_x) {
  constexpr int kCount = Layout<T, kWide>::kCount, kHeld = Layout<T, kWide>::kHeld;
  const int threads = blockDim.x, step = threads * kCount, first = threadIdx.x * kCount;
  // The sums of vector k are kParts packs of kPart, the first of them k * kParts * threads packs further.
  constexpr int kPart = kCount < 4 ? kCount : 4, kParts = kCount / kPart;
  auto* totals = reinterpret_cast<Pack<float, kPart>*>(dynamic_shared()) + threadIdx.x;
#pragma unroll
  for (int i = 0; i < kHeld * kParts; ++i) totals[i * threads] = {};
  Pack<T, kCount> next_x[kHeld], next_grad[kHeld];
  const auto prefetch = [&](int row) {
    const T *row_x = x + static_cast<int64_t>(row) * width, *row_grad = grad_out + static_cast<int64_t>(row) * width;
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
      const int column = min(first + k * step, width - kCount);
      next_x[k] = load<kCount>(row_x + column);
      next_grad[k] = load<kCount>(row_grad + column);
    }
  };
  prefetch(blockIdx.x);
  for (int row = blockIdx.x; row < rows; row += gridDim.x) {
    Pack<T, kCount> this_x[kHeld], this_grad[kHeld];
#pragma unroll
    for (int k = 0; k < kHeld; ++k) this_x[k] = next_x[k], this_grad[k] = next_grad[k];
    prefetch(row + static_cast<int>(gridDim.x) < rows ? row + gridDim.x : row);
    float squares = 0.0f, dot = 0.0f;
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
      const int column = first + k * step;
      if (column >= width) continue;
      float factors[kCount];
      load_floats(weight + column, factors);
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        const float value = to_float(this_x[k].values[j]);
        squares += value * value;
        dot += factors[j] * to_float(this_grad[k].values[j]) * value;
      }
    }
    const float2 sums = block_sums(squares, dot);
    const float scale = inverse_rms(sums.x, width, epsilon);
    const float along = __fdividef(sums.y * scale * scale, static_cast<float>(width));
    const int64_t start = static_cast<int64_t>(row) * width;
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
      const int column = first + k * step;
      if (column >= width) continue;
      float factors[kCount], result[kCount] = {};
      load_floats(weight + column, factors);
      if (grad_sum) load_floats(grad_sum + start + column, result);
#pragma unroll
      for (int i = 0; i < kParts; ++i) {
        Pack<float, kPart> total = totals[(k * kParts + i) * threads];
#pragma unroll
        for (int j = 0; j < kPart; ++j) {
          const int at = i * kPart + j;
          const float normed = to_float(this_x[k].values[at]) * scale, grad = to_float(this_grad[k].values[at]);
          total.values[j] += grad * normed;
          result[at] = result[at] + scale * (factors[at] * grad) - along * normed;
        }
        totals[(k * kParts + i) * threads] = total;
      }
      store(from_floats<T>(result), grad_x + start + column);
    }
  }
  float* to = parts + static_cast<int64_t>(blockIdx.x) * width;
#pragma unroll
  for (int i = 0; i < kHeld * kParts; ++i) {
    const int column = first + i / kParts * step + i % kParts * kPart;
    if (column < width) store(totals[i * threads], to + column);
  }
}

constexpr int kGroups = 16;

// out [width] = the sum of the rows of parts [count, width], a warp's width of columns for each block. Groups of threads
// take every kGroups-th row.
template <typename W>
__global__ void __launch_bounds__(kWarp * kGroups)
    sum_parts_kernel(const float* __restrict__ parts, int count, int width, W* __restrict__ out) {
  __shared__ float of_groups[kGroups][kWarp];
  const int lane = threadIdx.x, group = threadIdx.y, column = blockIdx.x * kWarp + lane;
  float sum = 0.0f;
  if (column < width) {
#pragma unroll 4
    for (int row = group; row < count; row += kGroups) sum += parts[static_cast<int64_t>(row) * width + column];
  }
  of_groups[group][lane] = sum;
  __syncthreads();
  if (group > 0 || column >= width) return;
  for (int i = 1; i < kGroups; ++i) sum += of_groups[i][lane];
  out[column] = from_float<W>(sum);
}

template <typename T, typename W, bool kWide>
cudaError_t rms_norm(const void* x, const void* residual, const void* weight, float epsilon, int64_t rows,
                     int64_t width, void* out, void* sum, cudaStream_t stream) {
  return launch(rms_norm_kernel<T, W, kWide>, static_cast<unsigned>(rows), Layout<T, kWide>::threads(width), 0, stream,
                static_cast<const T*>(x), static_cast<const T*>(residual), static_cast<const W*>(weight), epsilon,
                static_cast<int>(width), static_cast<T*>(out), static_cast<T*>(sum));
}

template <typename T, typename W>
cudaError_t rms_norm(const void* x, const void* residual, const void* weight, float epsilon, int64_t rows,
                     int64_t width, void* out, void* sum, cudaStream_t stream) {
  const bool wide = width % kLanes<T> == 0 && aligned(x, residual, weight, out, sum);
  if (!wide && width > kMaxNarrowWidth) return cudaErrorInvalidValue;
  const auto run = wide ? rms_norm<T, W, true> : rms_norm<T, W, false>;
  return run(x, residual, weight, epsilon, rows, width, out, sum, stream);
}

// As many blocks as a device holds at once if their threads need about 100 registers; not more, because each of them
// writes a row of parts.
template <typename T>
int64_t grad_blocks(int64_t rows, int64_t width) {
  const int64_t threads = Layout<T, true>::threads(width);
  return std::min(rows, multiprocessors() * std::max<int64_t>(1, 640 / threads));
}

template <typename T, typename W, bool kWide>
cudaError_t rms_norm_grad(const void* x, const void* weight, const void* grad_out, const void* grad_sum, float epsilon,
                          int64_t rows, int64_t width, float* parts, void* grad_x, void* grad_weight,
                          cudaStream_t stream) {
  using Held = Layout<T, kWide>;
  const auto blocks = static_cast<unsigned>(grad_blocks<T>(rows, width));
  const unsigned threads = Held::threads(width);
  const size_t totals = threads * Held::kHeld * Held::kCount * sizeof(float);
  const cudaError_t error =
      launch(rms_norm_grad_kernel<T, W, kWide>, blocks, threads, totals, stream, static_cast<const T*>(x),
             static_cast<const W*>(weight), static_cast<const T*>(grad_out), static_cast<const T*>(grad_sum), epsilon,
             static_cast<int>(rows), static_cast<int>(width), parts, static_cast<T*>(grad_x));
  if (error != cudaSuccess) return error;
  return launch(sum_parts_kernel<W>, static_cast<unsigned>(ceil_div(width, kWarp)), dim3(kWarp, kGroups), 0, stream,
                parts, static_cast<int>(blocks), static_cast<int>(width), static_cast<W*>(grad_weight));
}

template <typename T, typename W>
cudaError_t rms_norm_grad(const void* x, const void* weight, const void* grad_out, const void* grad_sum, float epsilon,
                          int64_t rows, int64_t width, float* parts, void* grad_x, void* grad_weight,
                          cudaStream_t stream) {
  if (rows == 0) return cudaMemsetAsync(grad_weight, 0, width * sizeof(W), stream);
  const bool wide = width % kLanes<T> == 0 && aligned(x, weight, grad_out, grad_sum, grad_x);
  if (!wide && width > kMaxNarrowWidth) return cudaErrorInvalidValue;
  const auto run = wide ? rms_norm_grad<T, W, true> : rms_norm_grad<T, W, false>;
  return run(x, weight, grad_out, grad_sum, epsilon, rows, width, parts, grad_x, grad_weight, stream);
}

bool valid(int64_t rows, int64_t width, int dtype, int weight_dtype) {
  return rows >= 0 && rows <= 0x7fffffff && width >= 0 && width <= kMaxWidth &&
         (weight_dtype == dtype || weight_dtype == kErnieFloat32);
}

}  // namespace
}  // namespace ernie::cuda

cudaError_t ernie45_cuda_rms_norm(const void* x, const void* residual, const void* weight, float epsilon, int64_t rows,
                                  int64_t width, int dtype, int weight_dtype, void* out, void* sum,
                                  cudaStream_t stream) {
  using namespace ernie::cuda;
  if (!valid(rows, width, dtype, weight_dtype)) return cudaErrorInvalidValue;
  if (rows == 0 || width == 0) return cudaSuccess;
  return ERNIE45_FOR_FLOAT_TYPE(dtype, (weight_dtype == dtype ? rms_norm<T, T> : rms_norm<T, float>)(
                                           x, residual, weight, epsilon, rows, width, out, sum, stream));
}

int64_t ernie45_cuda_rms_norm_grad_parts(int64_t rows, int64_t width, int dtype) {
  using namespace ernie::cuda;
  if (rows <= 0 || width <= 0) return 0;
  return dtype == kErnieFloat32 ? grad_blocks<float>(rows, width) : grad_blocks<__nv_bfloat16>(rows, width);
}

cudaError_t ernie45_cuda_rms_norm_grad(const void* x, const void* weight, const void* grad_out, const void* grad_sum,
                                       float epsilon, int64_t rows, int64_t width, int dtype, int weight_dtype,
                                       float* parts, void* grad_x, void* grad_weight, cudaStream_t stream) {
  using namespace ernie::cuda;
  if (!valid(rows, width, dtype, weight_dtype)) return cudaErrorInvalidValue;
  if (width == 0) return cudaSuccess;
  return ERNIE45_FOR_FLOAT_TYPE(dtype, (weight_dtype == dtype ? rms_norm_grad<T, T> : rms_norm_grad<T, float>)(
                                           x, weight, grad_out, grad_sum, epsilon, rows, width, parts, grad_x,
                                           grad_weight, stream));
}

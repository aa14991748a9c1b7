#include "moe_rows.h"

#include "device.cuh"

namespace ernie::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
// Told that more blocks than these gain nothing, the compiler issues all loads of a thread before their first use; left
// to itself, it saves registers.
constexpr int kBlocksPerMultiprocessor = 4;
constexpr int64_t kMost = 1 << 30;

struct Sizes {
  int tokens, k, rows, hidden;
};

__device__ __forceinline__ uint32_t warp_of_grid() { return blockIdx.x * kWarps + threadIdx.x / kWarp; }
__device__ __forceinline__ int lane_of_warp() { return threadIdx.x % kWarp; }

unsigned blocks_of(int64_t warps) { return static_cast<unsigned>(ceil_div(warps, kWarps)); }

// The share of a warp: kHeld vectors per lane of one row, a vector being what is loaded at once. Warps take the
// segments of one row after the other.
template <int kHeld>
struct Segment {
  int64_t row;
  int first, vectors;  // the first vector of this lane; all of the row

  __device__ __forceinline__ Segment(Divisor segments, int vectors) : vectors(vectors) {
    const uint32_t warp = warp_of_grid(), quotient = segments.quotient(warp);
    row = quotient;
    first = (warp - quotient * segments.divisor) * (kWarp * kHeld) + lane_of_warp();
  }

  __device__ __forceinline__ bool has(int i) const { return first + i * kWarp < vectors; }
  // Where vector i of this lane is in a tensor of such rows, counted in vectors.
  __device__ __forceinline__ int64_t in_row(int64_t row, int i) const { return row * vectors + first + i * kWarp; }

  static int64_t per_row(int64_t vectors) { return ceil_div(vectors, kWarp * kHeld); }
};

__device__ __forceinline__ int kept(int64_t slot, int rows) {
  return 0 <= slot && slot < rows ? static_cast<int>(slot) : -1;
}

// The slot of the choice whose number among those of its token is the lane's, or -1 if that was dropped or is none.
__device__ __forceinline__ int slot_of_lane(const int64_t* slots, int64_t token, const Sizes& sizes) {
  return lane_of_warp() < sizes.k ? kept(slots[token * sizes.k + lane_of_warp()], sizes.rows) : -1;
}

// Numbers, one per choice, whose type is known when the kernel runs. Without data, all are 1.
struct Weights {
  void* data;
  int dtype;

  __device__ __forceinline__ float operator[](int64_t i) const {
    if (!data) return 1.0f;
    if (dtype == kErnieFloat16) return to_float(static_cast<const __half*>(data)[i]);
    if (dtype == kErnieBFloat16) return to_float(static_cast<const __nv_bfloat16*>(data)[i]);
    return static_cast<const float*>(data)[i];
  }

  __device__ __forceinline__ void set(int64_t i, float value) const {
    if (dtype == kErnieFloat16) {
      static_cast<__half*>(data)[i] = from_float<__half>(value);
    } else if (dtype == kErnieBFloat16) {
      static_cast<__nv_bfloat16*>(data)[i] = from_float<__nv_bfloat16>(value);
    } else {
      static_cast<float*>(data)[i] = value;
    }
  }
};

// Copying. What the bytes mean does not matter: a vector is one Word.

constexpr int kCopied = 4;

template <typename Word>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    permute_kernel(const Word* __restrict__ x, const int64_t* __restrict__ slots, Sizes sizes, int vectors,
                   Divisor segments, Word* __restrict__ out) {
  const Segment<kCopied> at(segments, vectors);
  if (at.row >= sizes.tokens) return;
  Word words[kCopied];
#pragma unroll
  for (int i = 0; i < kCopied; ++i)
    if (at.has(i)) words[i] = x[at.in_row(at.row, i)];
  const int slot_here = slot_of_lane(slots, at.row, sizes);
  for (unsigned left = __ballot_sync(kAllLanes, slot_here >= 0); left != 0; left &= left - 1) {
    const int slot = __shfl_sync(kAllLanes, slot_here, __ffs(left) - 1);
#pragma unroll
    for (int i = 0; i < kCopied; ++i)
      if (at.has(i)) out[at.in_row(slot, i)] = words[i];
  }
}

// Rows that one warp looks at. They lie apart: those without a token are neighbours, and many warps shall share them.
constexpr int kLookedAt = 8;

template <typename Word>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    clear_kernel(const int* __restrict__ sources, int rows, int vectors, Word* __restrict__ out) {
  const int lane = lane_of_warp();
  const int64_t step = static_cast<int64_t>(gridDim.x) * kWarps, mine = warp_of_grid() + lane * step;
  const bool empty = lane < kLookedAt && mine < rows && sources[mine] < 0;
  for (unsigned left = __ballot_sync(kAllLanes, empty); left != 0; left &= left - 1) {
    Word* row = out + (warp_of_grid() + (__ffs(left) - 1) * step) * vectors;
    for (int i = lane; i < vectors; i += kWarp) row[i] = Word{};
  }
}

// Calls call(word, vectors) with the largest type in which rows at an address can be copied, and how many they have.
template <typename Call>
cudaError_t for_word(int64_t row_bytes, int element_bytes, bool is_aligned, Call call) {
  if (is_aligned && row_bytes % kVectorBytes == 0) return call(uint4(), row_bytes / kVectorBytes);
  if (element_bytes == 1) return call(uint8_t(), row_bytes);
  if (element_bytes == 2) return call(uint16_t(), row_bytes / 2);
  return call(uint32_t(), row_bytes / 4);
}

int bytes_of(int dtype) { return dtype == kErnieFloat32 ? 4 : dtype == kErnieFloat8E4M3 ? 1 : 2; }

// Makes the rows without a token zeros.
cudaError_t clear(const int* sources, const Sizes& sizes, int dtype, void* out, cudaStream_t stream) {
  if (!sources) return cudaSuccess;
  const int bytes = bytes_of(dtype);
  return for_word(static_cast<int64_t>(sizes.hidden) * bytes, bytes, aligned(out), [&](auto word, int64_t vectors) {
    return launch(clear_kernel<decltype(word)>, blocks_of(ceil_div(sizes.rows, kLookedAt)), kThreads, 0, stream,
                  sources, sizes.rows, vectors, static_cast<decltype(word)*>(out));
  });
}

cudaError_t permute(const void* x, const int64_t* slots, const Sizes& sizes, int dtype, void* out,
                    cudaStream_t stream) {
  const int bytes = bytes_of(dtype);
  const int64_t row_bytes = static_cast<int64_t>(sizes.hidden) * bytes;
  return for_word(row_bytes, bytes, aligned(x, out), [&](auto word, int64_t vectors) {
    using Word = decltype(word);
    const int64_t segments = Segment<kCopied>::per_row(vectors), warps = sizes.tokens * segments;
    if (warps > kMost) return cudaErrorInvalidValue;
    return launch(permute_kernel<Word>, blocks_of(warps), kThreads, 0, stream, static_cast<const Word*>(x), slots,
                  sizes, vectors, Divisor(segments), static_cast<Word*>(out));
  });
}

// Sums

// As `store`, but surely in one instruction: nvcc splits some stores of what it has just computed.
template <typename T, int kCount>
__device__ __forceinline__ void store_whole(const Pack<T, kCount>& pack, T* to) {
  using Word = typename detail::Word<static_cast<int>(sizeof(pack))>::Type;
  Word word;
  memcpy(&word, &pack, sizeof(word));
  __stcg(reinterpret_cast<Word*>(to), word);
}

// Vectors of a lane, and rows that are loaded before the first is used.
constexpr int kSummed = 2;
constexpr int kRowsInFlight = 4;

template <typename T, int kCount>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    combine_kernel(const T* __restrict__ x, const int64_t* __restrict__ slots, Weights weights, Sizes sizes,
                   int vectors, Divisor segments, T* __restrict__ out) {
  const Segment<kSummed> at(segments, vectors);
  if (at.row >= sizes.tokens) return;
  const int slot_here = slot_of_lane(slots, at.row, sizes);
  const float weight_here = weights[at.row * sizes.k + min(lane_of_warp(), sizes.k - 1)];
  float sums[kSummed][kCount] = {};
  for (int j = 0; j < sizes.k; j += kRowsInFlight) {
    Pack<T, kCount> packs[kRowsInFlight][kSummed] = {};
    float factors[kRowsInFlight];
#pragma unroll
    for (int r = 0; r < kRowsInFlight; ++r) {
      const int slot = __shfl_sync(kAllLanes, slot_here, j + r);
      const float weight = __shfl_sync(kAllLanes, weight_here, j + r);
      factors[r] = slot >= 0 ? weight : 0.0f;
#pragma unroll
      for (int i = 0; i < kSummed; ++i)
        if (slot >= 0 && at.has(i)) packs[r][i] = load<kCount>(x + at.in_row(slot, i) * kCount);
    }
#pragma unroll
    for (int r = 0; r < kRowsInFlight; ++r) {
#pragma unroll
      for (int i = 0; i < kSummed; ++i) {
        float values[kCount];
        to_floats(packs[r][i], values);
#pragma unroll
        for (int c = 0; c < kCount; ++c) sums[i][c] += factors[r] * values[c];
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kSummed; ++i)
    if (at.has(i)) store_whole(from_floats<T>(sums[i]), out + at.in_row(at.row, i) * kCount);
}

// Vectors of a lane, of the row and of the gradient, that are loaded before the first is used.
constexpr int kMultiplied = 4;

// A warp takes one choice, next to the others of its token: all but the first find the gradient in a cache.
template <typename T, int kCount>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    combine_grad_kernel(const T* __restrict__ x, const int64_t* __restrict__ slots, Weights weights,
                        const T* __restrict__ grad_out, Sizes sizes, int vectors, Divisor k, T* __restrict__ grad_x,
                        Weights grad_weights) {
  const uint32_t choice = warp_of_grid();
  const int64_t token = k.quotient(choice);
  if (token >= sizes.tokens) return;
  const int lane = lane_of_warp(), slot = kept(slots[choice], sizes.rows);
  const float weight = weights[choice];
  const T* grad = grad_out + token * vectors * kCount;
  const int64_t row = static_cast<int64_t>(slot) * vectors * kCount;
  float dot = 0.0f;
  for (int first = 0; slot >= 0 && first < vectors; first += kWarp * kMultiplied) {
    Pack<T, kCount> grads[kMultiplied] = {}, rows[kMultiplied] = {};
#pragma unroll
    for (int i = 0; i < kMultiplied; ++i) {
      const int64_t vector = first + i * kWarp + lane;
      if (vector >= vectors) continue;
      grads[i] = load<kCount>(grad + vector * kCount);
      rows[i] = load<kCount>(x + row + vector * kCount);
    }
#pragma unroll
    for (int i = 0; i < kMultiplied; ++i) {
      const int64_t vector = first + i * kWarp + lane;
      float of_grad[kCount], of_row[kCount];
      to_floats(grads[i], of_grad);
      to_floats(rows[i], of_row);
#pragma unroll
      for (int c = 0; c < kCount; ++c) {
        dot += of_grad[c] * of_row[c];
        of_grad[c] *= weight;
      }
      if (vector < vectors) store_whole(from_floats<T>(of_grad), grad_x + row + vector * kCount);
    }
  }
  dot = warp_sum(dot);
  if (lane == 0) grad_weights.set(choice, dot);
}

template <typename T, int kCount>
cudaError_t combine(const void* x, const int64_t* slots, const Weights& weights, const Sizes& sizes, void* out,
                    cudaStream_t stream) {
  const int vectors = sizes.hidden / kCount;
  const int64_t segments = Segment<kSummed>::per_row(vectors), warps = sizes.tokens * segments;
  if (warps > kMost) return cudaErrorInvalidValue;
  return launch(combine_kernel<T, kCount>, blocks_of(warps), kThreads, 0, stream, static_cast<const T*>(x), slots,
                weights, sizes, vectors, Divisor(segments), static_cast<T*>(out));
}

cudaError_t combine(const void* x, const int64_t* slots, const Weights& weights, const Sizes& sizes, int dtype,
                    void* out, cudaStream_t stream) {
  if (sizes.tokens == 0 || sizes.hidden == 0) return cudaSuccess;
  return ERNIE45_FOR_FLOAT_TYPE(dtype, aligned(x, out) && sizes.hidden % kLanes<T> == 0
                                           ? combine<T, kLanes<T>>(x, slots, weights, sizes, out, stream)
                                           : combine<T, 1>(x, slots, weights, sizes, out, stream));
}

template <typename T, int kCount>
cudaError_t combine_grad(const void* x, const int64_t* slots, const Weights& weights, const void* grad_out,
                         const Sizes& sizes, void* grad_x, const Weights& grad_weights, cudaStream_t stream) {
  return launch(combine_grad_kernel<T, kCount>, blocks_of(int64_t{sizes.tokens} * sizes.k), kThreads, 0, stream,
                static_cast<const T*>(x), slots, weights, static_cast<const T*>(grad_out), sizes,
                sizes.hidden / kCount, Divisor(sizes.k), static_cast<T*>(grad_x), grad_weights);
}

bool accepted(int64_t tokens, int64_t k, int64_t hidden, int64_t rows) {
  return 0 <= tokens && 0 < k && k <= kWarp && tokens <= kMost / k && 0 <= hidden && hidden <= kMost && 0 <= rows &&
         rows <= kMost;
}

bool is_float(int dtype) { return dtype == kErnieFloat32 || dtype == kErnieFloat16 || dtype == kErnieBFloat16; }

Sizes sizes_of(int64_t tokens, int64_t k, int64_t hidden, int64_t rows) {
  return {static_cast<int>(tokens), static_cast<int>(k), static_cast<int>(rows), static_cast<int>(hidden)};
}

}  // namespace
}  // namespace ernie::cuda

cudaError_t ernie45_cuda_moe_permute(const void* x, const int64_t* slots, const int* sources, int64_t tokens, int64_t k,
                                     int64_t hidden, int64_t rows, int dtype, void* out, cudaStream_t stream) {
  using namespace ernie::cuda;
  if (!accepted(tokens, k, hidden, rows)) return cudaErrorInvalidValue;
  if (!is_float(dtype) && dtype != kErnieFloat8E4M3) return cudaErrorInvalidValue;
  if (hidden == 0) return cudaSuccess;
  const Sizes sizes = sizes_of(tokens, k, hidden, rows);
  const cudaError_t error = clear(sources, sizes, dtype, out, stream);
  return error == cudaSuccess ? permute(x, slots, sizes, dtype, out, stream) : error;
}

cudaError_t ernie45_cuda_moe_permute_grad(const void* grad_out, const int64_t* slots, int64_t tokens, int64_t k,
                                          int64_t hidden, int64_t rows, int dtype, void* grad_x,
                                          cudaStream_t stream) {
  using namespace ernie::cuda;
  if (!accepted(tokens, k, hidden, rows) || !is_float(dtype)) return cudaErrorInvalidValue;
  return combine(grad_out, slots, {nullptr, kErnieFloat32}, sizes_of(tokens, k, hidden, rows), dtype, grad_x, stream);
}

cudaError_t ernie45_cuda_moe_combine(const void* x, const int64_t* slots, const void* weights, int64_t tokens,
                                     int64_t k, int64_t hidden, int64_t rows, int dtype, int weights_dtype, void* out,
                                     cudaStream_t stream) {
  using namespace ernie::cuda;
  if (!accepted(tokens, k, hidden, rows) || !is_float(dtype) || !is_float(weights_dtype)) return cudaErrorInvalidValue;
  return combine(x, slots, {const_cast<void*>(weights), weights_dtype}, sizes_of(tokens, k, hidden, rows), dtype, out,
                 stream);
}

cudaError_t ernie45_cuda_moe_combine_grad(const void* x, const int64_t* slots, const void* weights,
                                          const void* grad_out, const int* sources, int64_t tokens, int64_t k,
                                          int64_t hidden, int64_t rows, int dtype, int weights_dtype, void* grad_x,
                                          void* grad_weights, cudaStream_t stream) {
  using namespace ernie::cuda;
  if (!accepted(tokens, k, hidden, rows) || !is_float(dtype) || !is_float(weights_dtype)) return cudaErrorInvalidValue;
  const Sizes sizes = sizes_of(tokens, k, hidden, rows);
  const cudaError_t error = clear(sources, sizes, dtype, grad_x, stream);
  if (error != cudaSuccess) return error;
  const Weights by{const_cast<void*>(weights), weights_dtype}, to{grad_weights, weights_dtype};
  const bool wide = aligned(x, grad_out, grad_x);
  return ERNIE45_FOR_FLOAT_TYPE(
      dtype, wide && hidden % kLanes<T> == 0
                 ? combine_grad<T, kLanes<T>>(x, slots, by, grad_out, sizes, grad_x, to, stream)
                 : combine_grad<T, 1>(x, slots, by, grad_out, sizes, grad_x, to, stream));
}

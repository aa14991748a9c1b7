// What kernels share: conversions, wide loads and stores, reductions, the division of indices, and launching.
//
// The same file is compiled by nvcc and, for tests without a GPU, by a C++ compiler that emulates CUDA. So there is no
// <<<>>> (see `launch`) and no `extern __shared__` (see `dynamic_shared`) elsewhere, and PTX has a twin in C++.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstring>
#include <type_traits>

#include "types.h"

namespace ernie::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
// One load or store of a thread: the widest that the memory system takes.
constexpr int kVectorBytes = 16;

template <typename T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Conversions. Narrowing rounds to the nearest or, of two as near, the even one.

// An OCP E4M3 code: 4 bits of exponent, 3 of mantissa, no infinity, NaN 0x7f and 0xff.
struct Float8 {
  uint8_t code;
};

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

// Its bits, moved to those of a float32, are its value times 2^-120, also where it is subnormal.
__device__ __forceinline__ float to_float(Float8 x) {
  const uint32_t sign = static_cast<uint32_t>(x.code & 0x80) << 24;
  if ((x.code & 0x7f) == 0x7f) return __uint_as_float(sign | 0x7fffffffu);
  return __uint_as_float(sign | static_cast<uint32_t>(x.code & 0x7f) << 20) * 0x1p120f;
}

// What is beyond +-448, infinity too, becomes +-448; NaN becomes 0x7f.
__device__ __forceinline__ Float8 to_float8(float x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  uint16_t pair;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(0.0f), "f"(x));
  return {static_cast<uint8_t>(pair)};
#else
  const uint32_t bits = __float_as_uint(x), magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {0x7f};
  uint32_t code;
  if (magnitude >= 0x43e00000u) {  // 448
    code = 0x7e;
  } else if (magnitude < 0x3c800000u) {  // 2^-6: below, steps are 2^-9, as those of float32 are at 2^14
    code = __float_as_uint(__uint_as_float(magnitude) + 16384.0f) - 0x46800000u;
  } else {
    code = ((magnitude + 0x7ffffu + (magnitude >> 20 & 1)) >> 20) - (120u << 3);
  }
  return {static_cast<uint8_t>(code | (bits >> 24 & 0x80))};
#endif
}

template <typename T>
__device__ __forceinline__ T from_float(float x) {
  if constexpr (std::is_same_v<T, float>) {
    return x;
  } else if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(x);
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(x);
  } else {
    static_assert(std::is_same_v<T, Float8>);
    return to_float8(x);
  }
}

// 1 / (1 + exp(-x)) for an x that was read as a T. The approximate exponential errs by |x| + 2 units of float32's last
// place, far below what float16 and bfloat16 show; with the exact one, arithmetic would bound them and not memory.
template <typename T>
__device__ __forceinline__ float sigmoid(float x) {
  const float power = std::is_same_v<T, float> ? expf(-x) : __expf(-x);
  return __fdividef(1.0f, 1.0f + power);
}

// Wide loads and stores

// kCount elements that are loaded and stored at once; of 16 bytes, one instruction.
template <typename T, int kCount>
struct alignas(sizeof(T) * kCount) Pack {
  T values[kCount];
};

namespace detail {
template <int kBytes>
struct Word;
template <>
struct Word<1> { using Type = uint8_t; };
template <>
struct Word<2> { using Type = uint16_t; };
template <>
struct Word<4> { using Type = uint32_t; };
template <>
struct Word<8> { using Type = uint2; };
template <>
struct Word<16> { using Type = uint4; };
}  // namespace detail

// `from` is a multiple of the size of the pack, which has at most 16 bytes.
template <int kCount, typename T>
__device__ __forceinline__ Pack<T, kCount> load(const T* from) {
  using Word = typename detail::Word<static_cast<int>(sizeof(T)) * kCount>::Type;
  const Word word = *reinterpret_cast<const Word*>(from);
  Pack<T, kCount> pack;
  memcpy(&pack, &word, sizeof(word));
  return pack;
}

template <typename T, int kCount>
__device__ __forceinline__ void store(const Pack<T, kCount>& pack, T* to) {
  using Word = typename detail::Word<static_cast<int>(sizeof(T)) * kCount>::Type;
  Word word;
  memcpy(&word, &pack, sizeof(word));
  *reinterpret_cast<Word*>(to) = word;
}

template <typename T, int kCount>
__device__ __forceinline__ void to_floats(const Pack<T, kCount>& pack, float (&values)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) values[i] = to_float(pack.values[i]);
}

// As float32, in as many loads of at most 16 bytes as it takes.
template <typename T, int kCount>
__device__ __forceinline__ void load_floats(const T* from, float (&values)[kCount]) {
  constexpr int kPart = kCount < kLanes<T> ? kCount : kLanes<T>;
#pragma unroll
  for (int i = 0; i < kCount; i += kPart) {
    const Pack<T, kPart> pack = load<kPart>(from + i);
#pragma unroll
    for (int j = 0; j < kPart; ++j) values[i + j] = to_float(pack.values[j]);
  }
}

// Pairs are narrowed by one instruction where there is one.
template <typename T, int kCount>
__device__ __forceinline__ Pack<T, kCount> from_floats(const float (&values)[kCount]) {
  Pack<T, kCount> pack;
  if constexpr (kCount % 2 == 0 && std::is_same_v<T, __nv_bfloat16>) {
#pragma unroll
    for (int i = 0; i < kCount; i += 2) {
      const __nv_bfloat162 pair = __floats2bfloat162_rn(values[i], values[i + 1]);
      pack.values[i] = pair.x, pack.values[i + 1] = pair.y;
    }
  } else if constexpr (kCount % 2 == 0 && std::is_same_v<T, __half>) {
#pragma unroll
    for (int i = 0; i < kCount; i += 2) {
      const __half2 pair = __floats2half2_rn(values[i], values[i + 1]);
      pack.values[i] = pair.x, pack.values[i + 1] = pair.y;
    }
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  } else if constexpr (kCount % 2 == 0 && std::is_same_v<T, Float8>) {
#pragma unroll
    for (int i = 0; i < kCount; i += 2) {
      uint16_t pair;
      asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(values[i + 1]), "f"(values[i]));
      memcpy(&pack.values[i], &pair, sizeof(pair));
    }
#endif
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) pack.values[i] = from_float<T>(values[i]);
  }
  return pack;
}

// Whether every pointer is a multiple of 16 bytes; null is.
template <typename... Pointers>
bool aligned(const Pointers*... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) % kVectorBytes == 0) && ...);
}

// Reductions. Every thread of the warp or block calls them, and every thread gets the result.

struct Sum {
  template <typename T>
  __device__ __forceinline__ T operator()(T a, T b) const { return a + b; }
  template <typename T>
  static __device__ __forceinline__ T identity() { return T(0); }
};

// NaN if any of them is, unlike fmaxf.
struct Max {
  __device__ __forceinline__ float operator()(float a, float b) const { return a > b || isnan(a) ? a : b; }
  template <typename T>
  static __device__ __forceinline__ float identity() { return -INFINITY; }
};

// Over groups of kWidth neighbouring lanes, a power of two.
template <typename Operation, int kWidth = kWarp, typename T>
__device__ __forceinline__ T warp_reduce(T value) {
#pragma unroll
  for (int step = kWidth / 2; step > 0; step /= 2) value = Operation()(value, __shfl_xor_sync(kAllLanes, value, step));
  return value;
}

// Over the threads of a block, a multiple of 32 of them along x alone. May be called again at once.
template <typename Operation, typename T>
__device__ __forceinline__ T block_reduce(T value) {
  __shared__ T of_warps[kWarp];
  value = warp_reduce<Operation>(value);
  const int warps = blockDim.x / kWarp, lane = threadIdx.x % kWarp;
  if (warps == 1) return value;
  __syncthreads();  // the results of a call before are read
  if (lane == 0) of_warps[threadIdx.x / kWarp] = value;
  __syncthreads();
  value = lane < warps ? of_warps[lane] : Operation::template identity<T>();
  return warp_reduce<Operation>(value);
}

template <typename T>
__device__ __forceinline__ T warp_sum(T value) { return warp_reduce<Sum>(value); }
template <typename T>
__device__ __forceinline__ T block_sum(T value) { return block_reduce<Sum>(value); }
__device__ __forceinline__ float warp_max(float value) { return warp_reduce<Max>(value); }
__device__ __forceinline__ float block_max(float value) { return block_reduce<Max>(value); }

// Division of indices below 2^31 by a number that only the host knows: a multiplication and a shift
// (Granlund and Montgomery, Division by Invariant Integers using Multiplication, 1994).
struct Divisor {
  uint32_t divisor, multiplier, shift;

  Divisor() = default;
  explicit Divisor(int64_t by) : divisor(static_cast<uint32_t>(by)), shift(0) {
    while (shift < 31 && (1u << shift) < divisor) ++shift;
    multiplier = static_cast<uint32_t>(((uint64_t{1} << 32) * ((uint64_t{1} << shift) - divisor)) / divisor + 1);
  }
  __device__ __forceinline__ uint32_t quotient(uint32_t n) const { return (__umulhi(n, multiplier) + n) >> shift; }
};

// Launching

// The bytes of shared memory that `launch` was asked for, aligned to 16.
__device__ __forceinline__ unsigned char* dynamic_shared() {
#if defined(__CUDACC__)
  extern __shared__ __align__(16) unsigned char bytes[];
  return bytes;
#else
  return ::cuda_emulator::dynamic_shared();
#endif
}

// Starts a kernel; an empty grid starts nothing. The arguments are converted to the kernel's parameters.
template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                   Arguments... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return cudaSuccess;
  if (shared_bytes > 48 * 1024) {  // more has to be asked for
    const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                   cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                   static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return error;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}

inline int multiprocessors() {
  int device = 0, count = 1;
  if (cudaGetDevice(&device) != cudaSuccess) return 1;
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
}

}  // namespace ernie::cuda

// Calls `call` with T as the C++ type of a float32, float16 or bfloat16 tag, and gives cudaErrorInvalidValue for others.
#define ERNIE45_FOR_FLOAT_TYPE(dtype, ...)                                  \
  [&]() -> cudaError_t {                                                    \
    switch (dtype) {                                                        \
      case kErnieFloat32: { using T = float; return __VA_ARGS__; }          \
      case kErnieFloat16: { using T = __half; return __VA_ARGS__; }         \
      case kErnieBFloat16: { using T = __nv_bfloat16; return __VA_ARGS__; } \
      default: return cudaErrorInvalidValue;                                \
    }                                                                       \
  }()

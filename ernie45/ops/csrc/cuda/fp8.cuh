// What the kernels that quantise to FP8 share: the scale of a block, and blocks of 1 x 128 in the lanes of a warp.
#pragma once

#include "device.cuh"

namespace ernie::cuda {
namespace {

constexpr int kFp8Block = 128;
constexpr float kLargestFp8 = 448.0f;

// Neighbouring lanes that hold a block of 1 x 128, each a vector of 16 bytes: 16, for float32 32.
template <typename T>
constexpr int kGroup = kFp8Block / kLanes<T>;

// Vectors are held in words of 32 bits: the compiler gives every element of a struct a register of its own.

// kLanes<T> elements.
using Vector = Pack<uint32_t, 4>;
// kCount codes.
template <int kCount>
using Codes = Pack<uint32_t, kCount / 4>;

template <typename T>
__device__ __forceinline__ float element(const Vector& vector, int i) {
  if constexpr (std::is_same_v<T, float>) return __uint_as_float(vector.values[i]);
  const uint32_t word = vector.values[i / 2];
  return __uint_as_float(i % 2 ? word & 0xffff0000u : word << 16);
}

template <typename T>
__device__ __forceinline__ void to_floats(const Vector& vector, float (&values)[kLanes<T>]) {
#pragma unroll
  for (int i = 0; i < kLanes<T>; ++i) values[i] = element<T>(vector, i);
}

// Of a vector's elements the first `count`, which may be negative or more than there are, and 0 for the others. Where
// rows are whole vectors (kWide), it is all or none.
template <bool kWide, typename T>
__device__ __forceinline__ Vector load_first(const T* from, int64_t count) {
  Vector vector{};
  if constexpr (kWide) {
    if (count > 0) vector = load<4>(reinterpret_cast<const uint32_t*>(from));
  } else {
    using Bits = std::conditional_t<sizeof(T) == 2, uint16_t, uint32_t>;
    constexpr int kBits = 8 * sizeof(T);
#pragma unroll
    for (int i = 0; i < kLanes<T>; ++i) {
      const uint32_t bits = i < count ? reinterpret_cast<const Bits*>(from)[i] : 0;
      vector.values[i * kBits / 32] |= bits << (i * kBits % 32);
    }
  }
  return vector;
}

template <bool kWide, int kCount>
__device__ __forceinline__ void store_first(const Pack<uint32_t, kCount>& codes, uint8_t* to, int64_t count) {
  if constexpr (kWide) {
    if (count > 0) store(codes, reinterpret_cast<uint32_t*>(to));
  } else {
#pragma unroll
    for (int i = 0; i < 4 * kCount; ++i) {
      if (i < count) to[i] = static_cast<uint8_t>(codes.values[i / 4] >> (i % 4 * 8));
    }
  }
}

// Of numbers that are not NaN.
struct Larger {
  __device__ __forceinline__ float operator()(float a, float b) const { return fmaxf(a, b); }
  template <typename T>
  static __device__ __forceinline__ float identity() { return 0.0f; }
};

// The largest magnitude; NaN and infinity count as 0.
template <int kCount>
__device__ __forceinline__ float largest_finite(const float (&values)[kCount]) {
  float largest = 0.0f;
#pragma unroll
  for (int i = 0; i < kCount; ++i) largest = fmaxf(largest, fabsf(values[i]));  // which passes over NaN
  if (largest < INFINITY) return largest;
  largest = 0.0f;
#pragma unroll
  for (int i = 0; i < kCount; ++i) largest = fmaxf(largest, isinf(values[i]) ? 0.0f : fabsf(values[i]));
  return largest;
}

__device__ __forceinline__ float scale_for(float largest, bool power_of_two) {
  if (largest == 0.0f) return 1.0f;
  if (power_of_two) {
    // 448 is 1.75 * 2^8: subtract 8 from the exponent, after adding 1 to it where the mantissa is above 1.75.
    const uint32_t exponent = (__float_as_uint(largest) + 0x1fffff) >> 23;
    return __uint_as_float((exponent > 9 ? exponent - 8 : 1) << 23);
  }
  return fmaxf(largest / kLargestFp8, 0x1p-126f);
}

__device__ __forceinline__ uint32_t encode_four(float a, float b, float c, float d) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  uint32_t word;
  asm("{\n.reg .b16 low, high;\n"
      "cvt.rn.satfinite.e4m3x2.f32 low, %2, %1;\n"
      "cvt.rn.satfinite.e4m3x2.f32 high, %4, %3;\n"
      "mov.b32 %0, {low, high};\n}"
      : "=r"(word)
      : "f"(a), "f"(b), "f"(c), "f"(d));
  return word;
#else
  return to_float8(a).code | to_float8(b).code << 8 | to_float8(c).code << 16 | uint32_t{to_float8(d).code} << 24;
#endif
}

// The codes of values times a factor, the reciprocal of their scale.
template <int kCount>
__device__ __forceinline__ Codes<kCount> encode(const float (&values)[kCount], float factor) {
  Codes<kCount> codes;
#pragma unroll
  for (int i = 0; i < kCount; i += 4) {
    codes.values[i / 4] = encode_four(values[i] * factor, values[i + 1] * factor, values[i + 2] * factor,
                                      values[i + 3] * factor);
  }
  return codes;
}

// The codes of a block of which each lane of a group holds a part, and its scale.
template <int kLanesOfGroup, int kCount>
__device__ __forceinline__ Codes<kCount> encode_block(const float (&values)[kCount], bool power_of_two, float& scale) {
  scale = scale_for(warp_reduce<Larger, kLanesOfGroup>(largest_finite(values)), power_of_two);
  return encode(values, 1.0f / scale);
}

}  // namespace
}  // namespace ernie::cuda

// As ERNIE45_FOR_FLOAT_TYPE, for the types that the definition takes.
#define ERNIE45_FOR_FP8_SOURCE(dtype, ...)                                  \
  [&]() -> cudaError_t {                                                    \
    switch (dtype) {                                                        \
      case kErnieFloat32: { using T = float; return __VA_ARGS__; }          \
      case kErnieBFloat16: { using T = __nv_bfloat16; return __VA_ARGS__; } \
      default: return cudaErrorInvalidValue;                                \
    }                                                                       \
  }()

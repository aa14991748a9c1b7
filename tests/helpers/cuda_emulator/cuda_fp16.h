// float16: 5 bits of exponent, 10 of mantissa.
#pragma once

#include <cstdint>
#include <cstring>

struct __half {
  uint16_t bits;
};
struct alignas(4) __half2 {
  __half x, y;
};

inline float __half2float(__half x) {
  const uint32_t sign = uint32_t{x.bits} >> 15 << 31, magnitude = uint32_t{x.bits & 0x7fffu} << 13;
  float value;
  std::memcpy(&value, &magnitude, sizeof(value));
  value *= 0x1p112f;  // the difference of the exponents; exact, also where float16 is subnormal
  uint32_t wide;
  std::memcpy(&wide, &value, sizeof(wide));
  if ((x.bits & 0x7c00) == 0x7c00) wide = 0x7f800000u | (magnitude & 0x7fffffu);
  wide |= sign;
  std::memcpy(&value, &wide, sizeof(value));
  return value;
}

// To the nearest or, of two as near, the even one; what is too large becomes infinity, NaN becomes 0x7fff.
inline __half __float2half_rn(float value) {
  uint32_t wide;
  std::memcpy(&wide, &value, sizeof(wide));
  const uint16_t sign = static_cast<uint16_t>(wide >> 16 & 0x8000);
  wide &= 0x7fffffffu;
  if (wide > 0x7f800000u) return {0x7fff};
  uint32_t code;
  if (wide < 0x38800000u) {  // 2^-14: below, steps are 2^-24, as those of float32 are at 0.5
    float magnitude;
    std::memcpy(&magnitude, &wide, sizeof(magnitude));
    magnitude += 0.5f;
    std::memcpy(&code, &magnitude, sizeof(code));
    code -= 0x3f000000u;
  } else {
    code = ((wide + 0xfffu + (wide >> 13 & 1)) >> 13) - (112u << 10);
    if (code > 0x7c00) code = 0x7c00;
  }
  return {static_cast<uint16_t>(code | sign)};
}

inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }

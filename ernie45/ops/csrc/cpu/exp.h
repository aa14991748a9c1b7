// e to the x for kernels: plain arithmetic that the compiler turns into vector instructions, within 2 ulp of the truth.
// Only for sources that are compiled once per instruction set.
#pragma once

#include <cstdint>
#include <cstring>

namespace ernie::ERNIE_ISA {

inline uint32_t float_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// 2 to the n for -126 <= n <= 127.
inline float power_of_two(int32_t n) {
  const uint32_t bits = (static_cast<uint32_t>(n) + 127u) << 23;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// x = n ln 2 + r with |r| <= ln 2 / 2, so that e^x = 2^n e^r, where e^r is a minimax polynomial. Infinity above 88.73,
// 0 below -104, NaN for NaN.
inline float exp(float x) {
  constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the lowest bits
  x = x < -104.0f ? -104.0f : x;
  x = x > 89.0f ? 89.0f : x;
  const float shifted = x * 1.44269504f + kRounder;
  const float n = shifted - kRounder;
  const float r = (x - n * 0.693145752f) - n * 1.42860677e-6f;  // ln 2 in two parts; n times the first is exact
  const float tail = 0.49999994f + r * (0.16666521f + r * (0.041668389f + r * (0.0083687454f + r * 0.0013814540f)));
  const float e = 1.0f + (r + r * r * tail);
  // In two steps, because 2^128 and 2^-150 are no float32.
  const int32_t power = static_cast<int32_t>(float_bits(shifted) - float_bits(kRounder));
  const int32_t half = power >> 1;
  return e * power_of_two(half) * power_of_two(power - half);
}

// 2 to the x for x <= 0, within 4 ulp of the truth, in fewer steps than exp: x = n + f with |f| <= 1 / 2, and n goes
// into the exponent of the minimax polynomial 2^f. At least 2^-125; NaN for a NaN whose lower half is zero, as it is in
// every NaN that bfloat16 numbers lead to.
inline float exp2_of_negative(float x) {
  constexpr float kRounder = 12582912.0f;  // as above
  x = x < -125.0f ? -125.0f : x;
  const float shifted = x + kRounder;
  const float f = x - (shifted - kRounder);
  const float tail = 0.24022242f + f * (0.055507336f + f * (0.009671513f + f * 0.0013264727f));
  const uint32_t bits = float_bits(1.0f + f * (0.693147f + f * tail)) + (float_bits(shifted) << 23);
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace ernie::ERNIE_ISA

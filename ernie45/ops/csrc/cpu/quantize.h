// Weight-only quantisation of linear weights [in, out]; ernie45/quantization/weights.py defines it and says the layouts.
//
// Every operation is exact or rounds once, so that instruction sets, fused multiply-adds and the definition in numpy
// agree in every bit. A weight that is NaN or infinite makes the scale of its channel or group NaN or infinite.
#pragma once

#include <cstdint>

#include "isa.h"

namespace ernie {

constexpr int64_t kQuantGroup = 64;  // inputs that share one scale of a 4-bit weight

}  // namespace ernie

// codes [in, out], scales [out]: one scale per output channel. BF16 weights are the upper halves of float32.
// codes [ceil(in / 2), out], two inputs a byte, the even one in the low half; scales [ceil(in / 64), out] in BF16.
ERNIE_FOR_EACH_ISA(
    void quantize_int8(const uint16_t* weight, int64_t in, int64_t out, int8_t* codes, float* scales);
    void quantize_int8(const float* weight, int64_t in, int64_t out, int8_t* codes, float* scales);
    void quantize_int4(const uint16_t* weight, int64_t in, int64_t out, int8_t* codes, uint16_t* scales);)

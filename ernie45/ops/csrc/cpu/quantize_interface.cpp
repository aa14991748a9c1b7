// compiled once: the C functions that ernie45/quantization/weights.py calls.
#include "quantize.h"

extern "C" {

__attribute__((visibility("default"))) void ernie45_quantize_int8_bfloat16(const uint16_t* weight, int64_t in,
                                                                           int64_t out, int8_t* codes, float* scales) {
  ERNIE_DISPATCH(quantize_int8, weight, in, out, codes, scales);
}

__attribute__((visibility("default"))) void ernie45_quantize_int8_float32(const float* weight, int64_t in, int64_t out,
                                                                          int8_t* codes, float* scales) {
  ERNIE_DISPATCH(quantize_int8, weight, in, out, codes, scales);
}

__attribute__((visibility("default"))) void ernie45_quantize_int4_bfloat16(const uint16_t* weight, int64_t in,
                                                                           int64_t out, int8_t* codes,
                                                                           uint16_t* scales) {
  ERNIE_DISPATCH(quantize_int4, weight, in, out, codes, scales);
}
}

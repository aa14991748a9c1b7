// One step of AdamW on a piece of a parameter, and the norm of a piece of a gradient.
#pragma once

#include <cstdint>

#include "isa.h"

namespace ernie {

// What every number of a parameter has in common.
struct AdamWStep {
  float scale;            // of the gradient
  float beta1, beta2, epsilon;
  float rate;             // learning rate over 1 - beta1 ** step
  float decay;            // what the master keeps: 1 - learning rate * weight decay
  float root_correction;  // 1 / sqrt(1 - beta2 ** step)
};

}  // namespace ernie

ERNIE_FOR_EACH_ISA(
  // Updates `count` numbers of master and moments in place; `rounded` (null: none) gets the master in bfloat16.
  void adamw(const AdamWStep& step, const float* gradient, int64_t count, float* master, float* moment1,
             float* moment2, uint16_t* rounded);
  void adamw(const AdamWStep& step, const uint16_t* gradient, int64_t count, float* master, float* moment1,
             float* moment2, uint16_t* rounded);

  // The sum of the squares: of some hundred numbers in float32, and of these sums in float64.
  double squares(const float* x, int64_t count);
  double squares(const uint16_t* x, int64_t count);
)

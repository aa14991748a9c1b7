// Cross entropy of rows of logits, with its gradient in their place.
#pragma once

#include <cstdint>

#include "isa.h"

ERNIE_FOR_EACH_ISA(
  // The loss -log softmax(logits)[label] + z * logsumexp(logits) ** 2 of one row. With `scale` not 0, its gradient times
  // that takes the place of the logits, in bfloat16 from the beginning of the row on.
  float cross_entropy(float* logits, int64_t vocabulary, int64_t label, float z, float scale);
)

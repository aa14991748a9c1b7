// What the functions over device memory share: they know of no framework.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

// C linkage and default visibility: a Paddle operator and a test that loads the library call the same function.
#define ERNIE45_API extern "C" __attribute__((visibility("default")))

// The element types of a tensor, passed as `int dtype`.
enum ErnieDtype : int {
  kErnieFloat32 = 0,
  kErnieFloat16 = 1,
  kErnieBFloat16 = 2,
  kErnieFloat8E4M3 = 3,
};

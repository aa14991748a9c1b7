// Stands in for CUDA's header of this name where kernels are compiled for the host.
#pragma once

#include "cuda_runtime_api.h"
#include "fibers.h"
#include "intrinsics.h"
#include "vectors.h"

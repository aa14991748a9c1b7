// How fast this machine reads memory: what decoding is measured against.
#pragma once

#include <cstdint>

// Reads `bytes` bytes from `data` (aligned to 8) once, split over the threads that kernels use, and returns bytes per
// second. Memory that does not fit into the caches gives the memory's rate.
extern "C" __attribute__((visibility("default"))) double ernie45_read_bandwidth(const void* data, int64_t bytes);

// Memory that begins at a cache line.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>

namespace ernie {

constexpr int64_t kCacheLine = 64;

// Bytes rounded up to whole cache lines. Inlined everywhere: a copy of its own would belong to one instruction set.
__attribute__((always_inline)) inline int64_t whole_lines(int64_t bytes) {
  return (bytes + kCacheLine - 1) / kCacheLine * kCacheLine;
}

struct FreeMemory {
  void operator()(uint8_t* memory) const { std::free(memory); }
};

using Memory = std::unique_ptr<uint8_t[], FreeMemory>;

// At least one line, so that nothing is a special case.
inline Memory allocate_lines(int64_t bytes) {
  return Memory(static_cast<uint8_t*>(std::aligned_alloc(kCacheLine, whole_lines(bytes + 1))));
}

}  // namespace ernie

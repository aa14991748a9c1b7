#include "isa.h"

#include <cstdlib>
#include <cstring>

namespace ernie {
namespace {

Isa best() {
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni") &&
      __builtin_cpu_supports("avx512bf16"))
    return Isa::kAvx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
    return Isa::kAvx2;
  return Isa::kNone;
}

Isa initial() {
  const char* wanted = std::getenv("ERNIE45_ISA");
  if (wanted && !std::strcmp(wanted, "avx2") && best() == Isa::kAvx512) return Isa::kAvx2;
  return best();
}

Isa& chosen() {
  static Isa value = initial();
  return value;
}

}  // namespace

Isa isa() { return chosen(); }

bool set_isa(Isa wanted) {
  if (wanted == Isa::kNone || static_cast<int>(wanted) > static_cast<int>(best())) return false;
  chosen() = wanted;
  return true;
}

}  // namespace ernie

extern "C" {
// 0: neither, 1: AVX2, 2: AVX-512.
__attribute__((visibility("default"))) int ernie45_isa() { return static_cast<int>(ernie::isa()); }
__attribute__((visibility("default"))) int ernie45_set_isa(int wanted) { return ernie::set_isa(static_cast<ernie::Isa>(wanted)); }
}

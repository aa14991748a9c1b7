// Which instruction set the kernels use, decided once when the library is loaded.
//
// Every kernel source is compiled twice, with ERNIE_ISA=avx512 (AVX-512 F/BW/DQ/VL with BF16 and VNNI) and with
// ERNIE_ISA=avx2 (AVX2 and FMA), into namespaces of these names. A header declares its functions for both with
// ERNIE_FOR_EACH_ISA, and callers choose with ERNIE_DISPATCH.
#pragma once

namespace ernie {

enum class Isa { kNone, kAvx2, kAvx512 };

// The best that this processor has, or less if ERNIE45_ISA=avx2 asks for it.
Isa isa();

// Chooses another one, for tests; false if this processor does not have it.
bool set_isa(Isa isa);

}  // namespace ernie

#define ERNIE_FOR_EACH_ISA(DECLARATIONS)         \
  namespace ernie::avx512 { DECLARATIONS }       \
  namespace ernie::avx2 { DECLARATIONS }

#define ERNIE_DISPATCH(FUNCTION, ...)                                                  \
  (::ernie::isa() == ::ernie::Isa::kAvx512 ? ::ernie::avx512::FUNCTION(__VA_ARGS__)    \
                                           : ::ernie::avx2::FUNCTION(__VA_ARGS__))

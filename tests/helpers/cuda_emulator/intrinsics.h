// CUDA's functions of the device: barriers, exchanges within a warp, atomics, bits and numbers.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "fibers.h"

using std::isfinite;
using std::isinf;
using std::isnan;
using std::max;
using std::min;
using std::signbit;

namespace cuda_emulator {

template <typename To, typename From>
inline To bits(From from) {
  static_assert(sizeof(To) >= sizeof(From));
  To to{};
  std::memcpy(&to, &from, sizeof(from));
  return to;
}

template <typename T>
inline T from_bits(uint64_t value) {
  T to;
  std::memcpy(&to, &value, sizeof(to));
  return to;
}

// What the lane `source` of the same mask shows.
template <typename T>
inline T from_lane(unsigned mask, T value, int source, const char* instruction) {
  static_assert(sizeof(T) <= 8);
  const uint64_t* values = meet_lanes(mask, bits<uint64_t>(value), instruction);
  if (!(mask >> source & 1)) fail("%s: lane %d, which is read, is not in the mask %08x", instruction, source, mask);
  return from_bits<T>(values[source]);
}

inline int lane() { return static_cast<int>(machine.current->index % 32); }

template <typename T, typename Operation>
inline T reduce_lanes(unsigned mask, T value, const char* instruction, Operation operation) {
  const uint64_t* values = meet_lanes(mask, bits<uint64_t>(value), instruction);
  bool first = true;
  T result{};
  for (int i = 0; i < 32; ++i) {
    if (!(mask >> i & 1)) continue;
    const T other = from_bits<T>(values[i]);
    result = first ? other : operation(result, other);
    first = false;
  }
  return result;
}

}  // namespace cuda_emulator

// Barriers

inline void __syncthreads() { cuda_emulator::meet_block("__syncthreads"); }

// The counts of one vote and the next are kept apart: a thread that is ahead must not touch what another has to read.
inline int __syncthreads_count(int predicate) {
  auto& machine = cuda_emulator::machine;
  const unsigned parity = machine.block.generation % 2;
  if (machine.block.arrived == 0) machine.votes[parity] = 0;
  machine.votes[parity] += predicate != 0;
  cuda_emulator::meet_block("__syncthreads_count");
  return static_cast<int>(machine.votes[parity]);
}
inline int __syncthreads_or(int predicate) { return __syncthreads_count(predicate) > 0; }
inline int __syncthreads_and(int predicate) { return __syncthreads_count(!predicate) == 0; }
inline void __syncwarp(unsigned mask = 0xffffffffu) { cuda_emulator::meet_lanes(mask, 0, "__syncwarp"); }
inline void __threadfence() {}
inline void __threadfence_block() {}

// Exchanges within a warp

template <typename T>
inline T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const int lane = cuda_emulator::lane();
  return cuda_emulator::from_lane(mask, value, lane / width * width + (source & (width - 1)), "__shfl_sync");
}
template <typename T>
inline T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32) {
  const int lane = cuda_emulator::lane(), source = lane ^ lane_mask;
  return cuda_emulator::from_lane(mask, value, source / width > lane / width ? lane : source, "__shfl_xor_sync");
}
template <typename T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int lane = cuda_emulator::lane(), source = lane - static_cast<int>(delta);
  return cuda_emulator::from_lane(mask, value, source < lane / width * width ? lane : source, "__shfl_up_sync");
}
template <typename T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int lane = cuda_emulator::lane(), source = lane + static_cast<int>(delta);
  return cuda_emulator::from_lane(mask, value, source >= (lane / width + 1) * width ? lane : source, "__shfl_down_sync");
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const uint64_t* values = cuda_emulator::meet_lanes(mask, predicate != 0, "__ballot_sync");
  unsigned ballot = 0;
  for (int i = 0; i < 32; ++i) ballot |= static_cast<unsigned>((mask >> i & 1) && values[i]) << i;
  return ballot;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == mask; }

template <typename T>
inline unsigned __match_any_sync(unsigned mask, T value) {
  const uint64_t mine = cuda_emulator::bits<uint64_t>(value);
  const uint64_t* values = cuda_emulator::meet_lanes(mask, mine, "__match_any_sync");
  unsigned same = 0;
  for (int i = 0; i < 32; ++i) same |= static_cast<unsigned>((mask >> i & 1) && values[i] == mine) << i;
  return same;
}

#define CUDA_EMULATOR_REDUCE(name, expression)                                                            \
  template <typename T>                                                                                   \
  inline T name(unsigned mask, T value) {                                                                 \
    static_assert(std::is_integral_v<T> && sizeof(T) == 4);                                               \
    return cuda_emulator::reduce_lanes(mask, value, #name, [](T a, T b) -> T { return expression; });     \
  }
CUDA_EMULATOR_REDUCE(__reduce_add_sync, a + b)
CUDA_EMULATOR_REDUCE(__reduce_min_sync, std::min(a, b))
CUDA_EMULATOR_REDUCE(__reduce_max_sync, std::max(a, b))
CUDA_EMULATOR_REDUCE(__reduce_and_sync, a & b)
CUDA_EMULATOR_REDUCE(__reduce_or_sync, a | b)
CUDA_EMULATOR_REDUCE(__reduce_xor_sync, a ^ b)
#undef CUDA_EMULATOR_REDUCE

// Atomics: a fiber is not interrupted. Each gives the value from before.

#define CUDA_EMULATOR_ATOMIC(name, expression)                           \
  template <typename T>                                                  \
  inline T name(T* address, std::common_type_t<T> value) {               \
    const T before = *address;                                           \
    *address = expression;                                               \
    return before;                                                       \
  }
CUDA_EMULATOR_ATOMIC(atomicAdd, static_cast<T>(before + value))
CUDA_EMULATOR_ATOMIC(atomicSub, static_cast<T>(before - value))
CUDA_EMULATOR_ATOMIC(atomicMin, std::min(before, value))
CUDA_EMULATOR_ATOMIC(atomicMax, std::max(before, value))
CUDA_EMULATOR_ATOMIC(atomicOr, static_cast<T>(before | value))
CUDA_EMULATOR_ATOMIC(atomicAnd, static_cast<T>(before & value))
CUDA_EMULATOR_ATOMIC(atomicExch, value)
#undef CUDA_EMULATOR_ATOMIC

template <typename T>
inline T atomicCAS(T* address, std::common_type_t<T> expected, std::common_type_t<T> value) {
  const T before = *address;
  if (before == expected) *address = value;
  return before;
}

// Memory: hints for the cache change nothing here.

template <typename T> inline T __ldg(const T* from) { return *from; }
template <typename T> inline T __ldcs(const T* from) { return *from; }
template <typename T> inline T __ldcg(const T* from) { return *from; }
template <typename T> inline void __stcs(T* to, T value) { *to = value; }
template <typename T> inline void __stcg(T* to, T value) { *to = value; }

// Bits

inline unsigned __float_as_uint(float x) { return cuda_emulator::bits<unsigned>(x); }
inline int __float_as_int(float x) { return cuda_emulator::bits<int>(x); }
inline float __uint_as_float(unsigned x) { return cuda_emulator::bits<float>(x); }
inline float __int_as_float(int x) { return cuda_emulator::bits<float>(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(unsigned x) { return __builtin_ffs(static_cast<int>(x)); }
inline int __clz(unsigned x) { return x ? __builtin_clz(x) : 32; }
// Each nibble of the selector names a byte: of x 0 to 3, of y 4 to 7.
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t both = uint64_t{y} << 32 | x;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) result |= static_cast<unsigned>(both >> (8 * (selector >> 4 * i & 7)) & 0xff) << 8 * i;
  return result;
}
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(uint64_t{a} * b >> 32); }

// Numbers: what is approximate on a device is not here.

inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fmaf_rn(float x, float y, float z) { return std::fma(x, y, z); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline int __float2int_rn(float x) { return static_cast<int>(std::nearbyint(x)); }
inline unsigned __float2uint_rn(float x) { return static_cast<unsigned>(std::nearbyint(x)); }

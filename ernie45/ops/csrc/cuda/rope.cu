#include "rope.h"

#include <algorithm>

#include "device.cuh"

namespace ernie::cuda {
namespace {

constexpr int kThreads = 256;
// As in swiglu.cu: with these bounds, the compiler has the registers to load everything before it computes.
constexpr int kBlocks = 6;
// Heads of a thread whose vectors are loaded before the first is turned.
constexpr int kHeld = 2;

// Query or key: where the heads of the first token start, and how far the next token is.
template <typename T>
struct Heads {
  const T* from;
  int64_t stride;
  T* to;
  int64_t to_stride;
};

// A block for each token: x is a vector's place in its head, so that a thread loads its angles once, y are heads.
// kBackward is no factor of the sines: to multiply them, the compiler would wait for them before it loads a head.
template <typename T, bool kWide, bool kBackward>
__global__ void __launch_bounds__(kThreads, kBlocks)
    rope_kernel(Heads<T> q, Heads<T> k, int q_heads, int heads, const float* __restrict__ cos,
                const float* __restrict__ sin, uint32_t angle_tokens) {
  constexpr int kCount = kWide ? kLanes<T> : 2, kPairs = kCount / 2, kPart = kWide ? kCount : 1;
  const int64_t token = blockIdx.x;
  const int column = threadIdx.x * kCount, head_dim = blockDim.x * kCount;
  const int64_t angle = static_cast<int64_t>(blockIdx.x % angle_tokens) * (head_dim / 2) + threadIdx.x * kPairs;
  float c[kPairs], s[kPairs];
  load_floats(cos + angle, c);
  load_floats(sin + angle, s);
  for (int first = threadIdx.y; first < heads; first += blockDim.y * kHeld) {
    Pack<T, kPart> parts[kHeld][kCount / kPart];
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const int head = min(first + i * static_cast<int>(blockDim.y), heads - 1);
      const bool is_q = head < q_heads;
      const T* from = (is_q ? q.from : k.from) + token * (is_q ? q.stride : k.stride) +
                      (is_q ? head : head - q_heads) * head_dim + column;
#pragma unroll
      for (int j = 0; j < kCount / kPart; ++j) parts[i][j] = load<kPart>(from + j * kPart);
    }
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const int head = first + i * blockDim.y;
      if (head >= heads) continue;
      float turned[kCount];
#pragma unroll
      for (int j = 0; j < kPairs; ++j) {
        const float even = to_float(parts[i][2 * j / kPart].values[2 * j % kPart]);
        const float odd = to_float(parts[i][(2 * j + 1) / kPart].values[(2 * j + 1) % kPart]);
        turned[2 * j] = kBackward ? even * c[j] + odd * s[j] : even * c[j] - odd * s[j];
        turned[2 * j + 1] = kBackward ? odd * c[j] - even * s[j] : odd * c[j] + even * s[j];
      }
      const bool is_q = head < q_heads;
      T* to = (is_q ? q.to : k.to) + token * (is_q ? q.to_stride : k.to_stride) +
              (is_q ? head : head - q_heads) * head_dim + column;
      if constexpr (kWide) {
        store(from_floats<T>(turned), to);
      } else {
        to[0] = from_float<T>(turned[0]), to[1] = from_float<T>(turned[1]);
      }
    }
  }
}

// x is the pair, y the token.
__global__ void __launch_bounds__(kThreads)
    rope_angles_kernel(const int64_t* __restrict__ positions, int axes, const float* __restrict__ frequencies,
                       int64_t tokens, int time_pairs, float* __restrict__ cos, float* __restrict__ sin) {
  const int pair = threadIdx.x, pairs = blockDim.x;
  const int64_t token = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (token >= tokens) return;
  const int axis = axes == 1 || pair >= pairs - time_pairs ? 0 : 1 + pair % 2;
  const float angle = static_cast<float>(positions[token * axes + axis]) * frequencies[pair];
  sincosf(angle, sin + token * pairs + pair, cos + token * pairs + pair);
}

template <typename T, bool kWide, bool kBackward>
cudaError_t rope(const Heads<T>& q, const Heads<T>& k, int64_t q_heads, int64_t heads, const float* cos,
                 const float* sin, int64_t tokens, int64_t angle_tokens, int64_t head_dim, cudaStream_t stream) {
  // As few heads at once as take the token in as few turns as kThreads do.
  const int64_t columns = head_dim / (kWide ? kLanes<T> : 2);
  const int64_t turns = ceil_div(heads, std::max<int64_t>(1, kThreads / columns));
  const dim3 block(static_cast<unsigned>(columns), static_cast<unsigned>(ceil_div(heads, turns)));
  return launch(rope_kernel<T, kWide, kBackward>, static_cast<unsigned>(tokens), block, 0, stream, q, k,
                static_cast<int>(q_heads), static_cast<int>(heads), cos, sin, static_cast<uint32_t>(angle_tokens));
}

template <typename T>
cudaError_t rope(const void* q, int64_t q_stride, int64_t q_heads, const void* k, int64_t k_stride, int64_t k_heads,
                 const float* cos, const float* sin, int64_t tokens, int64_t angle_tokens, int64_t head_dim,
                 int backward, void* q_out, int64_t q_out_stride, void* k_out, int64_t k_out_stride,
                 cudaStream_t stream) {
  const Heads<T> queries{static_cast<const T*>(q), q_stride, static_cast<T*>(q_out), q_out_stride};
  const Heads<T> keys{static_cast<const T*>(k), k_stride, static_cast<T*>(k_out), k_out_stride};
  bool wide = head_dim % kLanes<T> == 0 && aligned(cos, sin);
  if (q_heads > 0) wide = wide && aligned(q, q_out) && (q_stride | q_out_stride) % kLanes<T> == 0;
  if (k_heads > 0) wide = wide && aligned(k, k_out) && (k_stride | k_out_stride) % kLanes<T> == 0;
  const auto forward = wide ? rope<T, true, false> : rope<T, false, false>;
  const auto back = wide ? rope<T, true, true> : rope<T, false, true>;
  return (backward ? back : forward)(queries, keys, q_heads, q_heads + k_heads, cos, sin, tokens, angle_tokens,
                                     head_dim, stream);
}

}  // namespace
}  // namespace ernie::cuda

cudaError_t ernie45_cuda_rope_angles(const int64_t* positions, int64_t axes, const float* frequencies, int64_t tokens,
                                     int64_t pairs, int64_t time_pairs, float* cos, float* sin, cudaStream_t stream) {
  using namespace ernie::cuda;
  if ((axes != 1 && axes != 3) || tokens < 0 || tokens > 0x7fffffff || pairs < 0 || pairs > kThreads ||
      time_pairs < 0 || time_pairs > pairs) {
    return cudaErrorInvalidValue;
  }
  if (tokens == 0 || pairs == 0) return cudaSuccess;
  const dim3 block(static_cast<unsigned>(pairs), static_cast<unsigned>(kThreads / pairs));
  return launch(rope_angles_kernel, static_cast<unsigned>(ceil_div(tokens, block.y)), block, 0, stream, positions,
                static_cast<int>(axes), frequencies, tokens, static_cast<int>(time_pairs), cos, sin);
}

cudaError_t ernie45_cuda_rope(const void* q, int64_t q_stride, int64_t q_heads, const void* k, int64_t k_stride,
                              int64_t k_heads, const float* cos, const float* sin, int64_t tokens,
                              int64_t angle_tokens, int64_t head_dim, int backward, int dtype, void* q_out,
                              int64_t q_out_stride, void* k_out, int64_t k_out_stride, cudaStream_t stream) {
  using namespace ernie::cuda;
  if (tokens < 0 || tokens > 0x7fffffff || angle_tokens < 0 || angle_tokens > 0x7fffffff || q_heads < 0 ||
      k_heads < 0 || q_heads + k_heads > 65535 || head_dim < 0 || head_dim > 2 * kThreads || head_dim % 2 != 0) {
    return cudaErrorInvalidValue;
  }
  if (tokens == 0 || q_heads + k_heads == 0 || head_dim == 0) return cudaSuccess;
  if (angle_tokens == 0) return cudaErrorInvalidValue;
  return ERNIE45_FOR_FLOAT_TYPE(dtype, rope<T>(q, q_stride, q_heads, k, k_stride, k_heads, cos, sin, tokens,
                                               angle_tokens, head_dim, backward, q_out, q_out_stride, k_out,
                                               k_out_stride, stream));
}

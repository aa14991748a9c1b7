#include "moe_gate.h"

#include <algorithm>

#include "device.cuh"

namespace ernie::cuda {
namespace {

// One warp per token. Its lanes hold kHeld experts each, in groups of kVector neighbours that are loaded at once.

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
// Enough warps to hide latency; more would only add to the counts more often.
constexpr int kBlocksPerMultiprocessor = 4;
constexpr int kMostExperts = 256;

struct Choice {
  int experts, k;
  bool softmax, normalise;
  float minimum;
};

template <int kHeld, int kVector>
struct Row {
  float values[kHeld];

  // The expert in place i of this lane, at or beyond the number of experts if there is none.
  static __device__ __forceinline__ int expert(int i) {
    const int lane = threadIdx.x % kWarp;
    return (i / kVector * kWarp + lane) * kVector + i % kVector;
  }

  __device__ __forceinline__ void read(const float* from, int experts, float absent) {
#pragma unroll
    for (int i = 0; i < kHeld; i += kVector) {
      Pack<float, kVector> pack;
      if (expert(i) < experts) {
        pack = load<kVector>(from + expert(i));
      } else {
#pragma unroll
        for (int j = 0; j < kVector; ++j) pack.values[j] = absent;
      }
#pragma unroll
      for (int j = 0; j < kVector; ++j) values[i + j] = pack.values[j];
    }
  }

  __device__ __forceinline__ void write(float* to, int experts) const {
#pragma unroll
    for (int i = 0; i < kHeld; i += kVector) {
      Pack<float, kVector> pack;
#pragma unroll
      for (int j = 0; j < kVector; ++j) pack.values[j] = values[i + j];
      if (expert(i) < experts) store(pack, to + expert(i));
    }
  }
};

// Integers in the order of floats, for reductions in one instruction. NaN is the largest; 0 is below every float. The
// two zeros differ, but none of what is compared here can be -0.
__device__ __forceinline__ uint32_t ordered(float x) {
  const uint32_t bits = __float_as_uint(x);
  return isnan(x) ? 0xffffffffu : bits >> 31 ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ float from_ordered(uint32_t x) {
  return __uint_as_float(x >> 31 ? x & 0x7fffffffu : ~x);
}

template <int kHeld, int kVector>
__device__ __forceinline__ void softmax_row(Row<kHeld, kVector>& row) {
  float largest = row.values[0];
#pragma unroll
  for (int i = 1; i < kHeld; ++i) largest = fmaxf(largest, row.values[i]);
  // That fmaxf passes over NaN does not matter: it comes back with the sum.
  largest = from_ordered(__reduce_max_sync(kAllLanes, ordered(largest)));
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) sum += row.values[i] = expf(row.values[i] - largest);
  sum = warp_sum(sum);
#pragma unroll
  for (int i = 0; i < kHeld; ++i) row.values[i] /= sum;
}

template <int kHeld, int kVector>
__device__ __forceinline__ void sigmoid_row(Row<kHeld, kVector>& row) {
#pragma unroll
  for (int i = 0; i < kHeld; ++i) row.values[i] = 1.0f / (1.0f + expf(-row.values[i]));
}

// Takes the best of all experts k times. Lane i gets the i-th choice and its probability, every lane their sum.
template <int kHeld, int kVector>
__device__ __forceinline__ void choose(const Row<kHeld, kVector>& probabilities, uint32_t (&scores)[kHeld], int k,
                                       int& chosen, float& probability, float& sum) {
  using Place = Row<kHeld, kVector>;
  const int lane = threadIdx.x % kWarp;
  sum = 0.0f;
  for (int choice = 0; choice < k; ++choice) {
    uint32_t best = scores[0];
    int expert = Place::expert(0);
    float of_best = probabilities.values[0];
#pragma unroll
    for (int i = 1; i < kHeld; ++i) {
      if (scores[i] <= best) continue;
      best = scores[i], expert = Place::expert(i), of_best = probabilities.values[i];
    }
    const uint32_t best_of_all = __reduce_max_sync(kAllLanes, best);
    const int winner = __reduce_min_sync(kAllLanes, best == best_of_all ? expert : kMostExperts);
    of_best = __shfl_sync(kAllLanes, of_best, winner / kVector % kWarp);
    sum += of_best;
    if (lane == choice) chosen = winner, probability = of_best;
#pragma unroll
    for (int i = 0; i < kHeld; ++i) scores[i] = Place::expert(i) == winner ? 0 : scores[i];
  }
}

template <int kHeld, int kVector>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    gate_kernel(const float* __restrict__ logits, const float* __restrict__ bias, int64_t tokens, Choice choice,
                float* __restrict__ probabilities, int64_t* __restrict__ indices, float* __restrict__ weights,
                unsigned long long* __restrict__ counts) {
  using Experts = Row<kHeld, kVector>;
  __shared__ int chosen_here[kMostExperts];
  const int lane = threadIdx.x % kWarp, experts = choice.experts, k = choice.k;
  if (counts) {
    chosen_here[threadIdx.x] = 0;
    __syncthreads();
  }
  Experts shift;
  shift.read(bias, bias ? experts : 0, 0.0f);
  for (int64_t token = blockIdx.x * kWarps + threadIdx.x / kWarp; token < tokens; token += gridDim.x * kWarps) {
    Experts row;
    row.read(logits + token * experts, experts, -INFINITY);
    choice.softmax ? softmax_row(row) : sigmoid_row(row);
    if (probabilities) row.write(probabilities + token * experts, experts);

    uint32_t scores[kHeld];
#pragma unroll
    for (int i = 0; i < kHeld; ++i)
      scores[i] = Experts::expert(i) < experts ? ordered(row.values[i] + shift.values[i]) : 0;
    int chosen = 0;
    float probability = 0.0f, sum;
    choose(row, scores, k, chosen, probability, sum);
    if (lane >= k) continue;
    const float divisor = !choice.normalise ? 1.0f : sum < choice.minimum ? choice.minimum : sum;
    indices[token * k + lane] = chosen;
    weights[token * k + lane] = probability / divisor;
    if (counts) atomicAdd(&chosen_here[chosen], 1);
  }
  if (!counts) return;
  __syncthreads();
  const int e = threadIdx.x;
  if (e < experts && chosen_here[e] > 0) atomicAdd(&counts[e], static_cast<unsigned long long>(chosen_here[e]));
}

// What reaches the probability of this lane's choice through the k weights: with w = p / s and s the sum of the
// chosen, dp = (g - sum(g w)) / s, and g / minimum where s is clipped and thus constant.
__device__ __forceinline__ float through_weights(float probability, float grad, const Choice& choice) {
  if (!choice.normalise) return grad;
  const float sum = warp_sum(probability), shared = warp_sum(grad * (probability / sum));
  return sum < choice.minimum ? grad / choice.minimum : (grad - shared) / sum;
}

template <int kHeld, int kVector>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    gate_grad_kernel(const float* __restrict__ probabilities, const int64_t* __restrict__ indices,
                     const float* __restrict__ grad_probabilities, const float* __restrict__ grad_weights,
                     int64_t tokens, Choice choice, float* __restrict__ grad_logits) {
  using Experts = Row<kHeld, kVector>;
  const int lane = threadIdx.x % kWarp;
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp, first = token * choice.experts;
  if (token >= tokens) return;
  Experts row, grad;
  row.read(probabilities + first, choice.experts, 0.0f);
  grad.read(grad_probabilities + first, grad_probabilities ? choice.experts : 0, 0.0f);
  if (grad_weights) {
    const int64_t at = token * choice.k + lane;
    const bool chooses = lane < choice.k;
    const int chosen = chooses ? static_cast<int>(indices[at]) : kMostExperts;
    const float probability = chooses ? probabilities[first + chosen] : 0.0f;
    const float mine = through_weights(probability, chooses ? grad_weights[at] : 0.0f, choice);
    for (int i = 0; i < choice.k; ++i) {
      const int expert = __shfl_sync(kAllLanes, chosen, i);
      const float by_weight = __shfl_sync(kAllLanes, mine, i);
#pragma unroll
      for (int j = 0; j < kHeld; ++j)
        if (Experts::expert(j) == expert) grad.values[j] += by_weight;
    }
  }
  float dot = 0.0f;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) dot += grad.values[i] * row.values[i];
  dot = choice.softmax ? warp_sum(dot) : 0.0f;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const float slope = choice.softmax ? 1.0f : 1.0f - row.values[i];
    grad.values[i] = row.values[i] * ((grad.values[i] - dot) * slope);
  }
  grad.write(grad_logits + first, choice.experts);
}

// Calls call(held, vector), two integral constants, for rows of so many experts.
template <typename Call>
cudaError_t for_row(int64_t experts, bool is_aligned, Call call) {
  const auto with = [&](auto held) {
    constexpr int kVector = held() < 4 ? held() : 4;
    if (is_aligned && experts % kVector == 0) return call(held, std::integral_constant<int, kVector>());
    return call(held, std::integral_constant<int, 1>());
  };
  if (experts <= 32) return with(std::integral_constant<int, 1>());
  if (experts <= 64) return with(std::integral_constant<int, 2>());
  if (experts <= 128) return with(std::integral_constant<int, 4>());
  return with(std::integral_constant<int, 8>());
}

bool accepted(int64_t tokens, int64_t experts, int64_t k) {
  return 0 <= tokens && tokens < (int64_t{1} << 31) && k > 0 && k <= std::min<int64_t>(experts, kWarp) &&
         experts <= kMostExperts;
}

}  // namespace
}  // namespace ernie::cuda

cudaError_t ernie45_cuda_moe_gate(const float* logits, const float* bias, int64_t tokens, int64_t experts, int64_t k,
                                  bool softmax, bool normalise, float minimum, float* probabilities, int64_t* indices,
                                  float* weights, int64_t* counts, cudaStream_t stream) {
  using namespace ernie::cuda;
  if (!accepted(tokens, experts, k)) return cudaErrorInvalidValue;
  if (counts) {
    const cudaError_t error = cudaMemsetAsync(counts, 0, experts * sizeof(int64_t), stream);
    if (error != cudaSuccess) return error;
  }
  const Choice choice{static_cast<int>(experts), static_cast<int>(k), softmax, normalise, minimum};
  const int64_t blocks = std::min<int64_t>(ceil_div(tokens, kWarps), multiprocessors() * kBlocksPerMultiprocessor);
  return for_row(experts, aligned(logits, bias, probabilities), [&](auto held, auto vector) {
    return launch(gate_kernel<held(), vector()>, static_cast<unsigned>(blocks), kThreads, 0, stream, logits, bias,
                  tokens, choice, probabilities, indices, weights, reinterpret_cast<unsigned long long*>(counts));
  });
}

cudaError_t ernie45_cuda_moe_gate_grad(const float* probabilities, const int64_t* indices,
                                       const float* grad_probabilities, const float* grad_weights, int64_t tokens,
                                       int64_t experts, int64_t k, bool softmax, bool normalise, float minimum,
                                       float* grad_logits, cudaStream_t stream) {
  using namespace ernie::cuda;
  if (!accepted(tokens, experts, k)) return cudaErrorInvalidValue;
  const Choice choice{static_cast<int>(experts), static_cast<int>(k), softmax, normalise, minimum};
  return for_row(experts, aligned(probabilities, grad_probabilities, grad_logits), [&](auto held, auto vector) {
    return launch(gate_grad_kernel<held(), vector()>, static_cast<unsigned>(ceil_div(tokens, kWarps)), kThreads, 0,
                  stream, probabilities, indices, grad_probabilities, grad_weights, tokens, choice, grad_logits);
  });
}

#include "moe_sort.h"

#include <algorithm>

#include "device.cuh"

namespace ernie::cuda {
namespace {

// A stable counting sort. Each block counts the experts in its chunk of the choices, then places them: behind those of
// lower experts, of earlier chunks, of earlier warps, and of earlier choices of its warp.

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / kWarp;
// Choices of a thread. A warp takes 32 neighbours at a time.
constexpr int kHeld = 4;
constexpr int kChunk = kThreads * kHeld;

// The choices of a thread: the expert of each, or -1, and how many of this warp before it chose the same.
struct Choices {
  int experts[kHeld], before[kHeld];
};

__device__ __forceinline__ int choice_of_thread(int i) {
  return blockIdx.x * kChunk + (threadIdx.x / kWarp * kHeld + i) * kWarp + threadIdx.x % kWarp;
}

// Counts the choices of every warp in counts [warps, experts].
__device__ __forceinline__ Choices count_by_warp(const int64_t* indices, int total, int experts, int* counts) {
  Choices choices;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int64_t expert = choice_of_thread(i) < total ? indices[choice_of_thread(i)] : -1;
    choices.experts[i] = 0 <= expert && expert < experts ? static_cast<int>(expert) : -1;
  }
  for (int i = threadIdx.x; i < kWarps * experts; i += kThreads) counts[i] = 0;
  __syncthreads();
  int* of_warp = counts + threadIdx.x / kWarp * experts;
  const unsigned lower_lanes = (1u << threadIdx.x % kWarp) - 1;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int expert = choices.experts[i];
    const unsigned same = __match_any_sync(kAllLanes, expert);
    if (expert >= 0) choices.before[i] = of_warp[expert] + __popc(same & lower_lanes);
    __syncwarp();
    if (expert >= 0 && (same & lower_lanes) == 0) of_warp[expert] += __popc(same);
    __syncwarp();
  }
  __syncthreads();
  return choices;
}

// The sum over the threads before this one.
__device__ __forceinline__ int sum_before(int value) {
  __shared__ int of_warps[kWarps];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  int sum = value;
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const int other = __shfl_up_sync(kAllLanes, sum, step);
    if (lane >= step) sum += other;
  }
  if (lane == kWarp - 1) of_warps[warp] = sum;
  __syncthreads();
  return sum - value + __reduce_add_sync(kAllLanes, lane < warp ? of_warps[lane] : 0);
}

__global__ void __launch_bounds__(kThreads)
    count_kernel(const int64_t* __restrict__ indices, int total, int experts, int* __restrict__ chunk_counts) {
  int* counts = reinterpret_cast<int*>(dynamic_shared());
  count_by_warp(indices, total, experts, counts);
  const int e = threadIdx.x;
  if (e >= experts) return;
  int sum = 0;
  for (int warp = 0; warp < kWarps; ++warp) sum += counts[warp * experts + e];
  chunk_counts[blockIdx.x * experts + e] = sum;
}

// The counts of the chunks may be null if there is only one.
__global__ void __launch_bounds__(kThreads)
    place_kernel(const int64_t* __restrict__ indices, int total, Divisor k, int experts, int multiple,
                 const int* __restrict__ chunk_counts, int64_t* __restrict__ counts, int64_t* __restrict__ offsets,
                 int64_t* __restrict__ slots, int* __restrict__ sources) {
  int* next = reinterpret_cast<int*>(dynamic_shared());
  const Choices choices = count_by_warp(indices, total, experts, next);
  const int e = threadIdx.x;
  const int chunks = gridDim.x, this_chunk = blockIdx.x;
  int count = 0, in_chunks_before = 0;
  if (e < experts && chunk_counts) {
#pragma unroll 8
    for (int chunk = 0; chunk < chunks; ++chunk) {
      const int of_chunk = chunk_counts[chunk * experts + e];
      count += of_chunk;
      if (chunk < this_chunk) in_chunks_before += of_chunk;
    }
  } else if (e < experts) {
    for (int warp = 0; warp < kWarps; ++warp) count += next[warp * experts + e];
  }
  const int rows = (count + multiple - 1) / multiple * multiple, first = sum_before(rows);
  if (e < experts) {
    if (this_chunk == 0) counts[e] = count, offsets[e] = first;
    if (this_chunk == 0 && e == experts - 1) offsets[experts] = first + rows;
    // From here on, the row of the first choice of every warp.
    int row = first + in_chunks_before;
    for (int warp = 0; warp < kWarps; ++warp) {
      const int of_warp = next[warp * experts + e];
      next[warp * experts + e] = row;
      row += of_warp;
    }
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int expert = choices.experts[i], choice = choice_of_thread(i);
    if (choice >= total) continue;
    const int slot = expert < 0 ? -1 : next[threadIdx.x / kWarp * experts + expert] + choices.before[i];
    slots[choice] = slot;
    if (sources && slot >= 0) sources[slot] = static_cast<int>(k.quotient(choice));
  }
}

// What both functions over sizes take.
bool accepted(int64_t tokens, int64_t k, int64_t experts, int64_t multiple) {
  constexpr int64_t kMost = int64_t{1} << 31;
  return 0 <= tokens && tokens < kMost && 0 < k && k < kMost && 0 < experts && experts <= kThreads && 0 < multiple &&
         multiple < kMost && ernie45_cuda_moe_sort_rows(tokens, k, experts, multiple) < kMost - kChunk;
}

}  // namespace
}  // namespace ernie::cuda

int64_t ernie45_cuda_moe_sort_rows(int64_t tokens, int64_t k, int64_t experts, int64_t multiple) {
  const int64_t choices = tokens * k;
  // In the worst case, as many experts as can be get one choice more than a multiple.
  return (choices + std::min(experts, choices) * (multiple - 1)) / multiple * multiple;
}

int64_t ernie45_cuda_moe_sort_workspace(int64_t tokens, int64_t k, int64_t experts) {
  using namespace ernie::cuda;
  return ceil_div(tokens * k, kChunk) * experts * static_cast<int64_t>(sizeof(int));
}

cudaError_t ernie45_cuda_moe_sort(const int64_t* indices, int64_t tokens, int64_t k, int64_t experts, int64_t multiple,
                                  int64_t* counts, int64_t* offsets, int64_t* slots, int* sources, void* workspace,
                                  cudaStream_t stream) {
  using namespace ernie::cuda;
  if (!accepted(tokens, k, experts, multiple)) return cudaErrorInvalidValue;
  if (sources) {  // all bits set: -1
    const int64_t rows = ernie45_cuda_moe_sort_rows(tokens, k, experts, multiple);
    const cudaError_t error = cudaMemsetAsync(sources, 0xff, rows * sizeof(int), stream);
    if (error != cudaSuccess) return error;
  }
  // Without choices, too, there are counts to write.
  const int64_t total = tokens * k, chunks = std::max<int64_t>(ceil_div(total, kChunk), 1);
  const size_t shared_bytes = kWarps * experts * sizeof(int);
  int* chunk_counts = chunks > 1 ? static_cast<int*>(workspace) : nullptr;
  if (chunk_counts) {
    const cudaError_t error = launch(count_kernel, static_cast<unsigned>(chunks), kThreads, shared_bytes, stream,
                                     indices, total, experts, chunk_counts);
    if (error != cudaSuccess) return error;
  }
  return launch(place_kernel, static_cast<unsigned>(chunks), kThreads, shared_bytes, stream, indices, total, Divisor(k),
                experts, multiple, chunk_counts, counts, offsets, slots, sources);
}

// Threads: OpenMP on the runtime that Paddle itself uses, so that the two never fight for the cores.
#pragma once

#include <omp.h>

#include <algorithm>
#include <cstdint>

namespace ernie {

// Threads that kernels may use; ernie45.set_num_threads changes it.
int num_threads();
void set_num_threads(int count);

// Calls body(first, last) on disjoint ranges that cover 0 .. count - 1, from several threads at once. A thread gets at
// least `grain` items, so that small work stays on the calling thread.
template <class Body>
void parallel_for(int64_t count, int64_t grain, const Body& body) {
  if (count <= 0) return;
  const int64_t threads = std::min<int64_t>(num_threads(), (count + grain - 1) / grain);
  if (threads <= 1 || omp_in_parallel()) return body(int64_t{0}, count);
#pragma omp parallel num_threads(static_cast<int>(threads))
  {
    const int64_t team = omp_get_num_threads(), thread = omp_get_thread_num();
    const int64_t first = count * thread / team, last = count * (thread + 1) / team;
    if (first < last) body(first, last);
  }
}

}  // namespace ernie

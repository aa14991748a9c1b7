// Runs the blocks of a grid one after the other, and the threads of a block as fibers that take turns.
//
// A fiber runs until it waits for others: at a barrier of its block, or of the lanes that a warp's instruction names.
// Which fiber goes first changes from turn to turn, so that a missing barrier is likely to show. A block in which all
// threads wait, lanes that meet in different instructions, bad addresses and misaligned accesses end the launch with an
// error and a line on stderr.
#pragma once

#include <csetjmp>
#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <functional>
#include <map>
#include <memory>
#include <utility>
#include <vector>

#include <ucontext.h>

#include "cuda_runtime_api.h"
#include "vectors.h"

namespace cuda_emulator {

constexpr size_t kStackBytes = 128 * 1024;
constexpr unsigned kMaxThreads = 1024;

// Where threads wait for each other. What the lanes of a warp show to each other alternates between two places: nobody
// can be two meetings ahead of a lane that has yet to read.
struct Meeting {
  unsigned arrived = 0, generation = 0;
  const char* instruction = nullptr;
  uint64_t values[2][32];
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  jmp_buf place;
  bool started = false, done = true;
  unsigned index = 0;
  uint3 thread{};
  const unsigned* awaited = nullptr;  // a generation, and the value with which the fiber waits
  unsigned seen = 0;
};

struct Machine {
  std::vector<std::unique_ptr<Fiber>> fibers;
  Fiber* current = nullptr;
  jmp_buf turn;
  sigjmp_buf fault;
  std::function<void()> kernel;
  std::vector<char> shared;
  unsigned alive = 0;
  unsigned random = 1;
  Meeting block;
  unsigned voted = 0, votes[2] = {0, 0};
  std::map<std::pair<unsigned, unsigned>, Meeting> lanes;  // by warp and mask
};

inline Machine machine;

inline unsigned char* dynamic_shared() {
  const auto address = reinterpret_cast<uintptr_t>(machine.shared.data());
  return reinterpret_cast<unsigned char*>((address + 127) / 128 * 128);
}

// Ends the launch. What the fibers hold is lost, as is the memory of a context after an error on a GPU.
[[noreturn]] inline void fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::fprintf(stderr, "cuda_emulator: block (%u, %u, %u)", blockIdx.x, blockIdx.y, blockIdx.z);
  if (machine.current) std::fprintf(stderr, ", thread (%u, %u, %u)", threadIdx.x, threadIdx.y, threadIdx.z);
  std::fprintf(stderr, ": ");
  std::vfprintf(stderr, format, arguments);
  std::fprintf(stderr, "\n");
  va_end(arguments);
  siglongjmp(machine.fault, 1);
}

inline void take_turn_to_others() {
  if (_setjmp(machine.current->place) == 0) _longjmp(machine.turn, 1);
}

inline void wait(const unsigned& generation) {
  machine.current->awaited = &generation;
  machine.current->seen = generation;
  take_turn_to_others();
}

inline void meet_block(const char* instruction) {
  Meeting& block = machine.block;
  if (block.arrived == 0) block.instruction = instruction;
  if (std::strcmp(block.instruction, instruction) != 0) {
    fail("%s, where other threads wait in %s", instruction, block.instruction);
  }
  if (++block.arrived < machine.alive) return wait(block.generation);
  block.arrived = 0;
  ++block.generation;
}

// Shows `value` to the lanes in `mask`, which all must come here; returns what each of them shows.
inline const uint64_t* meet_lanes(unsigned mask, uint64_t value, const char* instruction) {
  const unsigned lane = machine.current->index % 32;
  if (!(mask >> lane & 1)) fail("%s: the mask %08x does not name lane %u, which calls it", instruction, mask, lane);
  Meeting& meeting = machine.lanes[{machine.current->index / 32, mask}];
  if (meeting.arrived == 0) meeting.instruction = instruction;
  if (std::strcmp(meeting.instruction, instruction) != 0) {
    fail("%s, where other lanes wait in %s", instruction, meeting.instruction);
  }
  uint64_t* values = meeting.values[meeting.generation % 2];
  values[lane] = value;
  meeting.arrived |= 1u << lane;
  if (meeting.arrived == mask) {
    meeting.arrived = 0;
    ++meeting.generation;
  } else {
    wait(meeting.generation);
  }
  return values;
}

// A fiber is used by one block after the other.
inline void run_fiber() {
  for (;;) {
    machine.kernel();
    machine.current->done = true;
    --machine.alive;
    if (machine.block.arrived && machine.block.arrived == machine.alive) {  // a thread that is gone is not waited for
      machine.block.arrived = 0;
      ++machine.block.generation;
    }
    take_turn_to_others();
  }
}

inline void resume(Fiber& fiber) {
  machine.current = &fiber;
  threadIdx = fiber.thread;
  if (_setjmp(machine.turn) == 0) {
    if (fiber.started) _longjmp(fiber.place, 1);
    fiber.started = true;
    setcontext(&fiber.context);
  }
  machine.current = nullptr;
}

inline void prepare_fibers(unsigned threads) {
  while (machine.fibers.size() < threads) {
    auto fiber = std::make_unique<Fiber>();
    fiber->stack.reset(new char[kStackBytes]);
    getcontext(&fiber->context);
    fiber->context.uc_stack = {fiber->stack.get(), 0, kStackBytes};
    fiber->context.uc_link = nullptr;
    makecontext(&fiber->context, run_fiber, 0);
    machine.fibers.push_back(std::move(fiber));
  }
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& fiber = *machine.fibers[i];
    fiber.index = i;
    fiber.thread = {i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y)};
    fiber.done = false;
    fiber.awaited = nullptr;
  }
}

inline unsigned next_random() { return machine.random = machine.random * 1664525u + 1013904223u; }

inline void run_block(unsigned threads) {
  prepare_fibers(threads);
  machine.alive = threads;
  machine.block.arrived = 0;
  machine.lanes.clear();
  // What nobody has written is NaN.
  std::fill(machine.shared.begin(), machine.shared.end(), static_cast<char>(0xff));
  while (machine.alive > 0) {
    const unsigned first = (next_random() >> 8) % threads, step = next_random() >> 31 ? 1 : threads - 1;
    bool anyone = false;
    for (unsigned turn = 0, i = first; turn < threads; ++turn, i = (i + step) % threads) {
      Fiber& fiber = *machine.fibers[i];
      if (fiber.done || (fiber.awaited && *fiber.awaited == fiber.seen)) continue;
      fiber.awaited = nullptr;
      anyone = true;
      resume(fiber);
    }
    if (!anyone) fail("%u threads wait for others that never come", machine.alive);
  }
}

inline void on_signal(int signal) {
  fail("%s", signal == SIGILL ? "a misaligned access or undefined arithmetic" : "an address that is not its own");
}

// Signals that a wrong kernel causes end its launch, not the process.
class Traps {
 public:
  Traps() {
    struct sigaction action {};
    action.sa_handler = on_signal;
    action.sa_flags = SA_NODEFER;
    for (int i = 0; i < 4; ++i) sigaction(kSignals[i], &action, &before_[i]);
  }
  ~Traps() {
    for (int i = 0; i < 4; ++i) sigaction(kSignals[i], &before_[i], nullptr);
  }

 private:
  static constexpr int kSignals[4] = {SIGILL, SIGSEGV, SIGBUS, SIGFPE};
  struct sigaction before_[4];
};

inline cudaError_t run_grid(dim3 grid, dim3 block, size_t shared_bytes, std::function<void()> kernel) {
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (threads == 0 || threads > kMaxThreads || block.z > 64 || shared_bytes > kEmulatedSharedBytes || grid.x == 0 ||
      grid.x > 0x7fffffffu || grid.y == 0 || grid.y > 65535 || grid.z == 0 || grid.z > 65535) {
    return cudaErrorInvalidConfiguration;
  }
  Traps traps;
  machine.kernel = std::move(kernel);
  machine.shared.assign(shared_bytes + 128, 0);
  gridDim = grid;
  blockDim = block;
  if (sigsetjmp(machine.fault, 1) != 0) {
    machine.fibers.clear();
    machine.current = nullptr;
    return cudaErrorLaunchFailure;
  }
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  const bool backwards = next_random() >> 31;
  for (uint64_t turn = 0; turn < blocks; ++turn) {
    const uint64_t i = backwards ? blocks - 1 - turn : turn;
    blockIdx = {static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y),
                static_cast<unsigned>(i / grid.x / grid.y)};
    run_block(static_cast<unsigned>(threads));
  }
  return cudaSuccess;
}

}  // namespace cuda_emulator

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  return cuda_emulator::run_grid(config->gridDim, config->blockDim, config->dynamicSmemBytes,
                                 [=] { kernel(static_cast<Parameters>(arguments)...); });
}

template <typename... Parameters>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void (*)(Parameters...), int, size_t) {
  *blocks = 2;
  return cudaSuccess;
}

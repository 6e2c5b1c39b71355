// Kernels of several ranks that exchange data, with a bug each, and the same without, for tests of csrc/simt.
#include <cstring>

#include "simt/simt.h"

namespace {

constexpr int kThreads = 64, kRanks = 3, kLaunches = 3;

// Of each rank, mapped by all.
struct Memory {
  std::uint64_t arrived[kRanks];
  int data[2][kThreads];
};

struct Ranks {
  Memory* memory[kRanks];
  int rank;
  unsigned* step;  // of this rank, which counts them over the launches
  int* output;     // [kThreads]
};

int thread_id() {
  return static_cast<int>(threadIdx.x);
}
// The site and the address of its caller are what a finding tells.
__attribute__((noinline)) void set_flag(std::uint64_t* flag, std::uint64_t value, simt::Order order) {
  simt::store_strong(flag, sizeof(*flag), value, order, __builtin_return_address(0));
}
__attribute__((noinline)) std::uint64_t flag(const std::uint64_t* flag, simt::Order order,
                                             simt::Site site = simt::Site::here()) {
  return simt::load_strong(flag, sizeof(*flag), order, site, __builtin_return_address(0));
}

// What an exchange is made of; a bug leaves one thing out.
struct Parts {
  simt::Order release = simt::Order::kRelease, acquire = simt::Order::kAcquire;
  bool barrier_before = true, wait = true, barrier_after = true;
  unsigned buffers = 2, steps_missing = 0;
};

// All ranks hand over a number per thread, and add up those of the thread opposite.
__device__ void exchange(const Ranks& ranks, const Parts& parts) {
  const unsigned step = *ranks.step + 1;
  const int me = thread_id(), buffer = static_cast<int>(step % parts.buffers);
  ranks.memory[ranks.rank]->data[buffer][me] = me + 1000 * ranks.rank + static_cast<int>(step);  // hands over
  if (parts.barrier_before) __syncthreads();
  if (me < kRanks) {
    set_flag(&ranks.memory[me]->arrived[ranks.rank], step, parts.release);
    while (parts.wait && flag(&ranks.memory[ranks.rank]->arrived[me], parts.acquire) < step - parts.steps_missing) {
    }
  }
  if (parts.barrier_after) __syncthreads();
  int sum = 0;
  for (int r = 0; r < kRanks; ++r) sum += ranks.memory[r]->data[buffer][kThreads - 1 - me];  // takes
  ranks.output[me] = sum;
  __syncthreads();
  if (me == 0) *ranks.step = step;
}

__global__ void all_parts(Ranks ranks) {
  exchange(ranks, {});
}
__global__ void relaxed_release(Ranks ranks) {
  exchange(ranks, {.release = simt::Order::kRelaxed});
}
__global__ void relaxed_acquire(Ranks ranks) {
  exchange(ranks, {.acquire = simt::Order::kRelaxed});
}
__global__ void no_barrier_before(Ranks ranks) {
  exchange(ranks, {.barrier_before = false});
}
__global__ void no_wait(Ranks ranks) {
  exchange(ranks, {.wait = false});
}
__global__ void no_barrier_after(Ranks ranks) {
  exchange(ranks, {.barrier_after = false});
}
__global__ void one_buffer(Ranks ranks) {
  exchange(ranks, {.buffers = 1});
}
__global__ void waits_for_the_step_before(Ranks ranks) {
  exchange(ranks, {.steps_missing = 1});
}

// A flag that whoever it was meant for takes back: it may have been set once more by then.
__global__ void flag_is_taken_back(Ranks ranks) {
  const int me = thread_id();
  if (me < kRanks) {
    std::uint64_t* flags = ranks.memory[ranks.rank]->arrived;
    set_flag(&ranks.memory[me]->arrived[ranks.rank], 1, simt::Order::kRelease);
    while (flag(&flags[me], simt::Order::kAcquire) == 0) {  // bug: flag_is_taken_back
    }
    set_flag(&flags[me], 0, simt::Order::kRelease);
  }
  ranks.output[me] = 1;
}

__global__ void memory_of_another_rank(Ranks ranks) {
  int* const others = ranks.output + (ranks.rank == 0 ? kThreads : -kThreads);
  others[thread_id()] = 1;  // bug: memory_of_another_rank
}

// Stores that are on their way while their thread looks at what others have stored: all may miss all.
__global__ void stores_behind_loads(Ranks ranks) {
  if (thread_id() > 0 || *ranks.step > 0) return;
  *ranks.step = 1;
  int others = 0;
  for (int r = 0; r < kRanks; ++r) set_flag(&ranks.memory[r]->arrived[ranks.rank], 1, simt::Order::kRelease);
  for (int r = 0; r < kRanks; ++r)
    if (r != ranks.rank) others += static_cast<int>(flag(&ranks.memory[ranks.rank]->arrived[r], simt::Order::kAcquire));
  ranks.output[0] = others;
}

// A word and, behind it, the flag that tells of it; both with accesses that nobody else's are a race with.
__device__ void send_word(const Ranks& ranks, simt::Order order) {
  if (thread_id() > 0 || *ranks.step > 0) return;
  *ranks.step = 1;
  std::uint64_t* const words = ranks.memory[1]->arrived;
  if (ranks.rank == 0) {
    set_flag(&words[0], 7, simt::Order::kRelaxed);
    set_flag(&words[1], 1, order);
  } else if (ranks.rank == 1) {
    while (flag(&words[1], simt::Order::kAcquire) == 0) {
    }
    ranks.output[0] = static_cast<int>(flag(&words[0], simt::Order::kRelaxed));
  }
}
__global__ void word_and_release(Ranks ranks) {
  send_word(ranks, simt::Order::kRelease);
}
__global__ void word_and_relaxed_flag(Ranks ranks) {
  send_word(ranks, simt::Order::kRelaxed);
}

// Time passes when all wait.
__global__ void gives_up(Ranks ranks) {
  const std::uint64_t started = simt::nanoseconds();
  if (thread_id() == 0)
    while (flag(&ranks.memory[ranks.rank]->arrived[0], simt::Order::kAcquire) == 0 &&
           simt::nanoseconds() - started < 20'000'000'000u) {
    }
  ranks.output[thread_id()] = static_cast<int>((simt::nanoseconds() - started) / 1'000'000'000u);
}

struct Kernel {
  const char* name;
  void (*kernel)(Ranks);
};

constexpr Kernel kKernels[] = {
    {"all_parts", all_parts},
    {"relaxed_release", relaxed_release},
    {"relaxed_acquire", relaxed_acquire},
    {"no_barrier_before", no_barrier_before},
    {"no_wait", no_wait},
    {"no_barrier_after", no_barrier_after},
    {"one_buffer", one_buffer},
    {"waits_for_the_step_before", waits_for_the_step_before},
    {"flag_is_taken_back", flag_is_taken_back},
    {"memory_of_another_rank", memory_of_another_rank},
    {"stores_behind_loads", stores_behind_loads},
    {"word_and_release", word_and_release},
    {"word_and_relaxed_flag", word_and_relaxed_flag},
    {"gives_up", gives_up},
};

}  // namespace

// Runs the kernel of this name three times on each of three ranks and writes output[rank][thread]; what was found, or
// null.
extern "C" __attribute__((visibility("default"))) const char* run_planted(const char* name, unsigned long seed,
                                                                          int* output) {
  static Memory memory[kRanks];
  static unsigned steps[kRanks];
  for (const Kernel& kernel : kKernels) {
    if (std::strcmp(kernel.name, name) != 0) continue;
    std::memset(memory, 0, sizeof(memory));
    std::memset(steps, 0, sizeof(steps));
    simt::set_seed(seed);
    for (Memory& of_rank : memory) simt::map(&of_rank, sizeof(of_rank), 4, "memory");
    simt::begin_ranks(kRanks);
    for (int r = 0; r < kRanks; ++r) {
      simt::set_rank(r);
      simt::allow(output + r * kThreads, kThreads * sizeof(int), 4, true, "output");
      simt::allow(steps + r, sizeof(unsigned), 4, true, "steps");
      const Ranks ranks = {{&memory[0], &memory[1], &memory[2]}, r, &steps[r], output + r * kThreads};
      for (int i = 0; i < kLaunches; ++i) simt::launch({name, {1}, {kThreads}}, kernel.kernel, ranks);
    }
    const char* finding = simt::run_ranks();
    simt::unmap_within(memory, sizeof(memory));
    return finding;
  }
  return "no such kernel";
}

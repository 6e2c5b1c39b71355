// Kernels with a bug each, and the same without, for tests of csrc/simt.
#include <cstring>

#include "simt/ptx.h"
#include "simt/simt.h"

namespace {

namespace ptx = teco::cuda::ptx;

constexpr int kThreads = 64;

struct Memory {
  int values[kThreads];
  alignas(16) char bytes[80];
};
const char kTag = 0;
Memory& shared() {
  return *static_cast<Memory*>(simt::shared_memory(&kTag, sizeof(Memory), 16, 4));
}
// cp.async of 16 bytes.
__attribute__((noinline)) void copy_async(int* target, const int* source) {
  simt::copy_async(target, source, 16, 16, __builtin_return_address(0));
}
int thread_id() {
  return static_cast<int>(threadIdx.x);
}

struct Data {
  const int* input;  // [kThreads]
  int* output;       // [kThreads]
};

__global__ void reverse(Data data) {
  Memory& memory = shared();
  memory.values[thread_id()] = data.input[thread_id()];
  __syncthreads();
  data.output[thread_id()] = memory.values[kThreads - 1 - thread_id()];
}

__global__ void missing_barrier(Data data) {
  Memory& memory = shared();
  memory.values[thread_id()] = data.input[thread_id()];
  data.output[thread_id()] = memory.values[thread_id() ^ 1];  // bug: missing_barrier
}

__global__ void missing_second_barrier(Data data) {
  Memory& memory = shared();
  for (int round = 0; round < 2; ++round) {
    memory.values[thread_id()] = data.input[thread_id()] + round;  // bug: missing_second_barrier
    __syncthreads();
    data.output[thread_id()] = memory.values[(thread_id() + 32) % kThreads];
  }
}

__global__ void warp_barrier(Data data) {
  Memory& memory = shared();
  memory.values[thread_id()] = data.input[thread_id()];
  __syncwarp();
  data.output[thread_id()] = memory.values[thread_id() ^ 1];
}

__global__ void warp_barrier_between_warps(Data data) {
  Memory& memory = shared();
  memory.values[thread_id()] = data.input[thread_id()];
  __syncwarp();
  data.output[thread_id()] = memory.values[thread_id() ^ 32];  // bug: warp_barrier_between_warps
}

__global__ void divergent_barrier(Data data) {
  Memory& memory = shared();
  memory.values[thread_id()] = data.input[thread_id()];
  if (thread_id() < 32) {
    __syncthreads();
  } else {
    __syncthreads();  // bug: divergent_barrier
  }
  data.output[thread_id()] = memory.values[thread_id()];
}

__global__ void barrier_in_a_branch(Data data) {
  if (thread_id() < 32) __syncthreads();  // bug: barrier_in_a_branch
  data.output[thread_id()] = data.input[thread_id()];
}

__global__ void early_return(Data data) {
  if (thread_id() == 5) return;
  __syncthreads();  // bug: early_return
  data.output[thread_id()] = data.input[thread_id()];
}

__global__ void uninitialised(Data data) {
  Memory& memory = shared();
  if (thread_id() != 7) memory.values[thread_id()] = data.input[thread_id()];
  __syncthreads();
  data.output[thread_id()] = memory.values[(thread_id() + 1) % kThreads];  // bug: uninitialised
}

__global__ void left_by_another_block(Data data) {
  Memory& memory = shared();
  if (blockIdx.x == 0) memory.values[thread_id()] = data.input[thread_id()];
  __syncthreads();
  const int value = memory.values[thread_id()];  // bug: left_by_another_block
  if (value >= 0 && blockIdx.x == 0) data.output[thread_id()] = value;
}

__global__ void beyond_global(Data data) {
  data.output[thread_id()] = data.input[thread_id() + 1];  // bug: beyond_global
}

__global__ void before_global(Data data) {
  data.output[thread_id() - 1] = data.input[thread_id()];  // bug: before_global
}

__global__ void beyond_shared(Data data) {
  int* values = reinterpret_cast<int*>(shared().bytes) + 20 - kThreads;  // the last one fits
  values[thread_id() + 1] = data.input[thread_id()];                     // bug: beyond_shared
}

__global__ void beyond_array(Data data) {
  Memory& memory = shared();
  memory.values[thread_id() + 1] = data.input[thread_id()];  // bug: beyond_array
}

__global__ void write_to_input(Data data) {
  const_cast<int*>(data.input)[thread_id()] = 0;  // bug: write_to_input
}

__global__ void same_place(Data data) {
  data.output[thread_id() / 2] = data.input[thread_id()];  // bug: same_place
}

__global__ void between_blocks(Data data) {
  data.output[thread_id()] = data.input[thread_id()] + static_cast<int>(blockIdx.x);  // bug: between_blocks
}

__global__ void atomics(Data data) {
  atomicAdd(data.output + thread_id() / 2, data.input[thread_id()]);
}

__global__ void atomic_and_plain(Data data) {
  if (thread_id() == 0) data.output[0] = 1;
  atomicAdd(data.output, 1);  // bug: atomic_and_plain
}

__global__ void misaligned(Data data) {
  const ptx::Words<4> words = ptx::load_16(data.input + 2 * (thread_id() % 4));  // bug: misaligned
  data.output[thread_id()] = static_cast<int>(words.at[0]);
}

__global__ void lane_outside_of_mask(Data data) {
  int value = data.input[thread_id()];
  if (thread_id() % 32 < 16) value = __shfl_sync(0xffffu, value, 20);  // bug: lane_outside_of_mask
  data.output[thread_id()] = value;
}

__global__ void half_of_the_mask(Data data) {
  int value = data.input[thread_id()];
  if (thread_id() % 32 < 16) value = __shfl_xor_sync(0xffffffffu, value, 1);  // bug: half_of_the_mask
  data.output[thread_id()] = value;
}

__global__ void two_shuffles(Data data) {
  int value = data.input[thread_id()];
  if (thread_id() % 2) {
    value = __shfl_xor_sync(0xffffffffu, value, 1);
  } else {
    value = __shfl_xor_sync(0xffffffffu, value, 1);  // bug: two_shuffles
  }
  data.output[thread_id()] = value;
}

__global__ void halves_by_themselves(Data data) {
  const unsigned mask = thread_id() % 32 < 16 ? 0xffffu : 0xffff0000u;
  data.output[thread_id()] = __shfl_xor_sync(mask, data.input[thread_id()], 1);
}

__global__ void waits_for_copies(Data data) {
  Memory& memory = shared();
  if (thread_id() % 4 == 0) copy_async(memory.values + thread_id(), data.input + thread_id());
  simt::commit_copies();
  simt::wait_for_copies(0);
  __syncthreads();
  data.output[thread_id()] = memory.values[kThreads - 1 - thread_id()];
}

__global__ void missing_wait(Data data) {
  Memory& memory = shared();
  if (thread_id() % 4 == 0) copy_async(memory.values + thread_id(), data.input + thread_id());
  simt::commit_copies();
  simt::wait_for_copies(1);
  __syncthreads();
  data.output[thread_id()] = memory.values[kThreads - 1 - thread_id()];  // bug: missing_wait
  simt::wait_for_copies(0);
}

__global__ void wait_behind_barrier(Data data) {
  Memory& memory = shared();
  if (thread_id() % 4 == 0) copy_async(memory.values + thread_id(), data.input + thread_id());
  simt::commit_copies();
  __syncthreads();
  simt::wait_for_copies(0);
  data.output[thread_id()] = memory.values[kThreads - 1 - thread_id()];  // bug: wait_behind_barrier
}

__global__ void overwritten_before_arrival(Data data) {
  Memory& memory = shared();
  if (thread_id() % 4 == 0) copy_async(memory.values + thread_id(), data.input + thread_id());
  simt::commit_copies();
  if (thread_id() % 4 == 0) memory.values[thread_id() + 1] = 0;  // bug: overwritten_before_arrival
  simt::wait_for_copies(0);
}

__global__ void source_changes(Data data) {
  Memory& memory = shared();
  data.output[thread_id()] = data.input[thread_id()];
  __syncthreads();
  if (thread_id() % 4 == 0) copy_async(memory.values + thread_id(), data.output + thread_id());  // bug: source_changes
  simt::commit_copies();
  __syncthreads();
  data.output[thread_id() ^ 1] = 0;
  __syncthreads();
  simt::wait_for_copies(0);
}

__global__ void large_shift(Data data) {
  data.output[thread_id()] = data.input[0] << thread_id();  // bug: large_shift
}

__global__ void overflow(Data data) {
  data.output[thread_id()] = 0x7fffffff + data.input[thread_id()];  // bug: overflow
}

struct Kernel {
  const char* name;
  void (*kernel)(Data);
  dim3 blocks = {}, threads = {kThreads};
  size_t dynamic_bytes = 0;
};

constexpr Kernel kKernels[] = {
    {"reverse", reverse},
    {"missing_barrier", missing_barrier},
    {"missing_second_barrier", missing_second_barrier},
    {"warp_barrier", warp_barrier},
    {"warp_barrier_between_warps", warp_barrier_between_warps},
    {"divergent_barrier", divergent_barrier},
    {"barrier_in_a_branch", barrier_in_a_branch},
    {"early_return", early_return},
    {"uninitialised", uninitialised},
    {"left_by_another_block", left_by_another_block, {2}},
    {"beyond_global", beyond_global},
    {"before_global", before_global},
    {"beyond_shared", beyond_shared},
    {"beyond_array", beyond_array},
    {"write_to_input", write_to_input},
    {"same_place", same_place},
    {"between_blocks", between_blocks, {2}},
    {"atomics", atomics},
    {"atomic_and_plain", atomic_and_plain},
    {"misaligned", misaligned},
    {"lane_outside_of_mask", lane_outside_of_mask},
    {"half_of_the_mask", half_of_the_mask},
    {"two_shuffles", two_shuffles},
    {"halves_by_themselves", halves_by_themselves},
    {"waits_for_copies", waits_for_copies},
    {"missing_wait", missing_wait},
    {"wait_behind_barrier", wait_behind_barrier},
    {"overwritten_before_arrival", overwritten_before_arrival},
    {"source_changes", source_changes},
    {"large_shift", large_shift},
    {"overflow", overflow},
    {"no_threads", reverse, {1}, {0}},
    {"too_many_threads", reverse, {1}, {1025}},
    {"no_blocks", reverse, {0}},
    {"too_many_rows", reverse, {1, 65536}},
    {"too_much_shared_memory", reverse, {1}, {kThreads}, 99 * 1024 + 1},
};

}  // namespace

// Runs the kernel of this name on input[i] = i + 1 and writes output; what was found, or null.
extern "C" __attribute__((visibility("default"))) const char* run_planted(const char* name, unsigned long seed,
                                                                          int* output) {
  alignas(16) static int input[kThreads];
  for (int i = 0; i < kThreads; ++i) input[i] = i + 1;
  for (const Kernel& kernel : kKernels) {
    if (std::strcmp(kernel.name, name) != 0) continue;
    simt::set_seed(seed);
    simt::allow(input, sizeof(input), 4, false, "input");
    simt::allow(output, sizeof(input), 4, true, "output");
    const char* finding =
        simt::launch({name, kernel.blocks, kernel.threads, kernel.dynamic_bytes}, kernel.kernel, Data{input, output});
    simt::forget_allowed();
    return finding;
  }
  return "no such kernel";
}

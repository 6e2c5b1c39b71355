// Runs CUDA kernels on a CPU: what a kernel's source sees in place of the CUDA headers, and how it is launched.
//
// Every CUDA thread is a fiber; the threads of a block take turns. Blocks come one after the other, but those of
// several ranks take turns too. Whose turn it is is decided by a seed. Memory accesses are seen through the compiler's
// instrumentation (see README.md).
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#define __global__ static
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

namespace simt {

// Where in a kernel's source a call stands.
struct Site {
  const char* file = nullptr;
  unsigned line = 0;

  // As the default of a parameter: where the function is called.
  static constexpr Site here(const char* file = __builtin_FILE(), unsigned line = __builtin_LINE()) {
    return {file, line};
  }
};

uint3 thread_index();
uint3 block_index();
dim3 block_dim();
dim3 grid_dim();

// Whether any thread came with `vote`.
bool sync_threads(bool vote, Site site);
// Also orders the memory accesses of the warp when `order_memory`. Every lane of `mask` hands in `bytes` bytes (64 at
// the most) and gets those of all 32, one lane after the other; what lanes outside of the mask have is undefined.
void gather(const char* name, unsigned mask, const void* mine, std::size_t bytes, void* all, bool order_memory,
            Site site);
// The one of the lanes that `source` names.
std::uint64_t shuffle(const char* name, unsigned mask, std::uint64_t value, int source, Site site);
unsigned ballot(const char* name, unsigned mask, bool predicate, Site site);

// Memory of the block's own, the same for all of its threads; `tag` tells one request from another. `granule`: the size
// of the smallest element in it, for whose sake alone races are told apart.
void* shared_memory(const void* tag, std::size_t bytes, std::size_t alignment, std::size_t granule);
void* dynamic_shared_memory();

enum class Access : std::uint8_t { kRead, kWrite, kAtomic };
// Checks an access as if the instrumentation had seen it.
void check_access(const void* address, std::size_t bytes, Access access, const void* code);
// The same for one that must be aligned to its size, as those of 16 bytes must.
void check_aligned_access(const void* address, std::size_t bytes, Access access, const void* code);

// Accesses of the system's scope (.sys), to words that several ranks write and read meanwhile: relaxed ones, a release,
// and an acquire. Every such load lets other threads go on.
enum class Order : std::uint8_t { kRelaxed, kRelease, kAcquire };
std::uint64_t load_strong(const void* address, std::size_t bytes, Order order, Site site, const void* code);
void store_strong(void* address, std::size_t bytes, std::uint64_t value, Order order, const void* code);
// A clock, which moves on when all threads do nothing but wait.
std::uint64_t nanoseconds();

// cp.async: the data arrive when the thread waits for the group that the copy belongs to, and not before. Of the
// `bytes` bytes at `target`, the first `source_bytes` come from `source`, the others are zeros.
void copy_async(void* target, const void* source, std::size_t bytes, std::size_t source_bytes, const void* code);
void commit_copies();
void wait_for_copies(std::size_t pending_groups);

int lane();

struct Launch {
  const char* kernel;
  dim3 blocks, threads;
  std::size_t dynamic_shared_bytes = 0;
};

// Runs the kernel; null, or a text that tells what was found (until the thread's next launch). Between begin_ranks()
// and run_ranks() it is only put in line.
const char* run(const Launch& launch, void (*body)(void*), void* arguments, std::size_t argument_bytes);

// A launch as a driver would be given it: the kernel by its address, and where each argument lies.
struct Argument {
  const void* data;
  std::size_t bytes;
};
using Interceptor = const char* (*)(const Launch& launch, const void* kernel, const Argument* arguments,
                                    std::size_t count);
// What launches go to in place of the emulation: it runs what another compiler made of the same kernel. Null ends it.
void intercept(Interceptor interceptor);
Interceptor interceptor();

template <class... Parameters>
const char* launch(const Launch& launch, void (*kernel)(Parameters...), Parameters... arguments) {
  if (const Interceptor run_elsewhere = interceptor()) {
    const Argument list[] = {{&arguments, sizeof(arguments)}...};
    return run_elsewhere(launch, reinterpret_cast<const void*>(kernel), list, sizeof...(arguments));
  }
  auto body = [=] { kernel(arguments...); };
  static_assert((std::is_trivially_copyable_v<Parameters> && ...));
  return run(launch, [](void* context) { (*static_cast<decltype(body)*>(context))(); }, &body, sizeof(body));
}

// 0: threads and blocks in order; 1: in reverse; others: at random, and interrupted anywhere.
void set_seed(std::uint64_t seed);

// Several ranks: launches, and memory that is allowed, belong to the one that was set last. run_ranks() runs the
// launches of each rank in their order, those of different ranks at the same time, and ends this mode; what it returns
// is as of run().
void begin_ranks(int count);
void set_rank(int rank);
const char* run_ranks();

// Memory that kernels may use from now on; once there is any, all other is out of bounds. The name is that of an
// argument.
void allow(const void* begin, std::size_t bytes, std::size_t granule, bool writable, const char* name);
void forget_allowed();
// Memory that all ranks have mapped, for as long as it is there: what a block stores in it reaches other blocks late.
void map(const void* begin, std::size_t bytes, std::size_t granule, const char* name);
void unmap_within(const void* begin, std::size_t bytes);
// More memory for the kernels, where there is any that they may use.
void allow_workspace(const void* begin, std::size_t bytes, std::size_t granule);

template <class T>
T shuffle_as(const char* name, unsigned mask, T value, int source, Site site) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  std::uint64_t bits = 0;
  __builtin_memcpy(&bits, &value, sizeof(T));
  bits = shuffle(name, mask, bits, source, site);
  __builtin_memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace simt

#define threadIdx (::simt::thread_index())
#define blockIdx (::simt::block_index())
#define blockDim (::simt::block_dim())
#define gridDim (::simt::grid_dim())

inline void __syncthreads(simt::Site site = simt::Site::here()) {
  simt::sync_threads(false, site);
}
inline int __syncthreads_or(int predicate, simt::Site site = simt::Site::here()) {
  return simt::sync_threads(predicate != 0, site);
}
inline void __syncwarp(unsigned mask = 0xffffffffu, simt::Site site = simt::Site::here()) {
  char none = 0, all[32];
  simt::gather("__syncwarp", mask, &none, 1, all, true, site);
}
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, simt::Site site = simt::Site::here()) {
  const int first = simt::lane() & ~(width - 1);
  return simt::shuffle_as("__shfl_sync", mask, value, first | (source & (width - 1)), site);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, simt::Site site = simt::Site::here()) {
  const int lane = simt::lane(), source = lane ^ lane_mask;
  const bool inside = (source & ~(width - 1)) == (lane & ~(width - 1));
  return simt::shuffle_as("__shfl_xor_sync", mask, value, inside ? source : lane, site);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, simt::Site site = simt::Site::here()) {
  const int lane = simt::lane(), distance = static_cast<int>(delta);
  return simt::shuffle_as("__shfl_down_sync", mask, value, lane % width + distance < width ? lane + distance : lane,
                          site);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, simt::Site site = simt::Site::here()) {
  const int lane = simt::lane(), distance = static_cast<int>(delta);
  return simt::shuffle_as("__shfl_up_sync", mask, value, lane % width >= distance ? lane - distance : lane, site);
}
inline unsigned __ballot_sync(unsigned mask, bool predicate, simt::Site site = simt::Site::here()) {
  return simt::ballot("__ballot_sync", mask, predicate, site);
}
inline bool __any_sync(unsigned mask, bool predicate, simt::Site site = simt::Site::here()) {
  return simt::ballot("__any_sync", mask, predicate, site) != 0;
}
inline bool __all_sync(unsigned mask, bool predicate, simt::Site site = simt::Site::here()) {
  return (simt::ballot("__all_sync", mask, !predicate, site)) == 0;
}

// Threads are interrupted between accesses and never within these.
template <class T>
__attribute__((noinline, no_sanitize("thread"))) T atomicAdd(T* address, T value) {
  simt::check_aligned_access(address, sizeof(T), simt::Access::kAtomic, __builtin_return_address(0));
  const T old = *address;
  *address = old + value;
  return old;
}
template <class T>
__attribute__((noinline, no_sanitize("thread"))) T atomicMax(T* address, T value) {
  simt::check_aligned_access(address, sizeof(T), simt::Access::kAtomic, __builtin_return_address(0));
  const T old = *address;
  *address = old < value ? value : old;
  return old;
}

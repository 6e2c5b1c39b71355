#include "cpu/thread_pool.h"

#include <pthread.h>

#include <atomic>
#include <cstdlib>
#include <exception>
#include <mutex>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <utility>

namespace teco::cpu {
namespace {

// How long a worker spins for the next job before it sleeps. A decode step issues an operator every few microseconds:
// sleeping in between costs a wake-up each (~5 us), spinning without end would starve whoever else needs the core.
constexpr int kWorkerSpins = 2000;  // ~40 us
constexpr int kCallerSpins = 4000;
constexpr int kChunksPerThread = 4;
constexpr int kMaxThreads = 256;

inline void cpu_pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// How a thread rounds, and whether it takes denormals for zeros, without the flags that computing leaves behind.
#if defined(__x86_64__)
constexpr uint32_t kExceptionFlags = 0x3f;
inline uint32_t float_mode() {
  return __builtin_ia32_stmxcsr() & ~kExceptionFlags;
}
inline void set_float_mode(uint32_t mode) {
  __builtin_ia32_ldmxcsr(mode);
}
#elif defined(__aarch64__)
inline uint32_t float_mode() {
  uint64_t mode;
  asm volatile("mrs %0, fpcr" : "=r"(mode));
  return static_cast<uint32_t>(mode);
}
inline void set_float_mode(uint32_t mode) {
  asm volatile("msr fpcr, %0" : : "r"(uint64_t{mode}));
}
#else
inline uint32_t float_mode() {
  return 0;
}
inline void set_float_mode(uint32_t) {}
#endif

thread_local bool inside_body = false;

// A job is cut into chunks; `ticket_` holds the job's number (upper half) and its unclaimed chunks (lower half) in one
// word, so a worker that overslept can never claim a chunk of a job it does not know, and the caller waits only for
// chunks that were claimed, not for workers that have not woken up.
class ThreadPool {
 public:
  void run(int64_t count, int64_t grain, int num_threads, void (*body)(void*, int64_t, int64_t), void* context) {
    std::unique_lock lock(mutex_, std::try_to_lock);
    if (!lock.owns_lock()) {
      body(context, 0, count);
      return;
    }
    ensure_workers(num_threads - 1);
    const int64_t wanted = static_cast<int64_t>(num_threads) * kChunksPerThread;
    int64_t chunk = (count + wanted - 1) / wanted;
    chunk = chunk < grain ? grain : chunk;
    const auto num_chunks = static_cast<uint32_t>((count + chunk - 1) / chunk);

    body_ = body;
    context_ = context;
    count_ = count;
    chunk_ = chunk;
    num_chunks_ = num_chunks;
    float_mode_ = float_mode();
    helpers_ = num_threads - 1;
    done_.store(0, std::memory_order_relaxed);
    const uint32_t job = job_.load(std::memory_order_relaxed) + 1;
    ticket_.store(static_cast<uint64_t>(job) << 32 | num_chunks, std::memory_order_release);
    job_.store(job, std::memory_order_release);
    job_.notify_all();

    work(job);
    for (int spins = 0; done_.load(std::memory_order_acquire) != num_chunks; ++spins) {
      if (spins < kCallerSpins) {
        cpu_pause();
      } else {
        std::this_thread::yield();
      }
    }
    if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
  }

 private:
  // Where the system gives no more threads there are fewer: the caller does what nobody else takes.
  void ensure_workers(int wanted) {
    try {
      for (; num_workers_ < wanted; ++num_workers_)
        std::thread([this, index = num_workers_, job = job_.load()] { worker(index, job); }).detach();
    } catch (const std::system_error&) {
    }
  }

  void worker(int index, uint32_t job) {
    for (;;) {
      for (int spins = 0; spins < kWorkerSpins && job_.load(std::memory_order_acquire) == job; ++spins) cpu_pause();
      job_.wait(job, std::memory_order_acquire);
      job = job_.load(std::memory_order_acquire);
      if (index < helpers_.load(std::memory_order_relaxed)) work(job);
    }
  }

  void work(uint32_t job) {
    inside_body = true;
    uint64_t ticket = ticket_.load(std::memory_order_acquire);
    while (ticket >> 32 == job && static_cast<uint32_t>(ticket) != 0) {
      if (!ticket_.compare_exchange_weak(ticket, ticket - 1, std::memory_order_acq_rel)) continue;
      // Claimed: the job cannot end, nor its fields change, before done_ has been raised below.
      if (float_mode() != float_mode_) set_float_mode(float_mode_);  // bits do not depend on who takes a chunk
      const int64_t index = num_chunks_ - static_cast<uint32_t>(ticket);
      const int64_t begin = index * chunk_;
      const int64_t end = begin + chunk_ < count_ ? begin + chunk_ : count_;
      try {
        body_(context_, begin, end);
      } catch (...) {  // a worker must not end the process, nor the caller leave while others are at work
        const std::lock_guard lock(error_mutex_);
        if (!error_) error_ = std::current_exception();
      }
      done_.fetch_add(1, std::memory_order_release);
      ticket = ticket_.load(std::memory_order_acquire);
    }
    inside_body = false;
  }

  std::mutex mutex_;
  std::mutex error_mutex_;
  std::exception_ptr error_;  // the first one of the job
  int num_workers_ = 0;
  void (*body_)(void*, int64_t, int64_t) = nullptr;
  void* context_ = nullptr;
  int64_t count_ = 0, chunk_ = 0;
  uint32_t num_chunks_ = 0, float_mode_ = 0;
  std::atomic<int> helpers_{0};
  alignas(64) std::atomic<uint64_t> ticket_{0};
  alignas(64) std::atomic<uint32_t> job_{0};
  alignas(64) std::atomic<uint32_t> done_{0};
};

// Never destroyed: workers may outlive the static destructors. Replaced in a forked child, where no worker lives on.
std::atomic<ThreadPool*> pool{nullptr};
[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, [] { pool.store(nullptr); });

ThreadPool& the_pool() {  // without a lock, which a fork might leave held in the child
  ThreadPool* existing = pool.load(std::memory_order_acquire);
  if (existing) return *existing;
  auto* made = new ThreadPool;
  if (pool.compare_exchange_strong(existing, made)) return *made;
  delete made;
  return *existing;
}

struct ScratchBuffer {
  ~ScratchBuffer() {  // and may be used again: other destructors of the thread come later
    std::free(data);
    data = nullptr;
    size = 0;
  }
  void* data = nullptr;
  size_t size = 0;
};

thread_local ScratchBuffer scratch[3];  // of each kind

}  // namespace

void run_parallel(int64_t count, int64_t grain, int num_threads, void (*body)(void*, int64_t, int64_t), void* context) {
  if (count <= 0) return;
  grain = grain < 1 ? 1 : grain;
  num_threads = num_threads > kMaxThreads ? kMaxThreads : num_threads;
  if (num_threads <= 1 || count <= grain || inside_body) {
    body(context, 0, count);
    return;
  }
  the_pool().run(count, grain, num_threads, body, context);
}

void* thread_scratch(Scratch kind, size_t bytes) {
  ScratchBuffer& buffer = scratch[static_cast<int>(kind)];
  if (buffer.size < bytes) {
    std::free(buffer.data);
    buffer.size = 0;
    const size_t size = (bytes + 4095) / 4096 * 4096;
    buffer.data = std::aligned_alloc(4096, size);
    if (!buffer.data) throw std::runtime_error("MemoryError: no " + std::to_string(size) + " bytes of scratch memory");
    buffer.size = size;
  }
  return buffer.data;
}

}  // namespace teco::cpu

// Sleeping on a word of shared memory.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>

namespace teco::comm {

// Sleeps while the word holds `value`, for no longer than that; may also return for no reason.
void futex_wait(std::atomic<uint32_t>& word, uint32_t value, std::chrono::nanoseconds at_most);
// Wakes all that sleep on the word, in any process.
void futex_wake(std::atomic<uint32_t>& word);

inline void cpu_pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace teco::comm

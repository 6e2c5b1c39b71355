// How often kernels have run, by the type of their params: what shows that an engine runs these and not its own.
#pragma once

#include <atomic>
#include <cstdint>
#include <string>

namespace teco::ops {

// Runs recorded in a plan count each time it is replayed.
template <class Params>
inline std::atomic<int64_t> kernel_calls{0};

template <class Params>
void count_kernel_call() {
  kernel_calls<Params>.fetch_add(1, std::memory_order_relaxed);
}

// Of one operator; those that share a kernel share a number.
int64_t kernel_calls_of(std::string name);

}  // namespace teco::ops

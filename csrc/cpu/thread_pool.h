// The one thread pool of the CPU backend.
#pragma once

#include <cstddef>
#include <cstdint>

namespace teco::cpu {

#pragma GCC visibility push(default)  // for the operators of torch, which are another library

// Runs body(context, begin, end) over [0, count) in chunks of at least `grain`, on the calling thread and up to
// num_threads - 1 workers; returns when all of it is done. Chunks are taken dynamically, so a kernel's result must not
// depend on how its range is cut. Called from inside a body, or while another thread uses the pool, it runs inline.
// An exception of a body comes out of run_parallel, once all other chunks are done.
void run_parallel(int64_t count, int64_t grain, int num_threads, void (*body)(void*, int64_t, int64_t), void* context);

// Scratch memory of the calling thread, 64-byte aligned, valid until the thread's next request of the same kind.
// kShared: asked for by the thread that calls run_parallel, read by all. kTask: asked for inside a body. kCaller: for a
// kernel that calls others, which ask for the first two.
// Throws a runtime_error, in the form of ops/checks.h, when there is no memory.
enum class Scratch : int { kShared, kTask, kCaller };
void* thread_scratch(Scratch kind, size_t bytes);

#pragma GCC visibility pop

}  // namespace teco::cpu

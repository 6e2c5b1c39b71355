// Functions that run on stacks of their own and hand control to each other.
#pragma once

#include <cstddef>

#if !defined(__x86_64__) && !defined(__aarch64__) && !defined(SIMT_PORTABLE_FIBERS)
#define SIMT_PORTABLE_FIBERS  // no assembly for this processor
#endif
#ifdef SIMT_PORTABLE_FIBERS
#include <ucontext.h>
#endif

namespace simt {

// Where a suspended function goes on.
struct Context {
#ifdef SIMT_PORTABLE_FIBERS
  ucontext_t state;
#else
  void* stack_pointer;
#endif
};

// Memory for a stack, with a page behind its end that cannot be touched.
class Stack {
 public:
  static constexpr std::size_t kBytes = 128 * 1024;
  Stack();
  ~Stack();
  Stack(Stack&& other) noexcept : memory_(other.memory_) { other.memory_ = nullptr; }
  Stack(const Stack&) = delete;
  char* begin() const { return memory_; }
  char* end() const { return memory_ + kBytes; }

 private:
  char* memory_;
};

// Makes `context` one that enters `entry` on the stack; `entry` must never return.
void prepare(Context& context, const Stack& stack, void (*entry)());

// Suspends the caller in `from` and goes on in `to`.
void switch_to(Context& from, Context& to);

}  // namespace simt

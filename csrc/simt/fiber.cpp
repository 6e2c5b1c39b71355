#include "simt/fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstring>
#include <new>

namespace simt {
namespace {

constexpr std::size_t kGuardBytes = 64 * 1024;  // a page, whatever its size is

}  // namespace

Stack::Stack() {
  void* memory =
      mmap(nullptr, kGuardBytes + kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  mprotect(memory, kGuardBytes, PROT_NONE);
  memory_ = static_cast<char*>(memory) + kGuardBytes;
}

Stack::~Stack() {
  if (memory_) munmap(memory_ - kGuardBytes, kGuardBytes + kBytes);
}

#ifdef SIMT_PORTABLE_FIBERS

void prepare(Context& context, const Stack& stack, void (*entry)()) {
  getcontext(&context.state);
  context.state.uc_stack.ss_sp = stack.begin();
  context.state.uc_stack.ss_size = Stack::kBytes;
  context.state.uc_link = nullptr;
  makecontext(&context.state, entry, 0);
}

void switch_to(Context& from, Context& to) {
  swapcontext(&from.state, &to.state);
}

#else

// Saves the registers that a call must keep, on the stack, and loads those that lie on the other one.
extern "C" void simt_switch(void** from, void* to);

#if defined(__x86_64__)
asm(R"(
.text
.type simt_switch, @function
simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch, .-simt_switch
)");
constexpr std::size_t kFrameWords = 8;  // six registers, the address to return to, and one that `entry` returns to
constexpr std::size_t kReturnWord = 6;
#else
asm(R"(
.text
.type simt_switch, %function
simt_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size simt_switch, .-simt_switch
)");
constexpr std::size_t kFrameWords = 20;
constexpr std::size_t kReturnWord = 11;  // x30
#endif

void prepare(Context& context, const Stack& stack, void (*entry)()) {
  auto* frame = reinterpret_cast<std::uintptr_t*>(stack.end()) - kFrameWords;
  std::memset(frame, 0, kFrameWords * sizeof(*frame));
  frame[kReturnWord] = reinterpret_cast<std::uintptr_t>(entry);
  context.stack_pointer = frame;
}

void switch_to(Context& from, Context& to) {
  simt_switch(&from.stack_pointer, to.stack_pointer);
}

#endif

}  // namespace simt

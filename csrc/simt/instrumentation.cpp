// What the compiler's instrumentation of a kernel's source calls: -fsanitize=thread for every access to memory that
// others may see, -fsanitize=bounds,shift,signed-integer-overflow for the rest. The sanitizers' own libraries are not
// linked; these are their functions, by their names.
#include <cstdio>
#include <cstdlib>
#include <string>

#include "simt/machine.h"

namespace simt {
namespace {

inline void see(const void* address, std::size_t bytes, Access access, bool aligned, const void* code) {
  if (!machine || !machine->in_kernel()) return;
  (aligned ? check_aligned_access : check_access)(address, bytes, access, code);
}

// How the data of a UBSan handler begin.
struct SourceLocation {
  const char* file;
  unsigned line, column;
};

void undefined(const char* what, const void* data) {
  const auto& location = *static_cast<const SourceLocation*>(data);
  const std::string text = what + std::string(" at ") + location.file + ":" + std::to_string(location.line);
  if (machine && machine->in_kernel()) return machine->fail(text);
  std::fprintf(stderr, "simt: outside of any kernel: %s\n", text.c_str());
  std::abort();
}

}  // namespace
}  // namespace simt

using simt::Access;

extern "C" {

#define SEE(SIZE)                                                           \
  void __tsan_read##SIZE(void* p) {                                         \
    simt::see(p, SIZE, Access::kRead, true, __builtin_return_address(0));   \
  }                                                                         \
  void __tsan_write##SIZE(void* p) {                                        \
    simt::see(p, SIZE, Access::kWrite, true, __builtin_return_address(0));  \
  }                                                                         \
  void __tsan_unaligned_read##SIZE(void* p) {                               \
    simt::see(p, SIZE, Access::kRead, false, __builtin_return_address(0));  \
  }                                                                         \
  void __tsan_unaligned_write##SIZE(void* p) {                              \
    simt::see(p, SIZE, Access::kWrite, false, __builtin_return_address(0)); \
  }
SEE(1)
SEE(2)
SEE(4)
SEE(8)
SEE(16)
#undef SEE

void __tsan_read_range(void* p, unsigned long bytes) {
  if (bytes) simt::see(p, bytes, Access::kRead, false, __builtin_return_address(0));
}
void __tsan_write_range(void* p, unsigned long bytes) {
  if (bytes) simt::see(p, bytes, Access::kWrite, false, __builtin_return_address(0));
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}

void __ubsan_handle_out_of_bounds(void* data, void*) {
  simt::undefined("index out of bounds of its array", data);
}
void __ubsan_handle_shift_out_of_bounds(void* data, void*, void*) {
  simt::undefined("shift by more bits than there are", data);
}
void __ubsan_handle_add_overflow(void* data, void*, void*) {
  simt::undefined("integer overflow in an addition", data);
}
void __ubsan_handle_sub_overflow(void* data, void*, void*) {
  simt::undefined("integer overflow in a subtraction", data);
}
void __ubsan_handle_mul_overflow(void* data, void*, void*) {
  simt::undefined("integer overflow in a multiplication", data);
}
void __ubsan_handle_divrem_overflow(void* data, void*, void*) {
  simt::undefined("integer overflow or zero in a division", data);
}
void __ubsan_handle_negate_overflow(void* data, void*) {
  simt::undefined("integer overflow in a negation", data);
}
}

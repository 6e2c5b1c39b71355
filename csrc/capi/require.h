// A failed check of the C interface: std::invalid_argument, whose text teco_last_error() returns.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <sstream>
#include <stdexcept>

namespace teco::capi {

template <class... Parts>
void require(bool condition, const Parts&... parts) {
  if (condition) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

inline void require_at_least(const char* field, int64_t value, int64_t least) {
  require(value >= least, field, ": expected a number >= ", least, ", got ", value);
}

// Far more than there is memory, and far from overflow.
constexpr int64_t kMaxSize = int64_t{1} << 40;
inline void require_size(const char* field, int64_t value, int64_t least) {
  require_at_least(field, value, least);
  require(value <= kMaxSize, field, ": expected at most 2^40, got ", value);
}

struct Pointer {
  const char* field;
  const void* value;
};
inline void require_pointers(std::initializer_list<Pointer> pointers) {
  for (const Pointer& pointer : pointers)
    require(pointer.value, pointer.field, ": expected an address, got a null pointer");
}

inline void require_bits(int32_t bits) {
  require(bits == 2 || bits == 3 || bits == 4 || bits == 8, "bits: expected 2, 3, 4 or 8, got ", bits);
}

}  // namespace teco::capi

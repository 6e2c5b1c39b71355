// Turns what C++ throws into what C returns.
#pragma once

#include <cstring>
#include <exception>
#include <stdexcept>

#include "capi/require.h"
#include "teco_kernels.h"

namespace teco::capi {

struct UnsupportedCpu : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Keeps what teco_last_error() returns to this thread.
void tell(const char* message);

template <class Body>
TecoStatus guarded(Body body) noexcept {
  TecoStatus status = TECO_OUT_OF_MEMORY;  // what is left: for scratch memory, or a worker thread
  try {
    body();
    return TECO_OK;
  } catch (const std::invalid_argument& error) {
    status = TECO_INVALID_ARGUMENT;
    tell(error.what());
  } catch (const UnsupportedCpu& error) {
    status = TECO_UNSUPPORTED_CPU;
    tell(error.what());
  } catch (const std::exception& error) {
    const char* prefix = "MemoryError: ";  // for Python
    const bool has_prefix = std::strncmp(error.what(), prefix, std::strlen(prefix)) == 0;
    tell(error.what() + (has_prefix ? std::strlen(prefix) : 0));
  }
  return status;
}

}  // namespace teco::capi

// Turns what C++ throws into what C returns.
#pragma once

#include <exception>
#include <stdexcept>
#include <string>

#include "capi/require.h"
#include "teco_kernels.h"

namespace teco::capi {

struct UnsupportedCpu : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// This thread's.
std::string& last_error();

template <class Body>
TecoStatus guarded(Body body) noexcept {
  TecoStatus status = TECO_OUT_OF_MEMORY;  // what is left: for scratch memory, or a worker thread
  try {
    body();
    return TECO_OK;
  } catch (const std::invalid_argument& error) {
    status = TECO_INVALID_ARGUMENT;
    last_error() = error.what();
  } catch (const UnsupportedCpu& error) {
    status = TECO_UNSUPPORTED_CPU;
    last_error() = error.what();
  } catch (const std::exception& error) {
    last_error() = error.what();
  }
  return status;
}

}  // namespace teco::capi

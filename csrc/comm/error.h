// The exceptions of this folder that a caller is meant to meet.
#pragma once

#include <exception>
#include <stdexcept>

#include "comm/visible.h"

namespace teco::comm {

// A collective did not take place; the communicator is of no further use. The text says which rank did what.
class TECO_VISIBLE CommunicatorError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// This rank was told, while it waited, to do something else (see set_interrupt_check).
class TECO_VISIBLE Interrupted : public std::exception {
 public:
  const char* what() const noexcept override { return "interrupted"; }
};

}  // namespace teco::comm

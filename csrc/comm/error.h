// The one exception of this folder that a caller is meant to meet.
#pragma once

#include <stdexcept>

#include "comm/visible.h"

namespace teco::comm {

// A collective did not take place; the communicator is of no further use. The text says which rank did what.
class TECO_VISIBLE CommunicatorError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

}  // namespace teco::comm

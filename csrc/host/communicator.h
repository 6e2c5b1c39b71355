// The classes of csrc/comm for Python. Their code is in _C, beside the kernels that they call.
#pragma once

#include <pybind11/pybind11.h>

namespace teco::host {

void bind_communicator(pybind11::module_& m);

}  // namespace teco::host

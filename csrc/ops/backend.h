// Where a call goes: tensors on a CUDA device to the CUDA kernels, those on the CPU to the CPU's kernels or, while that
// is switched on, to the emulated CUDA kernels. A caller with kernels of its own (Triton's, which Python launches) has
// them launched in place of these.
#pragma once

#include <functional>
#include <string>

#include "cuda/kernels.h"
#include "ops/checks.h"

namespace teco::ops {

// The CUDA kernels for this tensor; null when it is one for the CPU's.
const cuda::KernelTable* cuda_kernels_for(const Tensor& tensor);

// Whether tensors of the CPU go to the emulated CUDA kernels.
bool emulates_cuda();

// A caller's kernel, to which it has given the arguments itself; false when it failed, of which the caller knows more.
using CallerLaunch = bool (*)();
// The kernel that this thread's next operator is to launch once it has checked its arguments; null: a backend's.
CallerLaunch caller_launch();
// Launches it.
void run_caller_launch();

// Whether the values of a tensor can be looked at without waiting for a device.
inline bool is_readable(const Tensor& tensor) {
  return tensor.is_cpu();
}

// Runs a CUDA kernel on the current stream of the tensor's device, and makes it part of a plan that is being recorded.
void run_on_stream(const Tensor& tensor, std::function<cuda::Status(void* stream)> kernel);

// Loads the library of emulated kernels and sends tensors of the CPU there; "" ends it. For tests.
void emulate_cuda(std::string library);
// Names of the operators that the CUDA kernels at hand are of, compiled in or emulated; separated by spaces.
std::string cuda_operators();

}  // namespace teco::ops

#include "ops/backend.h"

#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include <utility>

#include "comm/device_communicator.h"
#include "ops/plan.h"

#ifdef TECO_WITH_CUDA
extern "C" const void* teco_cuda_kernels();
#endif

namespace teco::ops {
namespace {

using cuda::KernelTable;

const KernelTable* compiled_kernels() {
#ifdef TECO_WITH_CUDA
  return static_cast<const KernelTable*>(teco_cuda_kernels());
#else
  return nullptr;
#endif
}

const KernelTable* emulated_kernels = nullptr;

thread_local CallerLaunch next_launch = nullptr;

void check(cuda::Status status) {
  if (status) throw std::runtime_error(status);
}

void* current_stream(int32_t device_index) {
  return torch::stable::accelerator::getCurrentStream(device_index).nativeHandle();
}

}  // namespace

CallerLaunch caller_launch() {
  return next_launch;
}

void run_caller_launch() {
  require(!recording(), "kernels that are launched from Python cannot be recorded in a plan");
  if (!next_launch()) throw std::runtime_error("a kernel launched from Python failed");
}

bool emulates_cuda() {
  return emulated_kernels != nullptr;
}

const KernelTable* cuda_kernels_for(const Tensor& tensor) {
  return tensor.is_cpu() ? emulated_kernels : compiled_kernels();
}

void run_on_stream(const Tensor& tensor, std::function<cuda::Status(void* stream)> kernel) {
  const auto run = [kernel = std::move(kernel), on_cpu = tensor.is_cpu(), index = tensor.get_device_index()] {
    if (on_cpu) return check(kernel(nullptr));
    const torch::stable::accelerator::DeviceGuard guard(index);
    check(kernel(current_stream(index)));
  };
  if (recording()) record([run](int) { run(); });
  run();
}

void emulate_cuda(std::string library) {
  emulated_kernels = nullptr;
  if (library.empty()) return;
  void* handle = dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL);
  require(handle != nullptr, "library: ", handle ? "" : dlerror());
  auto* kernels = reinterpret_cast<const void* (*)()>(dlsym(handle, "teco_cuda_kernels"));
  require(kernels != nullptr, "library: expected emulated CUDA kernels, got no teco_cuda_kernels in ", library);
  emulated_kernels = static_cast<const KernelTable*>(kernels());
}

std::string cuda_operators() {
  const KernelTable* table = comm::device_kernels();
  return table ? table->operators : "";
}

}  // namespace teco::ops

namespace teco::comm {

const cuda::KernelTable* device_kernels() {
  return ops::emulated_kernels ? ops::emulated_kernels : ops::compiled_kernels();
}

}  // namespace teco::comm

// For Python's ctypes: through the dispatcher it would cost as much as the operator's own checks.
extern "C" __attribute__((visibility("default"))) void teco_launch_next(bool (*launch)()) {
  teco::ops::next_launch = launch;
}

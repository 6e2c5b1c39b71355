// A plan: kernel calls, recorded once with their params and replayed without dispatcher, checks or Python.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <functional>
#include <type_traits>

#include "cpu/isa.h"
#include "cpu/kernels.h"
#include "ops/backend.h"
#include "ops/checks.h"
#include "ops/kernel_calls.h"

namespace teco::ops {

using KernelCall = std::function<void(int num_threads)>;

// Whether this thread records, and what it does then.
bool recording();
void record(KernelCall call);

// The end of every operator: runs the kernel, and makes it part of the plan that is being recorded. This is for those
// that only the CPU backend has; `tensor` is one of the arguments.
template <class Params>
void launch(const Tensor& tensor, void (*kernel)(const Params&, int), const std::type_identity_t<Params>& params) {
  if (caller_launch()) return run_caller_launch();
  require(tensor.is_cpu() && !emulates_cuda(), "there is no CUDA kernel of this operator in this build");
  const auto run = [kernel, params](int num_threads) {
    count_kernel_call<Params>();
    kernel(params, num_threads);
  };
  if (recording()) record(run);
  run(num_threads());
}

// This is for those that several backends have: `select` takes the operator's kernel out of a backend's table.
template <class Select, class Params>
void launch(const Tensor& tensor, Select select, const Params& params) {
  if (caller_launch()) return run_caller_launch();
  const cuda::KernelTable* table = cuda_kernels_for(tensor);
  if (!table) return launch(tensor, select(*cpu::kernels()), params);
  const auto kernel = select(*table);
  if constexpr (std::is_same_v<decltype(kernel), const cuda::WithWorkspace<Params>>) {
    const Tensor workspace = torch::stable::new_empty(tensor, {kernel.bytes(params)}, ScalarType::Byte);
    run_on_stream(tensor, [kernel, params, workspace](void* stream) {
      count_kernel_call<Params>();
      return kernel.run(params, workspace.mutable_data_ptr(), stream);
    });
  } else {
    run_on_stream(tensor, [kernel, params](void* stream) {
      count_kernel_call<Params>();
      return kernel(params, stream);
    });
  }
}

// From plan_begin to plan_end the thread's operators are recorded (and run); plan_end names the plan. plan_run replays
// it over the memory that the calls were recorded with, which must still be there.
void plan_begin();
int64_t plan_end();
void plan_run(int64_t plan);
void plan_free(int64_t plan);

}  // namespace teco::ops

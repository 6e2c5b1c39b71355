// RMS norm, with or without a residual added first: one block per row.
//
// Reads input (and residual) once from memory, writes out (and the new residual); the second pass finds its elements in
// L1 or L2, each thread those that it has read or written itself. Bound by bandwidth. A row's sum is that of its
// elements per thread, in order, then over the block; so its bits depend on the row alone.
#include "cuda/rms_norm.h"

namespace teco::cuda {
namespace {

template <class T>
__global__ void __launch_bounds__(kRmsNormThreads) rms_norm_kernel(RmsNormParams p, bool vectors) {
  constexpr int N = kVector<T>;
  const int64_t row = blockIdx.x, outer = row / p.inner_rows, inner = row % p.inner_rows, size = p.hidden_size;
  const T* input = static_cast<const T*>(p.input) + outer * p.input_outer_stride + inner * p.input_stride;
  const T* weight = static_cast<const T*>(p.weight);
  T* out = static_cast<T*>(p.out) + outer * p.out_outer_stride + inner * p.out_stride;
  const T* residual = static_cast<const T*>(p.residual) + row * p.residual_stride;
  T* sum = static_cast<T*>(p.residual_out) + row * p.residual_out_stride;
  const auto elements = [&](int64_t i) { return load_up_to<N>(input + i, size - i, vectors); };
  rms_norm_row(elements, p.residual ? residual : nullptr, sum, weight, out, size, p.eps, vectors);
}

template <class T>
bool all_aligned(const RmsNormParams& p) {
  const auto rows = [](const void* data, int64_t stride) {
    return is_aligned(static_cast<const T*>(data), stride, 16);
  };
  return rows(p.input, p.input_stride) && rows(p.input, p.input_outer_stride) && rows(p.out, p.out_stride) &&
         rows(p.out, p.out_outer_stride) && rows(p.residual, p.residual_stride) &&
         rows(p.residual_out, p.residual_out_stride) && rows(p.weight, 0);
}

}  // namespace

Status rms_norm(const RmsNormParams& p, void* stream) {
  if (p.num_rows == 0) return nullptr;
  return with_float_type(p.dtype, [&]<class T>(Type<T>) {
    return launch("rms_norm", dim3{static_cast<unsigned>(p.num_rows)}, dim3{kRmsNormThreads}, {}, stream,
                  rms_norm_kernel<T>, p, all_aligned<T>(p));
  });
}

}  // namespace teco::cuda

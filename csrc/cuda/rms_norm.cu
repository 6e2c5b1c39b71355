// RMS norm, with or without a residual added first: one block per row, or one warp where rows are as short as heads.
//
// Reads input (and residual) once from memory, writes out (and the new residual); the second pass finds its elements in
// L1 or L2, each thread those that it has read or written itself. Bound by bandwidth. A row's sum is that of its
// elements per thread, in order, then over the block; so its bits depend on the row alone. A warp makes the same sum.
#include "cuda/rms_norm.h"

namespace teco::cuda {
namespace {

constexpr int kWarps = kRmsNormThreads / kWarpSize;
constexpr int kMaxWarpElements = 512;
static_assert(kMaxWarpElements <= kRmsNormThreads * kVector<float>);

template <class T, bool kByWarp>
__global__ void __launch_bounds__(kRmsNormThreads) rms_norm_kernel(RmsNormParams p, bool vectors) {
  constexpr int N = kVector<T>;
  const int64_t row = kByWarp ? static_cast<int64_t>(blockIdx.x) * kWarps + warp_id() : blockIdx.x;
  if (row >= p.num_rows) return;
  const int64_t outer = row / p.inner_rows, inner = row % p.inner_rows, size = p.hidden_size;
  const T* input = static_cast<const T*>(p.input) + outer * p.input_outer_stride + inner * p.input_stride;
  const T* weight = static_cast<const T*>(p.weight);
  T* out = static_cast<T*>(p.out) + outer * p.out_outer_stride + inner * p.out_stride;
  const T* residual = static_cast<const T*>(p.residual) + row * p.residual_stride;
  T* sum = static_cast<T*>(p.residual_out) + row * p.residual_out_stride;
  const auto elements = [&](int64_t i) { return load_up_to<N>(input + i, size - i, vectors); };
  const RmsNormRow<T, decltype(elements)> norm = {
      elements, p.residual ? residual : nullptr, sum, weight, out, size, p.eps, vectors};
  if constexpr (kByWarp) {
    norm.norm_by_warp();
  } else {
    norm.norm_by_block();
  }
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
    const bool by_warp = p.hidden_size <= kMaxWarpElements;
    const auto blocks = static_cast<unsigned>(by_warp ? ceil_div<int64_t>(p.num_rows, kWarps) : p.num_rows);
    return launch("rms_norm", dim3{blocks}, dim3{kRmsNormThreads}, {}, stream,
                  by_warp ? rms_norm_kernel<T, true> : rms_norm_kernel<T, false>, p, all_aligned<T>(p));
  });
}

}  // namespace teco::cuda

// RMS norm, with or without a residual added first: one block per row.
//
// Reads input (and residual) once from memory, writes out (and the new residual); the second pass finds its elements in
// L1 or L2, each thread those that it has read or written itself. Bound by bandwidth. A row's sum is that of its
// elements per thread, in order, then over the block; so its bits depend on the row alone.
#include "cuda/device.h"

namespace teco::cuda {
namespace {

constexpr int kThreads = 256;  // part of the order of the sum

template <class T>
__global__ void __launch_bounds__(kThreads) rms_norm_kernel(RmsNormParams p, bool vectors) {
  constexpr int N = kVector<T>;
  const int64_t row = blockIdx.x, outer = row / p.inner_rows, inner = row % p.inner_rows, size = p.hidden_size;
  const T* input = static_cast<const T*>(p.input) + outer * p.input_outer_stride + inner * p.input_stride;
  const T* weight = static_cast<const T*>(p.weight);
  T* out = static_cast<T*>(p.out) + outer * p.out_outer_stride + inner * p.out_stride;
  const T* residual = static_cast<const T*>(p.residual) + row * p.residual_stride;
  T* sum = static_cast<T*>(p.residual_out) + row * p.residual_out_stride;

  float squares = 0.f;
  for (int64_t i = thread_id() * N; i < size; i += kThreads * N) {
    Pack<T, N> x = load_up_to<N>(input + i, size - i, vectors);
    if (p.residual) {
      const Pack<T, N> r = load_up_to<N>(residual + i, size - i, vectors);
#pragma unroll
      for (int j = 0; j < N; ++j) set(x.at[j], to_float(x.at[j]) + to_float(r.at[j]));
      store_up_to<N>(sum + i, x, size - i, vectors);
    }
#pragma unroll
    for (int j = 0; j < N; ++j) squares = fmaf(to_float(x.at[j]), to_float(x.at[j]), squares);
  }
  const float mean = block_sum<kThreads>(squares) / static_cast<float>(size);
  const float scale = 1.f / sqrtf(mean + p.eps);

  const T* summand = p.residual ? sum : input;
  for (int64_t i = thread_id() * N; i < size; i += kThreads * N) {
    Pack<T, N> x = load_up_to<N>(summand + i, size - i, vectors);
    const Pack<T, N> w = load_up_to<N>(weight + i, size - i, vectors);
#pragma unroll
    for (int j = 0; j < N; ++j) set(x.at[j], to_float(x.at[j]) * scale * to_float(w.at[j]));
    store_up_to<N>(out + i, x, size - i, vectors);
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
    return launch("rms_norm", dim3{static_cast<unsigned>(p.num_rows)}, dim3{kThreads}, {}, stream, rms_norm_kernel<T>,
                  p, all_aligned<T>(p));
  });
}

}  // namespace teco::cuda

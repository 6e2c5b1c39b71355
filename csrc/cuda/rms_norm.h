// The norm of one row, by all threads of a block: part of every kernel that ends in one, so that all have the same
// bits.
#pragma once

#include "cuda/device.h"

namespace teco::cuda {

constexpr int kRmsNormThreads = 256;  // part of the order of the sum

// `input(i)` gives elements i to i + kVector<T>. With a
// residual, the sum of both is written to `sum` and normed. Before the next row of a block there must be a barrier.
template <class T, class Input>
__device__ __forceinline__ void rms_norm_row(Input input, const T* residual, T* sum, const T* weight, T* out,
                                             int64_t size, float eps, bool vectors) {
  constexpr int N = kVector<T>;
  float squares = 0.f;
  for (int64_t i = thread_id() * N; i < size; i += kRmsNormThreads * N) {
    Pack<T, N> x = input(i);
    if (residual) {
      const Pack<T, N> r = load_up_to<N>(residual + i, size - i, vectors);
#pragma unroll
      for (int j = 0; j < N; ++j) set(x.at[j], to_float(x.at[j]) + to_float(r.at[j]));
      store_up_to<N>(sum + i, x, size - i, vectors);
    }
#pragma unroll
    for (int j = 0; j < N; ++j) squares = fmaf(to_float(x.at[j]), to_float(x.at[j]), squares);
  }
  const float mean = block_sum<kRmsNormThreads>(squares) / static_cast<float>(size);
  const float scale = 1.f / sqrtf(mean + eps);

  for (int64_t i = thread_id() * N; i < size; i += kRmsNormThreads * N) {
    Pack<T, N> x = residual ? load_up_to<N>(sum + i, size - i, vectors) : input(i);
    const Pack<T, N> w = load_up_to<N>(weight + i, size - i, vectors);
#pragma unroll
    for (int j = 0; j < N; ++j) set(x.at[j], to_float(x.at[j]) * scale * to_float(w.at[j]));
    store_up_to<N>(out + i, x, size - i, vectors);
  }
}

}  // namespace teco::cuda

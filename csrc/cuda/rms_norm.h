// The norm of one row, by all threads of a block or by one warp with the same bits: part of every kernel that ends in
// one, so that all agree.
#pragma once

#include "cuda/device.h"

namespace teco::cuda {

constexpr int kRmsNormThreads = 256;  // part of the order of the sum

// `input(i)` gives elements i to i + kVector<T>, zeros for those behind the end. With a residual, the sum of both is
// written to `sum` and normed.
template <class T, class Input>
struct RmsNormRow {
  static constexpr int N = kVector<T>;

  Input input;
  const T* residual;
  T* sum;
  const T* weight;
  T* out;
  int64_t size;
  float eps;
  bool vectors;

  // Adds the residual to the elements from i on, and their squares to `squares`.
  __device__ __forceinline__ float add(int64_t i, float squares) const {
    Pack<T, N> x = input(i);
    if (residual) {
      const Pack<T, N> r = load_up_to<N>(residual + i, size - i, vectors);
#pragma unroll
      for (int j = 0; j < N; ++j) set(x.at[j], to_float(x.at[j]) + to_float(r.at[j]));
      store_up_to<N>(sum + i, x, size - i, vectors);
    }
#pragma unroll
    for (int j = 0; j < N; ++j) squares = fmaf(to_float(x.at[j]), to_float(x.at[j]), squares);
    return squares;
  }

  __device__ __forceinline__ float scale(float squares) const {
    return 1.f / sqrtf(squares / static_cast<float>(size) + eps);
  }

  __device__ __forceinline__ void write(int64_t i, float scale) const {
    Pack<T, N> x = residual ? load_up_to<N>(sum + i, size - i, vectors) : input(i);
    const Pack<T, N> w = load_up_to<N>(weight + i, size - i, vectors);
#pragma unroll
    for (int j = 0; j < N; ++j) set(x.at[j], to_float(x.at[j]) * scale * to_float(w.at[j]));
    store_up_to<N>(out + i, x, size - i, vectors);
  }

  // Before the next row of a block there must be a barrier.
  __device__ __forceinline__ void norm_by_block() const {
    float squares = 0.f;
    for (int64_t i = thread_id() * N; i < size; i += kRmsNormThreads * N) squares = add(i, squares);
    const float factor = scale(block_sum<kRmsNormThreads>(squares));
    for (int64_t i = thread_id() * N; i < size; i += kRmsNormThreads * N) write(i, factor);
  }

  // For rows that give every thread of a block one pack at the most: each step of the warp stands for one warp of the
  // block.
  __device__ __forceinline__ void norm_by_warp() const {
    float squares = 0.f;
    for (int64_t i = 0; i < size; i += kWarpSize * N) squares += warp_sum(add(i + lane_id() * N, 0.f));
    const float factor = scale(squares);
    for (int64_t i = lane_id() * N; i < size; i += kWarpSize * N) write(i, factor);
  }
};

}  // namespace teco::cuda

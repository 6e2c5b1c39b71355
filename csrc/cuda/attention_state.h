// The small algebra of attention states. A state (max, sum, acc) stands for the keys it has seen:
// sum = sum_k exp(score[k] - max), acc = sum_k exp(score[k] - max) * value[k]. The empty state is (-inf, 0, 0); merging
// it changes no bit of the other.
#pragma once

#include "cuda/device.h"

namespace teco::cuda {

__device__ __forceinline__ float minus_infinity() {
  return ptx::as_float(0xff800000u);
}

// What to subtract from scores of which this is the largest: with nothing but -inf there is no number to shift by.
__device__ __forceinline__ float finite_or_zero(float max) {
  return max == minus_infinity() ? 0.f : max;
}

}  // namespace teco::cuda

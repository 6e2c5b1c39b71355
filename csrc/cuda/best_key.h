// A logit and its token in one integer, ordered as the logits are and, among equals, with the lowest token last: the
// largest of these is the same in any order.
#pragma once

#include "cuda/device.h"

namespace teco::cuda {

constexpr uint64_t kNaNKey = ~uint64_t{0};  // above infinity: NaN stays
constexpr uint32_t kLastToken = ~uint32_t{0};

// Ordered as the numbers are; -0 is +0. Not for NaN.
__device__ __forceinline__ uint32_t ordered_key(float x) {
  const uint32_t bits = ptx::as_bits(x + 0.f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ uint64_t best_key(uint32_t ordered, int64_t token) {
  return static_cast<uint64_t>(ordered) << 32 | (kLastToken - static_cast<uint32_t>(token));
}
__device__ __forceinline__ uint64_t best_key(float logit, int64_t token) {
  return logit == logit ? best_key(ordered_key(logit), token) : kNaNKey;
}

__device__ __forceinline__ float logit_of(uint64_t key) {
  const auto ordered = static_cast<uint32_t>(key >> 32);
  return ptx::as_float(ordered & 0x80000000u ? ordered & 0x7fffffffu : ~ordered);
}
__device__ __forceinline__ int64_t token_of(uint64_t key) {
  return kLastToken - static_cast<uint32_t>(key);
}

__device__ __forceinline__ bool is_finite(float x) {
  return fabsf(x) <= 3.402823466e38f;
}
__device__ __forceinline__ float finite_or_zero(float x) {
  return is_finite(x) ? x : 0.f;
}

}  // namespace teco::cuda

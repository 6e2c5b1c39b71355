// Elements of a KV cache: the floating types, and 8-bit ones whose values are to be multiplied by a scale. Reading
// gives the unscaled value; writing rounds to the nearest (ties to even) and saturates.
#pragma once

#include "cuda/device.h"

namespace teco::cuda {

struct Int8 {
  int8_t bits;
};
struct Float8E4M3 {  // sign, 4 bits of exponent (bias 7), 3 of mantissa; no infinities, NaN is 0x7f and 0xff
  uint8_t bits;
};

// Largest value a scaled element holds; 0 for elements without a scale.
template <class E>
constexpr float kElementMax = 0;
template <>
constexpr float kElementMax<Int8> = 127;
template <>
constexpr float kElementMax<Float8E4M3> = 448;

__device__ __forceinline__ float to_float(Int8 x) {
  return static_cast<float>(x.bits);
}
// NaN becomes 0.
__device__ __forceinline__ void set(Int8& out, float x) {
  const float limit = kElementMax<Int8>;
  out.bits = static_cast<int8_t>(x != x ? 0 : ptx::float_to_int(fminf(fmaxf(x, -limit), limit)));
}

// Exponent and mantissa as those of a half, whose bias is greater by 8. Integer arithmetic: sm_80 has no instruction.
__device__ __forceinline__ float to_float(Float8E4M3 x) {
  const uint32_t magnitude = x.bits & 0x7fu, sign = (x.bits & 0x80u) << 8;
  if (magnitude == 0x7fu) return ptx::as_float(0x7fc00000u);
  return ptx::half_to_float(static_cast<uint16_t>(sign | magnitude << 7)) * 0x1p8f;
}
// NaN stays NaN.
__device__ __forceinline__ void set(Float8E4M3& out, float x) {
  const uint32_t bits = ptx::as_bits(x), sign = bits >> 24 & 0x80u;
  const float magnitude = fminf(ptx::as_float(bits & 0x7fffffffu), kElementMax<Float8E4M3>);
  const uint32_t clamped = ptx::as_bits(magnitude);
  uint32_t code = (clamped - (120u << 23) + 0x7ffffu + (clamped >> 20 & 1u)) >> 20;
  // Below 2^-6, adding 2^14 rounds to the spacing of 2^-9 and leaves the count of it in the low bits.
  if (magnitude < 0x1p-6f) code = ptx::as_bits(magnitude + 0x1p14f) - ptx::as_bits(0x1p14f);
  if (x != x) code = 0x7fu;
  out.bits = static_cast<uint8_t>(sign | code);
}

// Calls body(Type<E>{}), E being the element type that dtype names.
template <class Body>
inline Status with_cache_type(DType dtype, Body body) {
  switch (dtype) {
    case DType::kInt8:
      return body(Type<Int8>{});
    case DType::kFloat8E4M3:
      return body(Type<Float8E4M3>{});
    default:
      return with_float_type(dtype, body);
  }
}

}  // namespace teco::cuda

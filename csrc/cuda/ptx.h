// Every instruction that C++ has no word for, each a function of its own. csrc/simt/ptx.h has their twins on the CPU.
#pragma once

#include <cstdint>

namespace teco::cuda::ptx {

template <int N>
struct Words {
  uint32_t at[N];
};

__device__ __forceinline__ Words<4> load_16(const void* address) {
  const uint4 v = *static_cast<const uint4*>(address);
  return {{v.x, v.y, v.z, v.w}};
}
__device__ __forceinline__ Words<2> load_8(const void* address) {
  const uint2 v = *static_cast<const uint2*>(address);
  return {{v.x, v.y}};
}
__device__ __forceinline__ void store_16(void* address, Words<4> words) {
  *static_cast<uint4*>(address) = make_uint4(words.at[0], words.at[1], words.at[2], words.at[3]);
}
__device__ __forceinline__ void store_8(void* address, Words<2> words) {
  *static_cast<uint2*>(address) = make_uint2(words.at[0], words.at[1]);
}

__device__ __forceinline__ float as_float(uint32_t bits) {
  return __uint_as_float(bits);
}
__device__ __forceinline__ uint32_t as_bits(float x) {
  return __float_as_uint(x);
}

// Number of the lowest bit that is set.
__device__ __forceinline__ int lowest_bit(uint32_t bits) {
  return __ffs(static_cast<int>(bits)) - 1;
}

// (a & b) | c
__device__ __forceinline__ uint32_t and_or(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
  return result;
}
// Sum of the products of four bytes each, unsigned and signed ones, and of c.
__device__ __forceinline__ int32_t dot_unsigned_signed(uint32_t a, uint32_t b, int32_t c) {
  int32_t result;
  asm("dp4a.u32.s32 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
  return result;
}

__device__ __forceinline__ float half_to_float(uint16_t bits) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
  return x;
}
// These two round to the nearest, ties to even.
__device__ __forceinline__ uint16_t float_to_half(float x) {
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}
__device__ __forceinline__ uint16_t float_to_bfloat16(float x) {
  uint16_t bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}
// The same to an integer; 0 for NaN.
__device__ __forceinline__ int32_t float_to_int(float x) {
  int32_t i;
  asm("cvt.rni.s32.f32 %0, %1;" : "=r"(i) : "f"(x));
  return i;
}

}  // namespace teco::cuda::ptx

// Elements of a KV cache: the floating types, and 8-bit ones whose values are to be multiplied by a scale. Loads give
// the unscaled values; stores round to the nearest (ties to even) and saturate.
#pragma once

#include "cpu/vec.h"

namespace teco::cpu::TECO_ISA {

typedef uint8_t U8x8 __attribute__((vector_size(8)));
typedef int16_t I16x8 __attribute__((vector_size(16)));

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

inline F32x8 load(const Int8* p) {
#if defined(TECO_ISA_AVX2)  // the compiler would convert one byte after the other
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
  return __builtin_convertvector(load_bits<I8x8>(p), F32x8);
#endif
}
// NaN becomes 0.
inline void store(Int8* p, F32x8 v) {
  const F32x8 limit = splat(kElementMax<Int8>);
  store_bits(p, __builtin_convertvector(round_to_int(v != v ? splat(0.f) : min(max(v, -limit), limit)), I8x8));
}

// Exponent and mantissa as those of a half, whose bias is greater by 8. The byte is widened with its sign: bits 7 to 15
// of it are equal, and only the lowest and the highest of these are not in the half's way.
inline F32x8 load(const Float8E4M3* p) {
#if defined(TECO_ISA_AVX2)
  const U16x8 wide = reinterpret_cast<U16x8>(_mm_cvtepi8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
  const U16x8 wide = reinterpret_cast<U16x8>(__builtin_convertvector(load_bits<I8x8>(p), I16x8));
#endif
  const U16x8 half = wide << 7 & uint16_t{0xbfff};
  const U16x8 is_nan = reinterpret_cast<U16x8>((half & uint16_t{0x3f80}) == uint16_t{0x3f80});
  return half_to_float(half | (is_nan & uint16_t{0x7e00})) * splat(0x1p8f);
}
// NaN stays NaN.
inline void store(Float8E4M3* p, F32x8 v) {
  const U32x8 bits = reinterpret_cast<U32x8>(v), sign = bits & 0x80000000u;
  const F32x8 magnitude = min(reinterpret_cast<F32x8>(bits ^ sign), splat(kElementMax<Float8E4M3>));
  const U32x8 clamped = reinterpret_cast<U32x8>(magnitude);
  // Below 2^-6, adding 2^14 rounds to the spacing of 2^-9 and leaves the count of it in the low bits.
  const U32x8 subnormal = reinterpret_cast<U32x8>(magnitude + splat(0x1p14f)) - bit_cast<uint32_t>(0x1p14f);
  const U32x8 normal = (clamped - (120u << 23) + 0x7ffffu + ((clamped >> 20) & 1u)) >> 20;
  const U32x8 is_subnormal = reinterpret_cast<U32x8>(magnitude < splat(0x1p-6f));
  const U32x8 is_nan = reinterpret_cast<U32x8>(v != v);
  const U32x8 code = (is_subnormal & subnormal) | (~is_subnormal & normal);
  store_bits(p, __builtin_convertvector((is_nan & 0x7fu) | (~is_nan & code) | (sign >> 24), U8x8));
}

// Calls body(Type<E>{}), E being the element type that dtype names.
template <class Body>
inline void with_cache_type(DType dtype, Body body) {
  switch (dtype) {
    case DType::kInt8:
      return body(Type<Int8>{});
    case DType::kFloat8E4M3:
      return body(Type<Float8E4M3>{});
    default:
      return with_float_type(dtype, body);
  }
}

}  // namespace teco::cpu::TECO_ISA

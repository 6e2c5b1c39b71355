// Vectors as wide as the registers: one of 16 lanes, or two of 8, for a panel of 16 columns of a matmul or the keys of
// attention. Lanes never meet, so the width changes no bit.
#pragma once

#include "cpu/vec.h"

namespace teco::cpu::TECO_ISA {

#if defined(TECO_ISA_AVX512)
constexpr int kWideLanes = 16;
#else
constexpr int kWideLanes = kLanes;
#endif
typedef float WideF32 __attribute__((vector_size(kWideLanes * 4)));
typedef int32_t WideI32 __attribute__((vector_size(kWideLanes * 4)));
typedef uint32_t WideU32 __attribute__((vector_size(kWideLanes * 4)));
typedef int16_t WideI16 __attribute__((vector_size(kWideLanes * 4)));
typedef uint8_t WideU8 __attribute__((vector_size(kWideLanes * 4)));
typedef uint16_t WideU16 __attribute__((vector_size(kWideLanes * 2)));
typedef double WideF64 __attribute__((vector_size(kWideLanes * 4)));  // of half as many lanes,
typedef float HalfF32 __attribute__((vector_size(kWideLanes * 2)));   // and so is this

#if defined(TECO_ISA_AVX512)

inline WideF32 wide_splat(float x) {
  return _mm512_set1_ps(x);
}
inline WideF32 to_float(WideI32 x) {
  return __builtin_convertvector(x, WideF32);
}
inline WideF32 fma(WideF32 a, WideF32 b, WideF32 c) {
  return _mm512_fmadd_ps(a, b, c);
}
inline WideF32 half_to_float(WideU16 h) {
  return _mm512_cvtph_ps(reinterpret_cast<__m256i>(h));
}
inline WideF64 to_double(HalfF32 x) {
  return _mm512_cvtps_pd(x);
}
inline HalfF32 to_single(WideF64 x) {
  return _mm512_cvtpd_ps(x);
}
inline WideI32 round_to_int(WideF32 x) {
  return round_by_shift<WideI32>(x);
}
inline void store_low_bytes(int8_t* p, WideI32 v) {
  store_bits(p, _mm512_cvtepi32_epi8(reinterpret_cast<__m512i>(v)));
}
inline int32_t reduce_add(WideI32 v) {
  return _mm512_reduce_add_epi32(reinterpret_cast<__m512i>(v));
}
inline int32_t reduce_max(WideI32 v) {
  return _mm512_reduce_max_epi32(reinterpret_cast<__m512i>(v));
}

#else

inline WideF32 wide_splat(float x) {
  return splat(x);
}
inline WideF64 to_double(HalfF32 x) {
  return __builtin_convertvector(x, WideF64);
}
inline HalfF32 to_single(WideF64 x) {
  return __builtin_convertvector(x, HalfF32);
}

#endif

// Ties the value to a register: GCC otherwise reassociates sums of unrolled loops and spills the tile, or loads a
// vector once per use, where loads are as scarce as fmas.
template <class V>
inline void keep_in_register(V& v) {
#if defined(TECO_ISA_AVX512)
  asm("" : "+v"(v));
#elif defined(TECO_ISA_AVX2)
  asm("" : "+x"(v));
#else
  static_cast<void>(v);
#endif
}

}  // namespace teco::cpu::TECO_ISA

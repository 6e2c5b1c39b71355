// The integer side of the vector layer: products of unsigned 8-bit weights and signed 8-bit activations. Integer sums
// are exact, so these give the same result in every instruction set.
#pragma once

#include "cpu/vec.h"

namespace teco::cpu::TECO_ISA {

typedef uint8_t U8x32 __attribute__((vector_size(32)));
typedef int16_t I16x16 __attribute__((vector_size(32)));

// Four bytes in every lane.
inline I32x8 splat_bytes(const int8_t* p) {
  return splat_int(load_bits<int32_t>(p));
}

#if defined(TECO_ISA_AVX512)

// A running dot product of eight columns: lane i sums a[4j + ...] * b[4j + ...] of its four bytes.
typedef I32x8 DotSum;
constexpr bool kDotTakesBytes = true;  // weights of 8 bits; else of 4, at most eight times

inline DotSum dot_add(DotSum sum, U8x32 weights, I32x8 x) {
  return reinterpret_cast<I32x8>(_mm256_dpbusd_epi32(reinterpret_cast<__m256i>(sum), reinterpret_cast<__m256i>(weights),
                                                     reinterpret_cast<__m256i>(x)));
}
// With the four bytes at x in every lane. The instruction can broadcast by itself, which GCC 12 does not know.
inline DotSum dot_add(DotSum sum, U8x32 weights, const int8_t* x) {
  asm("vpdpbusd %2%{1to8%}, %1, %0" : "+v"(sum) : "v"(weights), "m"(*reinterpret_cast<const int8_t (*)[4]>(x)));
  return sum;
}
inline I32x8 dot_total(DotSum sum) {
  return sum;
}

#else

// The same in 16 bits, two lanes to a column: eight products of 15 * 127 in each of them, 8 * 2 * 15 * 127 = 30480
// fits.
typedef I16x16 DotSum;
constexpr bool kDotTakesBytes = false;

inline DotSum dot_add(DotSum sum, U8x32 weights, I32x8 x) {
#if defined(TECO_ISA_AVX2)
  return sum + reinterpret_cast<I16x16>(
                   _mm256_maddubs_epi16(reinterpret_cast<__m256i>(weights), reinterpret_cast<__m256i>(x)));
#else
  const I16x16 a = reinterpret_cast<I16x16>(weights), b = reinterpret_cast<I16x16>(x);
  return sum + (a & 0xff) * ((b << 8) >> 8) + ((a >> 8) & 0xff) * (b >> 8);
#endif
}
inline DotSum dot_add(DotSum sum, U8x32 weights, const int8_t* x) {
  return dot_add(sum, weights, splat_bytes(x));
}
inline I32x8 dot_total(DotSum sum) {
#if defined(TECO_ISA_AVX2)
  return reinterpret_cast<I32x8>(_mm256_madd_epi16(reinterpret_cast<__m256i>(sum), _mm256_set1_epi16(1)));
#else
  const I32x8 wide = reinterpret_cast<I32x8>(sum);
  return ((wide << 16) >> 16) + (wide >> 16);
#endif
}

#endif

// Ties the value to a register: GCC otherwise reassociates sums of unrolled loops and spills the tile.
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

// The integer side of the vector layer: products of unsigned 8-bit weights and signed 8-bit activations. Integer sums
// are exact, so these give the same result in every instruction set.
#pragma once

#include "cpu/wide.h"

namespace teco::cpu::TECO_ISA {

#if defined(TECO_ISA_AVX512)

// A running dot product of the columns: lane i sums a[4i + ...] * b[4i + ...] of its four bytes.
typedef WideI32 DotSum;
constexpr bool kDotTakesBytes = true;  // weights of 8 bits; else of 4, at most eight times

// With the four bytes at x in every lane. The instruction can broadcast by itself, which GCC 12 does not know.
inline DotSum dot_add(DotSum sum, WideU8 weights, const int8_t* x) {
  asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(weights), "m"(*reinterpret_cast<const int8_t (*)[4]>(x)));
  return sum;
}
inline WideI32 dot_total(DotSum sum) {
  return sum;
}

#else

// The same in 16 bits, two lanes to a column: eight products of 15 * 127 in each of them, 8 * 2 * 15 * 127 = 30480
// fits.
typedef WideI16 DotSum;
constexpr bool kDotTakesBytes = false;

inline DotSum dot_add(DotSum sum, WideU8 weights, const int8_t* x) {
  const I32x8 four = splat_int(load_bits<int32_t>(x));
#if defined(TECO_ISA_AVX2)
  return sum + reinterpret_cast<WideI16>(
                   _mm256_maddubs_epi16(reinterpret_cast<__m256i>(weights), reinterpret_cast<__m256i>(four)));
#else
  const WideI16 a = reinterpret_cast<WideI16>(weights), b = reinterpret_cast<WideI16>(four);
  return sum + (a & 0xff) * ((b << 8) >> 8) + ((a >> 8) & 0xff) * (b >> 8);
#endif
}
inline WideI32 dot_total(DotSum sum) {
#if defined(TECO_ISA_AVX2)
  return reinterpret_cast<WideI32>(_mm256_madd_epi16(reinterpret_cast<__m256i>(sum), _mm256_set1_epi16(1)));
#else
  const WideI32 wide = reinterpret_cast<WideI32>(sum);
  return ((wide << 16) >> 16) + (wide >> 16);
#endif
}

#endif

}  // namespace teco::cpu::TECO_ISA

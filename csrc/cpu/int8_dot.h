// The integer side of the vector layer: products of unsigned 8-bit weights and signed 8-bit activations. Integer sums
// are exact, so these give the same result in every instruction set.
#pragma once

#include "cpu/vec.h"

namespace teco::cpu::TECO_ISA {

typedef uint8_t U8x32 __attribute__((vector_size(32)));
typedef int16_t I16x16 __attribute__((vector_size(32)));

// Lane i: a[2i] * b[2i] + a[2i+1] * b[2i+1], a unsigned, b signed bytes. The caller keeps the sum within 16 bits.
inline I16x16 multiply_pairs(U8x32 a, I32x8 b) {
#if defined(TECO_ISA_AVX2)
  return reinterpret_cast<I16x16>(_mm256_maddubs_epi16(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#else
  const I16x16 a16 = reinterpret_cast<I16x16>(a), b16 = reinterpret_cast<I16x16>(b);
  return (a16 & 0xff) * ((b16 << 8) >> 8) + ((a16 >> 8) & 0xff) * (b16 >> 8);
#endif
}

// Lane i: a[2i] + a[2i+1].
inline I32x8 add_pairs(I16x16 a) {
#if defined(TECO_ISA_AVX2)
  return reinterpret_cast<I32x8>(_mm256_madd_epi16(reinterpret_cast<__m256i>(a), _mm256_set1_epi16(1)));
#else
  const I32x8 wide = reinterpret_cast<I32x8>(a);
  return ((wide << 16) >> 16) + (wide >> 16);
#endif
}

// Four bytes in every lane.
inline I32x8 splat_bytes(const int8_t* p) {
  return splat_int(load_bits<int32_t>(p));
}

// Ties the value to a register: GCC otherwise reassociates sums of unrolled loops and spills the tile.
template <class V>
inline void keep_in_register(V& v) {
#if defined(TECO_ISA_AVX2)
  asm("" : "+x"(v));
#else
  static_cast<void>(v);
#endif
}

}  // namespace teco::cpu::TECO_ISA

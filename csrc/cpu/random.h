// Random numbers, and draws in proportion to weights that are integers: their sums are exact, hence the same in any
// order, and a draw is integer arithmetic alone.
#pragma once

#include "cpu/vec.h"

namespace teco::cpu::TECO_ISA {

typedef double F64x4 __attribute__((vector_size(32)));
typedef uint64_t U64x4 __attribute__((vector_size(32)));

struct RandomBits {
  uint64_t low, high;
};

// Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011) of counter (offset, stream)
// under the key `seed`: its four words, the first one lowest.
inline RandomBits random_bits(uint64_t seed, uint64_t offset, uint32_t stream) {
  uint32_t c0 = static_cast<uint32_t>(offset), c1 = static_cast<uint32_t>(offset >> 32), c2 = stream, c3 = 0;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xd2511f53u} * c0, b = uint64_t{0xcd9e8d57u} * c2;
    c0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(b);
    c2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(a);
    k0 += 0x9e3779b9u;
    k1 += 0xbb67ae85u;
  }
  return {uint64_t{c1} << 32 | c0, uint64_t{c3} << 32 | c2};
}

// A uniform integer below `total`.
inline uint64_t draw_below(uint64_t total, uint64_t bits) {
  return static_cast<uint64_t>(static_cast<unsigned __int128>(total) * bits >> 64);
}

// In units of 2^-40. Adding 2^52 leaves the rounded integer in the low mantissa bits.
inline U64x4 to_units(F32x4 weight) {
  const double shift = 0x1p52;
  const F64x4 shifted = __builtin_convertvector(weight, F64x4) * 0x1p40 + shift;
  return reinterpret_cast<U64x4>(shifted) - bit_cast<uint64_t>(shift);
}

// Weights of eight tokens in these units.
struct UnitWeights {
  U64x4 low, high;

  explicit UnitWeights(F32x8 weights)
      : low(to_units(__builtin_shufflevector(weights, weights, 0, 1, 2, 3))),
        high(to_units(__builtin_shufflevector(weights, weights, 4, 5, 6, 7))) {}
};

// The token at `point` of the summed weights, in order of id, which is below their total. `weigh(i)` gives the
// UnitWeights of eight tokens from i on.
template <class Weigh>
int64_t token_at(uint64_t point, const Weigh& weigh) {
  for (int64_t i = 0;; i += kLanes) {
    const UnitWeights weights = weigh(i);
    const U64x4 pairs = weights.low + weights.high;
    const uint64_t sum = (pairs[0] + pairs[1]) + (pairs[2] + pairs[3]);
    if (point >= sum) {
      point -= sum;
      continue;
    }
    uint64_t weight[kLanes];
    store_bits(weight, weights.low);
    store_bits(weight + 4, weights.high);
    int lane = 0;
    while (point >= weight[lane]) point -= weight[lane++];
    return i + lane;
  }
}

}  // namespace teco::cpu::TECO_ISA

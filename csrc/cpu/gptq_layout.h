// Where things lie in a packed GPTQ weight; the layout itself is described at GptqMatmulParams.
#pragma once

#include "cpu/wide.h"

namespace teco::cpu::TECO_ISA {

constexpr int64_t kBlock = 32;        // inputs
constexpr int64_t kHeaderBytes = 64;  // fp16 scale[16], fp16 offset[16]: zero points, or minima

template <int kBits, bool kMinimum>
struct Format {};

// Calls body with the weight's own format: `[&]<int kBits, bool kMinimum>(Format<kBits, kMinimum>) { ... }`.
template <class Params, class Body>
inline void with_format(const Params& p, Body body) {
  switch (p.bits) {
    case 2:
      return p.has_minimum ? body(Format<2, true>{}) : body(Format<2, false>{});
    case 3:
      return p.has_minimum ? body(Format<3, true>{}) : body(Format<3, false>{});
    case 4:
      return p.has_minimum ? body(Format<4, true>{}) : body(Format<4, false>{});
    default:
      return p.has_minimum ? body(Format<8, true>{}) : body(Format<8, false>{});
  }
}

struct GptqLayout {
  template <class Params>
  explicit GptqLayout(const Params& p)
      : weight(p.weight), num_groups(p.num_groups), blocks_per_group(p.blocks_per_group), bits(p.bits) {}

  int64_t block_bytes() const { return bits * 64; }  // 32 inputs x 16 columns
  int64_t group_bytes() const { return kHeaderBytes + blocks_per_group * block_bytes(); }
  int64_t panel_bytes() const { return num_groups * group_bytes(); }
  int64_t num_blocks() const { return num_groups * blocks_per_group; }
  int64_t packed_size() const { return num_blocks() * kBlock; }
  const uint8_t* group(int64_t panel, int64_t index) const {
    return weight + panel * panel_bytes() + index * group_bytes();
  }

  const uint8_t* weight;
  int64_t num_groups, blocks_per_group;
  int32_t bits;
};

// Quad q of a part of a panel's columns, as many as a vector U has lanes (a uint32_t has one): four codes in every
// lane, a byte each.
template <int kBits, class U>
inline U quad_codes(const uint8_t* block, int q, int part) {
  constexpr int kQuads = 8 / kBits;  // that lie whole in a word
  constexpr uint32_t kMask = 0x01010101u * ((1 << kBits) - 1);
  const auto word = [&](int j) { return load_bits<U>(block + j * 64 + part * static_cast<int>(sizeof(U))); };
  if constexpr (kBits == 3) {
    if (q >= 6) return ((word(q - 6) >> 6) & 0x03030303u) | ((word(2) >> (q - 2)) & 0x04040404u);
  }
  return (word(q / kQuads) >> (q % kQuads * kBits)) & kMask;
}

// Scales and offsets of a part of the columns, as many as a vector H of halves has lanes.
template <class H>
inline auto header_scale(const uint8_t* group, int part) {
  return half_to_float(load_bits<H>(group + part * sizeof(H)));
}
template <class H>
inline auto header_offset(const uint8_t* group, int part) {
  return half_to_float(load_bits<H>(group + 32 + part * sizeof(H)));
}

}  // namespace teco::cpu::TECO_ISA

// Where things lie in a packed GPTQ weight; the layout itself is described at GptqMatmulParams.
#pragma once

#include "cpu/vec.h"

namespace teco::cpu::TECO_ISA {

constexpr int64_t kBlock = 32;        // inputs
constexpr int64_t kHeaderBytes = 64;  // fp16 scale[16], fp16 zero[16]

struct GptqLayout {
  explicit GptqLayout(const GptqMatmulParams& p)
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

// Scales and zero points of eight columns: the first or the second half of a panel.
inline F32x8 header_scale(const uint8_t* group, int half) {
  return half_to_float(load_bits<U16x8>(group + half * 16));
}
inline F32x8 header_zero(const uint8_t* group, int half) {
  return half_to_float(load_bits<U16x8>(group + 32 + half * 16));
}

}  // namespace teco::cpu::TECO_ISA

// Where things lie in a packed GPTQ weight; the layout itself is described at GptqMatmulParams.
#pragma once

#include "cuda/matmul.h"

namespace teco::cuda {

constexpr int64_t kHeaderBytes = 64;  // fp16 scale[16], fp16 offset[16]: zero points, or minima

template <int kBits, bool kMinimum>
struct Format {};

// Calls body with the weight's own format: `[&]<int kBits, bool kMinimum>(Format<kBits, kMinimum>) { ... }`.
template <class Params, class Body>
inline Status with_format(const Params& p, Body body) {
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
  __host__ __device__ explicit GptqLayout(const Params& p)
      : weight(p.weight),
        num_groups(static_cast<int>(p.num_groups)),
        blocks_per_group(static_cast<int>(p.blocks_per_group)),
        bits(p.bits) {}

  __host__ __device__ int64_t block_bytes() const { return bits * 64; }  // 32 inputs x 16 columns
  __host__ __device__ int64_t group_bytes() const { return kHeaderBytes + blocks_per_group * block_bytes(); }
  __host__ __device__ int num_blocks() const { return num_groups * blocks_per_group; }
  __device__ const uint8_t* group(int64_t panel, int index) const {
    return weight + (panel * num_groups + index) * group_bytes();
  }
  // Block `index` of the panel, which lies in this group.
  __device__ const uint8_t* block(const uint8_t* group, int index) const {
    return group + kHeaderBytes + index % blocks_per_group * block_bytes();
  }

  const uint8_t* weight;
  int num_groups, blocks_per_group;  // of a column; there are fewer than 2^31 inputs
  int bits;
};

// Scale and offset of a column in a group.
struct Header {
  float scale, offset;
};
__device__ __forceinline__ Header load_header(const uint8_t* group, int column) {
  const Half* halves = reinterpret_cast<const Half*>(group);
  return {to_float(halves[column]), to_float(halves[kPanel + column])};
}

// Quad q of a column: four codes, a byte each.
template <int kBits>
__device__ __forceinline__ uint32_t quad_codes(const uint8_t* block, int q, int column) {
  constexpr int kQuads = 8 / kBits;  // that lie whole in a word
  constexpr uint32_t kMask = 0x01010101u * ((1 << kBits) - 1);
  const uint32_t* words = reinterpret_cast<const uint32_t*>(block) + column;
  if constexpr (kBits == 3) {
    if (q >= 6) return ((words[(q - 6) * kPanel] >> 6) & 0x03030303u) | ((words[2 * kPanel] >> (q - 2)) & 0x04040404u);
  }
  return (words[q / kQuads * kPanel] >> (q % kQuads * kBits)) & kMask;
}

template <bool kMinimum>
__device__ __forceinline__ float dequantize(uint32_t code, const Header& header) {
  const float x = static_cast<float>(code);
  return kMinimum ? header.scale * x + header.offset : header.scale * (x - header.offset);
}

}  // namespace teco::cuda

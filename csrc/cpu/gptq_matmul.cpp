// Matmul with a GPTQ weight. The exact mode unpacks slices of a panel to fp32: a scale has 11 significant bits and
// code - zero at most 9, so scale * (code - zero) is exact in fp32, and scale * code + minimum is rounded once. The
// result is, bit for bit, that of dense_matmul on the dequantised weight (in packed order). The int8 mode is in
// gptq_int8.cpp.
#include "cpu/gptq_layout.h"
#include "cpu/panel_matmul.h"

namespace teco::cpu::TECO_ISA {
namespace {

template <int kBits, bool kMinimum>
struct GptqPanels : DenseTiles {
  GptqLayout layout;

  const float* operator()(int64_t panel, int64_t k, int64_t count, float* scratch) const {
    for (int64_t i = 0; i < count; i += kBlock) {
      const int64_t block = (k + i) / kBlock;
      const uint8_t* group = layout.group(panel, block / layout.blocks_per_group);
      const uint8_t* codes = group + kHeaderBytes + block % layout.blocks_per_group * layout.block_bytes();
      for (int v = 0; v < kPanelVectors; ++v) {
        const F32x8 scale = header_scale<U16x8>(group, v), offset = header_offset<U16x8>(group, v);
        float* out = scratch + i * kPanel + v * kLanes;
        for (int q = 0; q < kBlock / 4; ++q) {
          const U32x8 quad = quad_codes<kBits, U32x8>(codes, q, v);
          for (int byte = 0; byte < 4; ++byte) {
            // Signed: AVX2 converts no other integers.
            const F32x8 code = to_float(reinterpret_cast<I32x8>((quad >> (8 * byte)) & 255));
            store(out + (4 * q + byte) * kPanel, kMinimum ? scale * code + offset : scale * (code - offset));
          }
        }
      }
    }
    return scratch;
  }
};

}  // namespace

void multiply_gptq(const GptqMatmulParams& p, const PanelSink& sink, int num_threads) {
  if (p.int8_activation) return multiply_gptq_int8(p, sink, num_threads);
  with_format(p, [&]<int kBits, bool kMinimum>(Format<kBits, kMinimum>) {
    const GptqPanels<kBits, kMinimum> unpack{{}, GptqLayout(p)};
    panel_matmul(p, unpack.layout.packed_size(), p.input_order, unpack.layout.panel_bytes(), unpack, sink, num_threads);
  });
}

void gptq_matmul(const GptqMatmulParams& p, int num_threads) {
  GptqMatmulParams stored = p;
  if (p.groups_per_section) stored.bias = nullptr;  // which is then a part of the exact sum
  multiply_gptq(p, store_sink(stored), num_threads);
}

}  // namespace teco::cpu::TECO_ISA

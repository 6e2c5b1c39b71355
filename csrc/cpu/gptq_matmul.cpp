// Matmul with a GPTQ weight. The exact mode unpacks slices of a panel to fp32: a scale has 11 significant bits and
// code - zero at most 9, so scale * (code - zero) is exact in fp32 and the result is, bit for bit, that of dense_matmul
// on the dequantised weight (in packed order). The int8 mode is in gptq_int8.cpp.
#include "cpu/gptq_int8.h"
#include "cpu/gptq_layout.h"
#include "cpu/panel_matmul.h"

namespace teco::cpu::TECO_ISA {
namespace {

template <int kBits>
struct GptqPanels {
  GptqLayout layout;

  const float* operator()(int64_t panel, int64_t k, int64_t count, float* scratch) const {
    for (int64_t i = 0; i < count; i += kBlock) {
      const int64_t block = (k + i) / kBlock;
      const uint8_t* group = layout.group(panel, block / layout.blocks_per_group);
      const uint8_t* codes = group + kHeaderBytes + block % layout.blocks_per_group * layout.block_bytes();
      for (int v = 0; v < kPanelVectors; ++v) {
        const F32x8 scale = header_scale(group, v), zero = header_zero(group, v);
        float* out = scratch + i * kPanel + v * kLanes;
        for (int j = 0; j < kBlock / 4 * kBits / 8; ++j) {
          const U32x8 word = load_bits<U32x8>(codes + (j * kPanelVectors + v) * 32);
          for (int byte = 0; byte < 4; ++byte) {
            const auto dequantise = [&](U32x8 code) { return scale * (__builtin_convertvector(code, F32x8) - zero); };
            const U32x8 shifted = word >> (8 * byte);
            if constexpr (kBits == 4) {
              store(out + (4 * j + byte) * kPanel, dequantise(shifted & 15));
              store(out + (16 + 4 * j + byte) * kPanel, dequantise((shifted >> 4) & 15));
            } else {
              store(out + (4 * j + byte) * kPanel, dequantise(shifted & 255));
            }
          }
        }
      }
    }
    return scratch;
  }
};

template <int kBits>
void gptq_matmul_exact(const GptqMatmulParams& p, int num_threads) {
  const GptqPanels<kBits> unpack{GptqLayout(p)};
  with_float_type(p.dtype, [&]<class T>(Type<T>) {
    panel_matmul(static_cast<const T*>(p.input), p.input_stride, p.num_rows, unpack.layout.packed_size(), p.input_order,
                 static_cast<T*>(p.out), p.out_stride, p.bias, p.out_features, unpack.layout.panel_bytes(), unpack,
                 num_threads);
  });
}

}  // namespace

void gptq_matmul(const GptqMatmulParams& p, int num_threads) {
  if (p.int8_activation) {
    gptq_matmul_int8(p, num_threads);
  } else if (p.bits == 4) {
    gptq_matmul_exact<4>(p, num_threads);
  } else {
    gptq_matmul_exact<8>(p, num_threads);
  }
}

}  // namespace teco::cpu::TECO_ISA

// A GPTQ weight as the tensor cores take it (tensor_core_matmul.h): rounded once to the inputs' dtype, as in a
// dequantised checkpoint.
#include "cuda/gptq_matmul.h"
#include "cuda/tensor_core_matmul.h"

namespace teco::cuda {
namespace {

constexpr int kQuads = kBlock / 4;

template <int kBits, bool kMinimum>
struct GptqColumns {
  // Half of the quads of a column.
  struct Fragment {
    uint32_t quads[kQuads / 2];
    Header header;
  };

  GptqLayout layout;
  int64_t num_panels;

  __device__ __forceinline__ Fragment fetch(int64_t first_column, int b) const {
    Fragment codes = {};
    const int64_t column = first_column + thread_id() % kTile;
    if (column / kPanel >= num_panels) return codes;
    const uint8_t* group = layout.group(column / kPanel, b / layout.blocks_per_group);
    const uint8_t* block = layout.block(group, b);
    codes.header = load_header(group, static_cast<int>(column % kPanel));
#pragma unroll
    for (int i = 0; i < kQuads / 2; ++i)
      codes.quads[i] = quad_codes<kBits>(block, 2 * i + thread_id() / kTile, static_cast<int>(column % kPanel));
    return codes;
  }

  template <class T>
  __device__ __forceinline__ void unpack(const Fragment& codes, Tile<T>& weight) const {
#pragma unroll
    for (int i = 0; i < kQuads / 2; ++i) {
      Pack<T, 4> values;
#pragma unroll
      for (int j = 0; j < 4; ++j)
        set(values.at[j], dequantize<kMinimum>(codes.quads[i] >> (8 * j) & 255u, codes.header));
      store<4>(&weight[thread_id() % kTile][4 * (2 * i + thread_id() / kTile)], values);
    }
  }
};

template <int kBits, bool kMinimum, class T>
__global__ void __launch_bounds__(kTileThreads, 4)
    gptq_tensor_cores_kernel(GptqMatmulParams p, PackedInputs inputs, PanelBest best) {
  const GptqLayout layout(p);
  const GptqColumns<kBits, kMinimum> weight = {layout, ceil_div<int64_t>(p.out_features, kPanel)};
  multiply_tiles<T>(p, weight, inputs, layout.num_blocks(), best);
}

}  // namespace

Status multiply_gptq_tensor_cores(const GptqMatmulParams& p, const PanelBest& best, void* stream) {
  return with_format(p, [&]<int kBits, bool kMinimum>(Format<kBits, kMinimum>) {
    const auto run = [&]<class T>(Type<T>) {
      return launch("gptq_matmul", tile_grid(p), dim3{kTileThreads}, {}, stream,
                    gptq_tensor_cores_kernel<kBits, kMinimum, T>, p, packed_inputs<T>(p, p.input_order), best);
    };
    return p.dtype == DType::kFloat16 ? run(Type<Half>{}) : run(Type<BFloat16>{});
  });
}

}  // namespace teco::cuda

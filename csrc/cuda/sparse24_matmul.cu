// Matmul with a 2:4 sparse weight, panel by panel (panel_matmul.h): two weights of every four inputs, and where they
// stand. What was left out is neither read nor multiplied by.
//
// One row reads (2 * element size + 1/2) / (4 * element size) of what dense_matmul reads. Sparse tensor cores are not
// used.
#include "cuda/panel_matmul.h"

namespace teco::cuda {
namespace {

constexpr int kGroup = 4;                              // inputs
constexpr int kSlots = 2;                              // weights of a group
constexpr int kBlockLines = kBlock / kGroup * kSlots;  // of 16 columns
constexpr int kIndexBits = 2;

template <class W>
struct Sparse24Panels : Lines<W> {
  using Lines<W>::kColumns, Lines<W>::kAtATime, Lines<W>::line, Lines<W>::part;
  static constexpr int kLoads = kBlockLines / kAtATime;
  struct Fragment {
    Pack<W, kColumns> at[kLoads];
    uint32_t places;  // of these weights among their four inputs, two bits each
  };

  const W* values;          // [panels, lines, 16]
  const uint32_t* indices;  // [panels, blocks, 16]
  int64_t num_lines, num_blocks;
  bool vectors;

  __device__ Fragment load(int64_t panel, int64_t k) const {
    Fragment fragment;
    const int64_t block = k / kBlock;
    const Pack<uint32_t, kColumns> words =
        load_up_to<kColumns>(indices + (panel * num_blocks + block) * kPanel + part() * kColumns, kColumns, vectors);
    fragment.places = 0;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int of_block = i * kAtATime + line();
      const int64_t of_panel = block * kBlockLines + of_block;
      fragment.at[i] = load_up_to<kColumns>(values + (panel * num_lines + of_panel) * kPanel + part() * kColumns,
                                            of_panel < num_lines ? kColumns : 0, vectors);
#pragma unroll
      for (int c = 0; c < kColumns; ++c)
        fragment.places |= (words.at[c] >> (of_block * kIndexBits) & 3u) << ((i * kColumns + c) * kIndexBits);
    }
    return fragment;
  }

  template <int kRows>
  __device__ static void multiply(const Fragment& fragment, const InputBlock<kRows>& input, int rows,
                                  float (&sums)[kRows][kColumns]) {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int of_block = i * kAtATime + line();
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        const float weight = to_float(fragment.at[i].at[c]);
        const int place = static_cast<int>(fragment.places >> ((i * kColumns + c) * kIndexBits) & 3u);
        const int k = of_block / kSlots * kGroup + place;
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          if (r >= rows) break;
          sums[r][c] = fmaf(weight, input[r][k], sums[r][c]);
        }
      }
    }
  }
};

template <class W, int kRows>
__global__ void __launch_bounds__(kPanelThreads, 2)
    sparse24_matmul_kernel(Sparse24MatmulParams p, Sparse24Panels<W> weight) {
  multiply_panel<kRows>(p, weight, PanelBest{});
}

}  // namespace

Status sparse24_matmul(const Sparse24MatmulParams& p, void* stream) {
  if (p.num_rows == 0 || p.out_features == 0) return nullptr;
  return with_float_type(p.value_dtype, [&]<class W>(Type<W>) {
    const auto* values = static_cast<const W*>(p.values);
    const Sparse24Panels<W> weight = {{},
                                      values,
                                      p.indices,
                                      p.in_features / kGroup * kSlots,
                                      ceil_div<int64_t>(p.in_features, kBlock),
                                      is_aligned(values, 0, 16) && is_aligned(p.indices, 0, 16)};
    return launch_panels(p, [&]<int kRows>(Rows<kRows>, dim3 grid) {
      return launch("sparse24_matmul", grid, dim3{kPanelThreads}, {}, stream, sparse24_matmul_kernel<W, kRows>, p,
                    weight);
    });
  });
}

}  // namespace teco::cuda

// Matmul with a 2:4 sparse weight: two weights of every four inputs, and where they stand. What was left out is not
// looked at: half the multiplications of dense_matmul, and the same fma chain but for its terms of zero.
//
// Four inputs fill half a vector register, and one shuffle picks, for each of eight columns, the input that its weight
// belongs to. One row reads the weight once: (2 * element size + 1/2) / (4 * element size) of what dense_matmul reads.
#include "cpu/panel_matmul.h"

namespace teco::cpu::TECO_ISA {
namespace {

constexpr int64_t kGroup = 4;   // inputs
constexpr int64_t kSlots = 2;   // weights of a group
constexpr int64_t kBlock = 32;  // inputs whose indices make up a 32-bit word per column
constexpr int kIndexBits = 2;
constexpr int kGroups = kBlock / kGroup;

template <class W>
struct Sparse24Slice {
  const W* values;          // [groups][2][16]
  const uint32_t* indices;  // [blocks][16]
};

// One block of 32 inputs, or `groups` groups of it, by R rows and P panels.
template <int R, int P, class W>
inline void add_block(F32x8 (&sum)[R][P * kPanelVectors], const Sparse24Slice<W>* weights, int64_t block, int groups,
                      const float* input, int64_t input_stride) {
  for (int g = 0; g < groups; ++g)
#pragma GCC unroll 2
    for (int s = 0; s < kSlots; ++s)
#pragma GCC unroll 8
      for (int v = 0; v < P * kPanelVectors; ++v) {
        const Sparse24Slice<W>& panel = weights[v / 2];
        const int64_t half = v % 2 * kLanes;
        const F32x8 weight = load(panel.values + ((block * kGroups + g) * kSlots + s) * kPanel + half);
        const U32x8 index = load_bits<U32x8>(panel.indices + block * kPanel + half) >> ((g * kSlots + s) * kIndexBits);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
          sum[r][v] = fma(weight, select4(input + r * input_stride + g * kGroup, index), sum[r][v]);
      }
}

template <int R, int P, class W>
[[gnu::noinline]] void sparse24_tile(const Sparse24Slice<W>* weights, const float* input, int64_t input_stride,
                                     int64_t count, float* acc, int64_t acc_stride) {
  F32x8 sum[R][P * kPanelVectors];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < P * kPanelVectors; ++v)
      sum[r][v] = load(acc + v / 2 * acc_stride + r * kPanel + v % 2 * kLanes);
  for (int64_t k = 0; k < count; k += kBlock)
    add_block<R, P>(sum, weights, k / kBlock, static_cast<int>(min(count - k, kBlock) / kGroup), input + k,
                    input_stride);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < P * kPanelVectors; ++v)
      store(acc + v / 2 * acc_stride + r * kPanel + v % 2 * kLanes, sum[r][v]);
}

template <class W>
struct Sparse24Panels {
  static constexpr int kTileRows = 4;  // 8 sums, and what is selected for each, in 16 registers
  using Slice = Sparse24Slice<W>;
  template <int R, int P>
  static constexpr auto kTile = sparse24_tile<R, P, W>;

  const W* values;
  const uint32_t* indices;
  int64_t in_features;

  Slice operator()(int64_t panel, int64_t k, int64_t, float*) const {
    return {values + (panel * in_features + k) / kGroup * kSlots * kPanel,
            indices + (panel * ceil_div(in_features, kBlock) + k / kBlock) * kPanel};
  }
};

}  // namespace

void sparse24_matmul(const Sparse24MatmulParams& p, int num_threads) {
  with_float_type(p.value_dtype, [&]<class W>(Type<W>) {
    const Sparse24Panels<W> unpack{static_cast<const W*>(p.values), p.indices, p.in_features};
    const int64_t panel_bytes = p.in_features / kSlots * kPanel * static_cast<int64_t>(sizeof(W));
    panel_matmul(p, p.in_features, nullptr, panel_bytes, unpack, store_sink(p), num_threads);
  });
}

}  // namespace teco::cpu::TECO_ISA

// What the matmuls share: how they are called by those that multiply, and where their sums go.
#pragma once

#include "cuda/best_key.h"

namespace teco::cuda {

constexpr int kPanel = 16;  // columns
constexpr int kBlock = 32;  // inputs

// Grids have rows in x and columns in y, which ends at 65535: of these there are few, and blocks that run at the same
// time share a part of the weight.

// What lm_head_argmax keeps of every panel of a row in place of its products; `keys` null: they are stored.
struct PanelBest {
  uint64_t* keys;  // [num_panels, num_rows], see best_key
  float* sums;     // [num_panels, num_rows]: of exp(product - the panel's largest); null where nobody asks
};

// `out` is not looked at when there is a `best`.
Status multiply_dense(const DenseMatmulParams& p, const PanelBest& best, void* stream);
Status multiply_gptq(const GptqMatmulParams& p, const PanelBest& best, void* stream);

// Takes the sums of a row in one panel, before the bias: kCount of them from each of kLanes neighbouring lanes, those
// of the panel's columns column(0), column(1), ... Rows and columns that are not there are left out. All lanes of a
// warp call it together.
template <int kLanes, int kCount, class Params, class Column>
__device__ __forceinline__ void take_panel(const Params& p, const PanelBest& best, int64_t row, int64_t panel,
                                           const float (&sums)[kCount], Column column) {
  const bool is_row = row < p.num_rows;
  float products[kCount];
  uint64_t key = 0;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const int64_t n = panel * kPanel + column(i);
    const bool is_there = is_row && n < p.out_features;
    products[i] = !is_there ? -INFINITY : p.bias ? sums[i] + p.bias[n] : sums[i];
    if (best.keys) {
      if (is_there) key = larger(key, best_key(products[i], n));
    } else if (is_there) {
      store_float(p.out, row * p.out_stride + n, products[i], p.dtype);
    }
  }
  if (!best.keys) return;
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2)
    key = larger(key, __shfl_xor_sync(kAllLanes, key, distance));
  const bool writes = is_row && panel * kPanel < p.out_features && lane_id() % kLanes == 0;
  if (writes) best.keys[panel * p.num_rows + row] = key;
  if (!best.sums) return;
  const float shift = finite_or_zero(logit_of(key));
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < kCount; ++i) sum += expf(products[i] - shift);
  sum = warp_sum<kLanes / 2>(sum);
  if (writes) best.sums[panel * p.num_rows + row] = sum;
}

}  // namespace teco::cuda

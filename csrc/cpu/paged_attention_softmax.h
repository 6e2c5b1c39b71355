// The softmax of attention: from raw dot products to weights, and the small algebra of attention states.
//
// A state (max, sum, acc) stands for the keys it has seen: sum = sum_k exp(score[k] - max), acc = sum_k exp(score[k] -
// max) * value[k]. The empty state is (-inf, 0, 0); merging it changes no bit of the other.
#pragma once

#include "cpu/vec.h"

namespace teco::cpu::TECO_ISA {

template <class T>
inline void store_up_to(T* p, F32x8 v, int64_t n) {
  if (n >= kLanes) {
    store(p, v);
  } else {
    store_partial(p, v, n);
  }
}

inline float tree_max(F32x8 v) {
  v = max(v, F32x8(__builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3)));
  v = max(v, F32x8(__builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5)));
  return max(v[0], v[1]);
}

// tanh(x), relative error below 3e-7: an odd polynomial near zero, where 1 - 2 / (exp(2x) + 1) would cancel.
inline F32x8 tanh(F32x8 x) {
  const F32x8 z = x * x;
  F32x8 p = splat(-5.70498872745e-3f);
  p = fma(p, z, splat(2.06390887954e-2f));
  p = fma(p, z, splat(-5.37397155531e-2f));
  p = fma(p, z, splat(1.33314422036e-1f));
  p = fma(p, z, splat(-3.33332819422e-1f));
  const F32x8 small = fma(p * z, x, x);
  const F32x8 large = splat(1.f) - splat(2.f) / (exp(x + x) + splat(1.f));
  return x * x < splat(0.625f * 0.625f) ? small : large;
}

// How the scores of one query row are made of dot products. Keys are numbered from the start of the block of keys.
struct RowScores {
  float scale;
  float soft_cap;        // 0: none
  float inverse_cap;     // 1 / soft_cap
  float slope;           // ALiBi; 0: none
  float first_distance;  // position of key 0 minus position of the row
  int32_t begin, end;    // keys the row may see
};

// The running softmax of one row. Lanes of `sum` belong to keys modulo 8.
struct RunningSoftmax {
  float max;
  F32x8 sum;
};

// Turns dot products scores[begin, end) into weights exp(score - max) * value_scales, and updates the running softmax.
// Returns the factor that brings what was accumulated before to the new maximum. key_scales, value_scales: per key, or
// null for 1. Lanes outside [begin, end) count as keys with weight 0, which changes no bit of any other.
inline float softmax_row(const RowScores& row, float* scores, const float* key_scales, const float* value_scales,
                         RunningSoftmax& state) {
  const I32x8 lanes = {0, 1, 2, 3, 4, 5, 6, 7};
  const int32_t first = row.begin / kLanes * kLanes, last = ceil_div(row.end, kLanes) * kLanes;
  F32x8 largest = splat(-kInfinity);
  for (int32_t j = first; j < last; j += kLanes) {
    F32x8 x = load(scores + j) * splat(row.scale);
    if (key_scales) x *= load(key_scales + j);
    if (row.soft_cap != 0.f) x = splat(row.soft_cap) * tanh(x * splat(row.inverse_cap));
    if (row.slope != 0.f) {
      const F32x8 distance = __builtin_convertvector(lanes + j, F32x8) + splat(row.first_distance);
      x = fma(distance, splat(row.slope), x);
    }
    if (j < row.begin || j + kLanes > row.end) {
      const I32x8 key = lanes + j;
      x = (key >= row.begin) & (key < row.end) ? x : splat(-kInfinity);
    }
    store(scores + j, x);
    largest = max(largest, x);
  }
  const float new_max = max(state.max, tree_max(largest)), shift = finite_or_zero(new_max);
  const float correction = new_max == state.max ? 1.f : exp_one(state.max - shift);
  F32x8 sum = state.sum * splat(correction);
  for (int32_t j = first; j < last; j += kLanes) {
    const F32x8 weight = exp_nonpositive(load(scores + j) - splat(shift));
    sum += weight;
    store(scores + j, value_scales ? weight * load(value_scales + j) : weight);
  }
  state = {new_max, sum};
  return correction;
}

// A state whose sum is reduced to one number.
struct AttentionState {
  float max, sum;
  float* acc;  // [size], a multiple of 8
};

// into = into + from.
inline void merge_state(AttentionState& into, const AttentionState& from, int64_t size) {
  const float new_max = max(into.max, from.max), shift = finite_or_zero(new_max);
  const float a = exp_one(into.max - shift), b = exp_one(from.max - shift);
  for (int64_t d = 0; d < size; d += kLanes)
    store(into.acc + d, fma(load(from.acc + d), splat(b), load(into.acc + d) * splat(a)));
  into.max = new_max;
  into.sum = into.sum * a + from.sum * b;
}

}  // namespace teco::cpu::TECO_ISA

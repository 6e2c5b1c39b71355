// The largest logit of each row, without the logits: the matmuls of dense_matmul and gptq_matmul with a sink that keeps
// one number per row.
//
// That number is the logit and its token in one integer, ordered as the logits are and, among equals, with the lowest
// token last. The largest of integers is the same in any order, so threads may raise it as they come. Bound as the
// matmul is: a panel costs a comparison more than its products, and nearly never a write.
#include "cpu/matmul.h"

namespace teco::cpu::TECO_ISA {
namespace {

constexpr uint64_t kNaNKey = ~uint64_t{0};  // above infinity: NaN stays
constexpr uint32_t kLastToken = ~uint32_t{0};

inline uint64_t best_key(float logit, int64_t token) {
  return uint64_t{ordered_key(logit)} << 32 | (kLastToken - static_cast<uint32_t>(token));
}

inline void raise_to(uint64_t* best, uint64_t key) {
  uint64_t seen = __atomic_load_n(best, __ATOMIC_RELAXED);
  while (key > seen && !__atomic_compare_exchange_n(best, &seen, key, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
}

struct BestOfRows {
  uint64_t* keys;     // [num_rows]
  const float* bias;  // [out_features] or null
  int64_t out_features;
};

// Eight logits of a panel; -inf in place of columns that only fill it up.
inline F32x8 panel_logits(const BestOfRows& best, const float* sums, int64_t column) {
  const int64_t columns = best.out_features - column;
  if (columns <= 0) return splat(-__builtin_inff());
  F32x8 logits = add_bias(sums, best.bias ? best.bias + column : nullptr, columns);
  for (int64_t lane = columns; lane < kLanes; ++lane) logits[lane] = -__builtin_inff();
  return logits;
}

void take_best(const void* context, int64_t row, int64_t count, const float* sums, int64_t panel) {
  const BestOfRows& best = *static_cast<const BestOfRows*>(context);
  const int64_t column = panel * kPanel;
  for (int64_t r = 0; r < count; ++r, sums += kPanel) {
    const F32x8 low = panel_logits(best, sums, column), high = panel_logits(best, sums + kLanes, column + kLanes);
    uint64_t* key = best.keys + row + r;
    if (lane_bits((low != low) | (high != high))) {
      raise_to(key, kNaNKey);
      continue;
    }
    const float largest = reduce_max(max(low, high));
    if (best_key(largest, column) <= __atomic_load_n(key, __ATOMIC_RELAXED)) continue;
    const int found = lane_bits(low == splat(largest)) | lane_bits(high == splat(largest)) << kLanes;
    raise_to(key, best_key(largest, column + __builtin_ctz(found)));
  }
}

template <class Matmul>
void argmax(const ArgmaxParams& p, const Matmul& matmul, void (*multiply)(const Matmul&, const PanelSink&, int),
            int num_threads) {
  auto* keys = reinterpret_cast<uint64_t*>(p.token_ids);  // until they are complete
  __builtin_memset(keys, 0, static_cast<size_t>(matmul.num_rows) * sizeof(uint64_t));
  const BestOfRows best = {keys, matmul.bias, matmul.out_features};
  multiply(matmul, {take_best, &best}, num_threads);
  for (int64_t r = 0; r < matmul.num_rows; ++r) {
    const uint64_t key = keys[r];
    const bool is_nan = key == kNaNKey;
    p.token_ids[r] = is_nan ? kInvalidRow : static_cast<int64_t>(kLastToken - static_cast<uint32_t>(key));
    p.logits[r] = is_nan ? __builtin_nanf("") : from_ordered_key(static_cast<uint32_t>(key >> 32));
  }
}

}  // namespace

void lm_head_argmax(const LmHeadArgmaxParams& p, int num_threads) {
  argmax(p.argmax, p.matmul, multiply_dense, num_threads);
}

void gptq_lm_head_argmax(const GptqLmHeadArgmaxParams& p, int num_threads) {
  argmax(p.argmax, p.matmul, multiply_gptq, num_threads);
}

}  // namespace teco::cpu::TECO_ISA

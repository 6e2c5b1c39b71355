// The largest logit of each row, without the logits: the matmuls of dense_matmul and gptq_matmul with a sink that keeps
// one number per row.
//
// That number is the logit and its token in one integer, ordered as the logits are and, among equals, with the lowest
// token last. The largest of integers is the same in any order, so threads may raise it as they come. Bound as the
// matmul is: a panel costs a comparison more than its products, and nearly never a write.
//
// A sum of exponentials is not the same in any order. Where it is asked for, every panel of a row leaves its own
// largest logit and the sum below it, two numbers for 16 logits, and these are added up at the end, in the order of the
// panels.
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

// Of a row's logits in one panel: sum of exp(logit - largest).
struct PanelSum {
  float largest, sum;
};

struct BestOfRows {
  uint64_t* keys;     // [num_rows]
  const float* bias;  // [out_features] or null
  int64_t num_rows, out_features;
  // [num_panels, num_rows], so that a panel writes one cache line and not one or two per row: with these, four rows by
  // weights that are not in cache took 1.4 times as long. Null where nobody asks; not written where a logit is NaN.
  PanelSum* panel_sums;
};

// Eight logits of a panel; -inf in place of columns that only fill it up.
inline F32x8 panel_logits(const BestOfRows& best, const float* sums, int64_t column) {
  const int64_t columns = best.out_features - column;
  if (columns <= 0) return splat(-kInfinity);
  F32x8 logits = add_bias(sums, best.bias ? best.bias + column : nullptr, columns);
  for (int64_t lane = columns; lane < kLanes; ++lane) logits[lane] = -kInfinity;
  return logits;
}

template <bool kSums>
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
    if constexpr (kSums) {
      const F32x8 shift = splat(finite_or_zero(largest));
      best.panel_sums[panel * best.num_rows + row + r] = {
          largest, reduce_add(exp_nonpositive(low - shift) + exp_nonpositive(high - shift))};
    }
    if (best_key(largest, column) <= __atomic_load_n(key, __ATOMIC_RELAXED)) continue;
    const int found = lane_bits(low == splat(largest)) | lane_bits(high == splat(largest)) << kLanes;
    raise_to(key, best_key(largest, column + __builtin_ctz(found)));
  }
}

// log sum exp(logit) of a row whose largest logit is known. Lane i adds up panels i, i + 8, ..., so the order is that
// of the panels, whoever left them.
float merge_panels(const PanelSum* sums, int64_t stride, int64_t num_panels, float largest) {
  if (!(__builtin_fabsf(largest) < kInfinity)) return largest;
  F32x8 total = splat(0.f);
  for (int64_t panel = 0; panel < num_panels; panel += kLanes) {
    F32x8 shift = splat(-kInfinity), sum = splat(0.f);
    for (int64_t lane = 0; lane < min<int64_t>(num_panels - panel, kLanes); ++lane, sums += stride) {
      shift[lane] = sums->largest;
      sum[lane] = sums->sum;
    }
    total = fma(sum, exp_nonpositive(shift - splat(largest)), total);
  }
  return largest + log_one(reduce_add(total));
}

// Rows [0, matmul.num_rows), no more than scratch memory is meant for.
template <class Matmul>
void argmax_rows(const ArgmaxParams& p, const Matmul& matmul, void (*multiply)(const Matmul&, const PanelSink&, int),
                 int num_threads) {
  const int64_t num_rows = matmul.num_rows, num_panels = ceil_div<int64_t>(matmul.out_features, kPanel);
  auto* keys = reinterpret_cast<uint64_t*>(p.token_ids);  // until they are complete
  BestOfRows best = {keys, matmul.bias, num_rows, matmul.out_features, nullptr};
  if (p.logsumexp)
    best.panel_sums = static_cast<PanelSum*>(
        thread_scratch(Scratch::kCaller, static_cast<size_t>(num_rows * num_panels) * sizeof(PanelSum)));
  __builtin_memset(keys, 0, static_cast<size_t>(num_rows) * sizeof(uint64_t));
  multiply(matmul, {p.logsumexp ? take_best<true> : take_best<false>, &best}, num_threads);
  for (int64_t r = 0; r < num_rows; ++r) {
    const uint64_t key = keys[r];
    const bool is_nan = key == kNaNKey;
    p.token_ids[r] = is_nan ? kInvalidRow : static_cast<int64_t>(kLastToken - static_cast<uint32_t>(key));
    p.logits[r] = is_nan ? __builtin_nanf("") : from_ordered_key(static_cast<uint32_t>(key >> 32));
  }
  if (!p.logsumexp) return;
  const int64_t row_bytes = num_panels * static_cast<int64_t>(sizeof(PanelSum));
  parallel_for(num_rows, task_grain(row_bytes), num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r)
      p.logsumexp[r] = merge_panels(best.panel_sums + r, num_rows, num_panels, p.logits[r]);
  });
}

template <class Matmul>
void argmax(const ArgmaxParams& p, Matmul matmul, void (*multiply)(const Matmul&, const PanelSink&, int),
            int num_threads) {
  const int64_t num_rows = matmul.num_rows, row_bytes = matmul.input_stride * element_bytes(matmul.dtype);
  const auto* input = static_cast<const char*>(matmul.input);
  for (int64_t first = 0; first < num_rows; first += kScratchRows) {
    matmul.num_rows = min(num_rows - first, kScratchRows);
    matmul.input = input + first * row_bytes;
    argmax_rows({p.token_ids + first, p.logits + first, p.logsumexp ? p.logsumexp + first : nullptr}, matmul, multiply,
                num_threads);
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

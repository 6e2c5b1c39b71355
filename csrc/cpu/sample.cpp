// Draws one token per row of logits.
//
// Two passes over the row, which the second one finds in cache: the maximum, then the weights exp((x - max) /
// temperature), summed and filtered. Bound by the exponentials (about 4 cycles per token with AVX2). There is no sort:
// the filters keep a prefix of the order "larger logit first, lower id first among equals", and a radix select over
// the few tokens near the top finds where it ends.
//
// Weights are integers, in units of 2^-40 of the largest: their sums are exact, hence the same in any order, and a
// token is drawn by integer arithmetic alone. A token below half a unit is never drawn; over a whole vocabulary that is
// less than the rounding of fp32 probabilities.
#include "cpu/random.h"

namespace teco::cpu::TECO_ISA {
namespace {

// Tokens at most this many nats (divided by temperature) below the maximum are looked at first by top-k and top-p;
// twice as many when those do not suffice. At 32 every token that has a weight is among them.
constexpr float kFirstDepth = 8;
constexpr float kNoDepth = -1;

// Digits of the radix select: the highest holds sign, exponent and two bits of mantissa, enough to tell logits apart.
constexpr int kDigitBits = 11;
constexpr uint32_t kDigit = (1u << kDigitBits) - 1;

struct Candidate {
  uint64_t weight;
  uint32_t key;  // ordered as the logits are
  int32_t id;
};

// What a row is drawn from.
template <class T>
struct Row {
  const T* logits;
  int64_t size;
  float max;
  float temperature;
  float min_p;
};

// Weights of eight tokens, and how far they lie below the maximum.
struct Weights {
  F32x8 below;  // (x - max) / temperature, <= 0
  UnitWeights units;
};

struct Collected {
  uint64_t total;   // weight of the whole row
  uint64_t weight;  // of the candidates
  int64_t count;
};

// Eight logits from i on; past the end of the row there is nothing to draw.
template <class T>
inline F32x8 load_logits(const T* logits, int64_t i, int64_t size) {
  if (i + kLanes <= size) return load(logits + i);
  F32x8 x = load_partial(logits + i, size - i);
  for (int64_t lane = size - i; lane < kLanes; ++lane) x[lane] = -__builtin_inff();
  return x;
}

// The largest logit; NaN when there is a NaN among them.
template <class T>
float max_logit(const T* logits, int64_t size) {
  F32x8 largest = splat(-__builtin_inff());
  I32x8 is_nan = splat_int(0);
  for (int64_t i = 0; i < size; i += kLanes) {
    const F32x8 x = load_logits(logits, i, size);
    largest = max(x, largest);
    is_nan |= x != x;
  }
  return lane_bits(is_nan) ? __builtin_nanf("") : reduce_max(largest);
}

template <class T>
int64_t first_equal(const T* logits, int64_t size, float value) {
  int64_t i = 0;
  int found = 0;
  for (; !found; i += kLanes) found = lane_bits(load_logits(logits, i, size) == splat(value));
  return i - kLanes + __builtin_ctz(found);
}

template <class T>
inline Weights weigh(const Row<T>& row, int64_t i) {
  const F32x8 below = (load_logits(row.logits, i, row.size) - splat(row.max)) / splat(row.temperature);
  F32x8 weight = exp(below);
  weight = weight < splat(row.min_p) ? splat(0.f) : weight;
  return {below, UnitWeights(weight)};
}

// Sums the row's weights and gathers, in order of id, the tokens at most `depth` below the maximum that have one.
template <class T>
Collected collect(const Row<T>& row, float depth, Candidate* candidates) {
  U64x4 total = {}, taken = {};
  int64_t count = 0;
  for (int64_t i = 0; i < row.size; i += kLanes) {
    const Weights weights = weigh(row, i);
    total += weights.units.low + weights.units.high;
    int near = lane_bits(weights.below >= splat(-depth));
    if (!near) continue;
    uint64_t weight[kLanes];
    store_bits(weight, weights.units.low);
    store_bits(weight + 4, weights.units.high);
    const F32x8 logits = load_logits(row.logits, i, row.size);
    for (; near; near &= near - 1) {
      const int lane = __builtin_ctz(near);
      if (!weight[lane]) continue;
      taken[0] += weight[lane];
      candidates[count++] = {weight[lane], ordered_key(logits[lane]), static_cast<int32_t>(i + lane)};
    }
  }
  return {total[0] + total[1] + total[2] + total[3], taken[0], count};
}

// Keeps the shortest prefix of the candidates (larger logit first, lower id first among equals) whose measure reaches
// the target, still in order of id, and returns its length. Finds the last key kept digit by digit, highest first;
// the lowest overlaps the one before, since 32 is no multiple of their width.
template <class Measure>
int64_t keep_prefix(Candidate* candidates, int64_t count, uint64_t target, Measure measure) {
  uint32_t last = 0, known = 0;  // the last key kept, and which of its bits are known
  uint64_t reached = 0;          // measure of the keys above it
  for (int shift = 32 - kDigitBits;; shift = max(shift - kDigitBits, 0)) {
    uint64_t histogram[1 << kDigitBits] = {};
    for (int64_t i = 0; i < count; ++i)
      if ((candidates[i].key & known) == last) histogram[candidates[i].key >> shift & kDigit] += measure(candidates[i]);
    uint32_t digit = kDigit;
    while (digit > 0 && reached + histogram[digit] < target) reached += histogram[digit--];
    last |= digit << shift;
    known |= kDigit << shift;
    if (shift == 0) break;
  }
  int64_t kept = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (candidates[i].key == last) {
      if (reached >= target) continue;
      reached += measure(candidates[i]);
    }
    if (candidates[i].key >= last) candidates[kept++] = candidates[i];
  }
  return kept;
}

uint64_t sum_weights(const Candidate* candidates, int64_t count) {
  uint64_t sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += candidates[i].weight;
  return sum;
}

inline uint64_t scaled(uint64_t total, float top_p) {
  return static_cast<uint64_t>(__builtin_ceil(static_cast<double>(total) * static_cast<double>(top_p)));
}

// The token whose share of the summed weights, in order of id, holds `point`.
int64_t draw_candidate(const Candidate* candidates, uint64_t point) {
  while (point >= candidates->weight) point -= candidates++->weight;
  return candidates->id;
}

template <class T>
int64_t sample_row(const SampleParams& p, int64_t r) {
  const T* logits = static_cast<const T*>(p.logits) + r * p.logits_stride;
  const float max = max_logit(logits, p.vocab_size);
  if (!(__builtin_fabsf(max) < __builtin_inff())) return kInvalidRow;
  if (p.temperature[r] == 0) return first_equal(logits, p.vocab_size, max);

  const Row<T> row = {logits, p.vocab_size, max, p.temperature[r], p.min_p[r]};
  const uint64_t bits = random_bits(static_cast<uint64_t>(p.seed[r]), static_cast<uint64_t>(p.offset[r]), 0).low;
  const int64_t top_k = p.top_k[r];
  const float top_p = p.top_p[r];
  if (top_k <= 0 && top_p >= 1) {
    const Collected all = collect(row, kNoDepth, nullptr);
    return token_at(draw_below(all.total, bits), [&](int64_t i) { return weigh(row, i).units; });
  }

  const size_t scratch_bytes = static_cast<size_t>(p.vocab_size) * sizeof(Candidate);
  Candidate* candidates = static_cast<Candidate*>(thread_scratch(Scratch::kTask, scratch_bytes));
  Collected near = collect(row, kFirstDepth, candidates);
  const auto suffices = [&] { return top_k > 0 ? near.count >= top_k : near.weight >= scaled(near.total, top_p); };
  for (float depth = 2 * kFirstDepth; near.weight < near.total && !suffices(); depth *= 2)
    near = collect(row, depth, candidates);

  int64_t count = near.count;
  uint64_t weight = near.total;
  if (top_k > 0) {
    if (top_k < count)
      count = keep_prefix(candidates, count, static_cast<uint64_t>(top_k), [](const Candidate&) { return 1; });
    weight = sum_weights(candidates, count);
  }
  if (top_p < 1) {
    count = keep_prefix(candidates, count, scaled(weight, top_p), [](const Candidate& c) { return c.weight; });
    weight = sum_weights(candidates, count);
  }
  return draw_candidate(candidates, draw_below(weight, bits));
}

}  // namespace

void sample(const SampleParams& p, int num_threads) {
  with_float_type(p.dtype, [&]<class T>(Type<T>) {
    const int64_t row_bytes = p.vocab_size * static_cast<int64_t>(sizeof(T));
    parallel_for(p.num_rows, task_grain(row_bytes), num_threads, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) p.token_ids[r] = sample_row<T>(p, r);
    });
  });
}

}  // namespace teco::cpu::TECO_ISA

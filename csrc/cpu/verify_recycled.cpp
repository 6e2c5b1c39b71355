// How many recycled tokens stand: those that the target agrees with, or those that the rejection rule of speculative
// sampling accepts (Leviathan et al., arXiv 2211.17192; Chen et al., arXiv 2302.01318).
//
// The rule looks at two numbers per token that it accepts and at one or two whole rows where it draws the next token:
// bound by reading these.
#include "cpu/random.h"

namespace teco::cpu::TECO_ISA {

void verify_recycled(const VerifyRecycledParams& p, int) {
  for (int64_t s = 0; s < p.num_seqs; ++s) {
    const int64_t *target = p.target + s * p.target_stride, *recycled = p.recycled + s * p.recycled_stride;
    int64_t n = 0;
    while (n < p.num_recycled && recycled[n] == target[n]) ++n;
    p.num_accepted[s] = static_cast<int32_t>(n);
  }
}

namespace {

// sample() draws from stream 0. The recycled tokens may come of it, under the same seeds and offsets: what decides on a
// token must not be what it was drawn with.
constexpr uint32_t kStream = 1;

constexpr float kLargest = 1.001f;  // a softmax in fp32 may exceed 1

template <class T>
int64_t draw(const T* target, int64_t size, uint64_t bits, const T* recycled) {
  const auto load8 = [&](const T* row, int64_t i) { return load_up_to(row + i, size - i); };
  const auto weigh = [&](int64_t i) {
    const F32x8 p = load8(target, i);
    return UnitWeights(recycled ? max(p - load8(recycled, i), splat(0.f)) : p);
  };
  U64x4 sums = {};
  I32x8 valid = splat_int(-1);
  const auto check = [&](F32x8 x) { valid &= (x >= splat(0.f)) & (x <= splat(kLargest)); };
  for (int64_t i = 0; i < size; i += kLanes) {
    check(load8(target, i));
    if (recycled) check(load8(recycled, i));
    const UnitWeights weights = weigh(i);
    sums += weights.low + weights.high;
  }
  if (lane_bits(~valid)) return kInvalidRow;
  const uint64_t total = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  if (total) return token_at(draw_below(total, bits), weigh);
  // p nowhere exceeds q: the two are the same but for rounding, which is all that the rejection came of.
  return recycled ? draw<T>(target, size, bits, nullptr) : kInvalidRow;
}

template <class T>
void verify_sequence(const VerifyRecycledSampledParams& p, int64_t s) {
  const T* target = static_cast<const T*>(p.target) + s * p.target_stride;
  const T* recycled = static_cast<const T*>(p.recycled) + s * p.recycled_stride;
  const auto seed = static_cast<uint64_t>(p.seed[s]), offset = static_cast<uint64_t>(p.offset[s]);
  const auto is_probability = [](float x) { return x >= 0.f && x <= kLargest; };
  p.num_accepted[s] = 0;
  p.next_token_ids[s] = kInvalidRow;
  for (int64_t n = 0;; ++n, target += p.target_row_stride, recycled += p.recycled_row_stride) {
    const RandomBits bits = random_bits(seed, offset + static_cast<uint64_t>(n), kStream);
    const bool drawn = n < p.num_recycled;
    if (drawn) {
      const int64_t token = p.token_ids[s * p.token_ids_stride + n];
      const bool known = token >= 0 && token < p.vocab_size;  // replayed in a plan, there may be none: rejected
      const float target_p = known ? load_one(target + token) : 0.f, q = known ? load_one(recycled + token) : 0.f;
      if (!is_probability(target_p) || !is_probability(q)) return;
      const double uniform = static_cast<double>(bits.low >> 11) * 0x1p-53;
      if (uniform * static_cast<double>(q) < static_cast<double>(target_p)) continue;
    }
    p.next_token_ids[s] = draw(target, p.vocab_size, bits.high, drawn ? recycled : nullptr);
    if (p.next_token_ids[s] != kInvalidRow) p.num_accepted[s] = static_cast<int32_t>(n);
    return;
  }
}

}  // namespace

void verify_recycled_sampled(const VerifyRecycledSampledParams& p, int num_threads) {
  with_float_type(p.dtype, [&]<class T>(Type<T>) {
    const int64_t row_bytes = 2 * p.vocab_size * static_cast<int64_t>(sizeof(T));
    parallel_for(p.num_seqs, task_grain(row_bytes), num_threads, [&](int64_t begin, int64_t end) {
      for (int64_t s = begin; s < end; ++s) verify_sequence<T>(p, s);
    });
  });
}

}  // namespace teco::cpu::TECO_ISA

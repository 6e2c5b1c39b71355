// Draws one token per row of logits, by the same rule and to the same token as csrc/cpu/sample.cpp.
//
// A block per row: the largest logit, then the weights exp((x - max) / temperature), summed and drawn from. There is no
// sort: the filters keep a prefix of the order "larger logit first, lower id first among equals", and where it ends is
// searched for in the keys of the logits, two bits at a time: 16 passes for top-k and as many for top-p. The first pass
// reads the row from memory, the others from L2; bound by these and, with filters, by their exponentials, whose row is
// in one multiprocessor.
//
// Weights are integers, in units of 2^-40 of the largest. A token below half a unit is never drawn.
#include "cuda/best_key.h"
#include "cuda/draw.h"

namespace teco::cuda {
namespace {

constexpr int kDigitBits = 2;
constexpr int kDigits = 1 << kDigitBits;

// What a row is drawn from.
template <class T>
struct Row {
  const T* logits;
  int64_t size;
  float max, temperature, min_p;

  __device__ uint64_t weight(int64_t i) const {
    const float weight = exp_nonpositive((to_float(logits[i]) - max) / temperature);
    return weight < min_p ? 0 : to_units(weight);
  }
  __device__ uint64_t key(int64_t i) const { return best_key(to_float(logits[i]), i); }
};

// The largest key; kNaNKey when there is a NaN.
template <class T>
__device__ uint64_t largest_key(const T* logits, int64_t size) {
  uint64_t key = 0;
  for (int64_t i = thread_id(); i < size; i += kDrawThreads) key = larger(key, best_key(to_float(logits[i]), i));
  return block_fold<kDrawThreads>(key, [](uint64_t a, uint64_t b) { return larger(a, b); });
}

// The last key of the shortest prefix, larger keys first, whose measure reaches the target, which that of all does.
// measure(i) is that of a token.
template <class T, class Measure>
__device__ uint64_t last_key(const Row<T>& row, uint64_t target, Measure measure) {
  uint32_t last = 0;     // of the logit, whose digits are found highest first
  uint64_t reached = 0;  // measure of the larger ones
  for (int shift = 32 - kDigitBits; shift >= 0; shift -= kDigitBits) {
    uint64_t from[kDigits + 1] = {};  // from[d]: measure of the keys with this digit or a larger one
    for (int64_t i = thread_id(); i < row.size; i += kDrawThreads) {
      const uint32_t key = ordered_key(to_float(row.logits[i]));
      if (key < (last | 1u << shift)) continue;
      const uint64_t of_token = measure(i);
#pragma unroll
      for (int d = 1; d < kDigits; ++d)
        if (key >= (last | static_cast<uint32_t>(d) << shift)) from[d] += of_token;
    }
#pragma unroll
    for (int d = 1; d < kDigits; ++d) from[d] = block_fold<kDrawThreads>(from[d], Sum{});
    from[kDigits] = reached;
    uint32_t digit = 0;
#pragma unroll
    for (int d = 1; d < kDigits; ++d)
      if (from[d] >= target) digit = static_cast<uint32_t>(d);
#pragma unroll
    for (int d = 0; d < kDigits; ++d)
      if (digit == static_cast<uint32_t>(d)) reached = from[d + 1];
    last |= digit << shift;
  }
  const auto of_equal = [&](int64_t i) { return ordered_key(to_float(row.logits[i])) == last ? measure(i) : 0; };
  return best_key(last, token_at(target - reached - 1, row.size, of_equal));
}

__device__ __forceinline__ uint64_t scaled(uint64_t total, float top_p) {
  return static_cast<uint64_t>(ceil(static_cast<double>(total) * static_cast<double>(top_p)));
}

template <class T>
__global__ void __launch_bounds__(kDrawThreads) sample_kernel(SampleParams p) {
  const int64_t r = blockIdx.x, size = p.vocab_size;
  const T* logits = static_cast<const T*>(p.logits) + r * p.logits_stride;
  const uint64_t best = largest_key(logits, size);
  const float max = logit_of(best), temperature = p.temperature[r];
  if (best == kNaNKey || !is_finite(max) || temperature == 0.f) {
    if (thread_id() == 0) p.token_ids[r] = best == kNaNKey || !is_finite(max) ? kInvalidRow : token_of(best);
    return;
  }

  const Row<T> row = {logits, size, max, temperature, p.min_p[r]};
  uint64_t last = 0;  // tokens with a key below it are left out
  const auto weigh = [&](int64_t i) { return row.key(i) >= last ? row.weight(i) : 0; };
  const int64_t top_k = p.top_k[r];
  if (top_k > 0) {
    const auto count = [&](int64_t i) { return row.weight(i) > 0 ? uint64_t{1} : uint64_t{0}; };
    if (static_cast<uint64_t>(top_k) < total_weight(size, count))
      last = last_key(row, static_cast<uint64_t>(top_k), count);
  }
  uint64_t total = total_weight(size, weigh);
  if (p.top_p[r] < 1.f) {
    last = last_key(row, scaled(total, p.top_p[r]), weigh);
    total = total_weight(size, weigh);
  }
  const uint64_t bits = random_bits(static_cast<uint64_t>(p.seed[r]), static_cast<uint64_t>(p.offset[r]), 0).low;
  const int64_t token = token_at(draw_below(total, bits), size, weigh);
  if (thread_id() == 0) p.token_ids[r] = token;
}

}  // namespace

Status sample(const SampleParams& p, void* stream) {
  if (p.num_rows == 0) return nullptr;
  return with_float_type(p.dtype, [&]<class T>(Type<T>) {
    return launch("sample", dim3{static_cast<unsigned>(p.num_rows)}, dim3{kDrawThreads}, {}, stream, sample_kernel<T>,
                  p);
  });
}

}  // namespace teco::cuda

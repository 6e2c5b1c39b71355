// How many recycled tokens stand: those that the target agrees with, or those that the rejection rule of speculative
// sampling accepts (Leviathan et al., arXiv 2211.17192; Chen et al., arXiv 2302.01318), by the same rule and to the
// same tokens as csrc/cpu/verify_recycled.cpp.
//
// The rule looks at two numbers per token that it accepts and at one or two whole rows where it draws the next token: a
// block per sequence, bound by reading these.
#include "cuda/best_key.h"
#include "cuda/draw.h"

namespace teco::cuda {
namespace {

constexpr int kThreads = 128;
// sample() draws from stream 0. The recycled tokens may come of it, under the same seeds and offsets: what decides on a
// token must not be what it was drawn with.
constexpr uint32_t kStream = 1;
constexpr float kLargest = 1.001f;  // a softmax in fp32 may exceed 1

__global__ void __launch_bounds__(kThreads) verify_recycled_kernel(VerifyRecycledParams p) {
  const int64_t s = static_cast<int64_t>(blockIdx.x) * kThreads + thread_id();
  if (s >= p.num_seqs) return;
  const int64_t *target = p.target + s * p.target_stride, *recycled = p.recycled + s * p.recycled_stride;
  int n = 0;
  while (n < p.num_recycled && recycled[n] == target[n]) ++n;
  p.num_accepted[s] = n;
}

__device__ __forceinline__ bool is_probability(float x) {
  return x >= 0.f && x <= kLargest;
}

// From max(target - recycled, 0), or from the target where that is 0 everywhere or there is no `recycled`; kInvalidRow
// when these are no probabilities. All threads of the block call it, and get it.
template <class T>
__device__ int64_t draw(const T* target, int64_t size, uint64_t bits, const T* recycled) {
  const auto weigh = [&](int64_t i) {
    const float p = to_float(target[i]);
    return to_units(recycled ? fmaxf(p - to_float(recycled[i]), 0.f) : p);
  };
  uint64_t invalid = 0;
  for (int64_t i = thread_id(); i < size; i += kDrawThreads)
    if (!is_probability(to_float(target[i])) || (recycled && !is_probability(to_float(recycled[i])))) invalid = 1;
  if (block_fold<kDrawThreads>(invalid, Sum{})) return kInvalidRow;
  uint64_t total = total_weight(size, weigh);
  if (total == 0 && recycled) {
    // p nowhere exceeds q: the two are the same but for rounding, which is all that the rejection came of.
    recycled = nullptr;
    total = total_weight(size, weigh);
  }
  return total ? token_at(draw_below(total, bits), size, weigh) : kInvalidRow;
}

template <class T>
__global__ void __launch_bounds__(kDrawThreads) verify_recycled_sampled_kernel(VerifyRecycledSampledParams p) {
  const int64_t s = blockIdx.x;
  const T* target = static_cast<const T*>(p.target) + s * p.target_stride;
  const T* recycled = static_cast<const T*>(p.recycled) + s * p.recycled_stride;
  const auto seed = static_cast<uint64_t>(p.seed[s]), offset = static_cast<uint64_t>(p.offset[s]);
  int64_t next = kInvalidRow;
  int n = 0;
  for (;; ++n, target += p.target_row_stride, recycled += p.recycled_row_stride) {
    const RandomBits bits = random_bits(seed, offset + static_cast<uint64_t>(n), kStream);
    const bool drawn = n < p.num_recycled;
    if (drawn) {
      const int64_t token = p.token_ids[s * p.token_ids_stride + n];
      const bool known = token >= 0 && token < p.vocab_size;  // of a step before, there may be none: rejected
      const float target_p = known ? to_float(target[token]) : 0.f, q = known ? to_float(recycled[token]) : 0.f;
      if (!is_probability(target_p) || !is_probability(q)) break;
      const double uniform = static_cast<double>(bits.low >> 11) * 0x1p-53;
      if (uniform * static_cast<double>(q) < static_cast<double>(target_p)) continue;
    }
    next = draw(target, p.vocab_size, bits.high, drawn ? recycled : nullptr);
    break;
  }
  if (thread_id() != 0) return;
  p.num_accepted[s] = next == kInvalidRow ? 0 : n;
  p.next_token_ids[s] = next;
}

}  // namespace

Status verify_recycled(const VerifyRecycledParams& p, void* stream) {
  if (p.num_seqs == 0) return nullptr;
  return launch("verify_recycled", dim3{static_cast<unsigned>(ceil_div<int64_t>(p.num_seqs, kThreads))}, dim3{kThreads},
                {}, stream, verify_recycled_kernel, p);
}

Status verify_recycled_sampled(const VerifyRecycledSampledParams& p, void* stream) {
  if (p.num_seqs == 0) return nullptr;
  return with_float_type(p.dtype, [&]<class T>(Type<T>) {
    return launch("verify_recycled_sampled", dim3{static_cast<unsigned>(p.num_seqs)}, dim3{kDrawThreads}, {}, stream,
                  verify_recycled_sampled_kernel<T>, p);
  });
}

}  // namespace teco::cuda

// Merges two attention states per row; see params.h. Bound by bandwidth: two rows read, one written.
// Symmetric in a and b, bit for bit: both products are rounded before they are added.
#include "cpu/paged_attention_softmax.h"

namespace teco::cpu::TECO_ISA {
namespace {

template <class T>
void weighted_sum(T* out, const T* a, float weight_a, const T* b, float weight_b, int64_t size) {
  for (int64_t i = 0; i < size; i += kLanes) {
    const int64_t count = size - i;
    // An empty state has weight 0 and may hold anything.
    const F32x8 zero = splat(0.f);
    const F32x8 part_a = weight_a == 0.f ? zero : load_up_to(a + i, count) * splat(weight_a);
    const F32x8 part_b = weight_b == 0.f ? zero : load_up_to(b + i, count) * splat(weight_b);
    store_up_to(out + i, part_a + part_b, count);
  }
}

}  // namespace

void merge_attention_states(const MergeAttentionStatesParams& p, int num_threads) {
  with_float_type(p.dtype, [&]<class T>(Type<T>) {
    const int64_t row_bytes = 3 * p.head_dim * static_cast<int64_t>(sizeof(T));
    parallel_for(p.num_tokens * p.num_heads, task_grain(row_bytes), num_threads, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const int64_t t = row / p.num_heads, h = row % p.num_heads;
        const float lse_a = p.lse_a[t * p.lse_a_stride + h], lse_b = p.lse_b[t * p.lse_b_stride + h];
        const float max = finite_or_zero(lse_a < lse_b ? lse_b : lse_a);
        const float a = exp_one(lse_a - max), b = exp_one(lse_b - max), sum = a + b;
        p.lse[t * p.lse_stride + h] = max + log_one(sum);
        const float inverse = sum == 0.f ? 0.f : 1.f / sum;
        weighted_sum(static_cast<T*>(p.out) + t * p.out_stride + h * p.out_head_stride,
                     static_cast<const T*>(p.out_a) + t * p.out_a_stride + h * p.out_a_head_stride, a * inverse,
                     static_cast<const T*>(p.out_b) + t * p.out_b_stride + h * p.out_b_head_stride, b * inverse,
                     p.head_dim);
      }
    });
  });
}

}  // namespace teco::cpu::TECO_ISA

// Merges two attention states per row; see params.h. Bound by bandwidth: two rows read, one written, one warp per row.
// Symmetric in a and b, bit for bit: both products are rounded before they are added.
#include "cuda/attention_state.h"

namespace teco::cuda {
namespace {

constexpr int kThreads = 128;

template <class T>
__global__ void __launch_bounds__(kThreads) merge_attention_states_kernel(MergeAttentionStatesParams p, bool vectors) {
  constexpr int N = kVector<T>;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kThreads / kWarpSize) + warp_id();
  if (row >= p.num_tokens * p.num_heads) return;
  const int64_t t = row / p.num_heads, h = row % p.num_heads;
  const float lse_a = p.lse_a[t * p.lse_a_stride + h], lse_b = p.lse_b[t * p.lse_b_stride + h];
  const float shift = finite_or_zero(fmaxf(lse_a, lse_b));
  const float a = expf(lse_a - shift), b = expf(lse_b - shift), sum = a + b;
  const float inverse = sum == 0.f ? 0.f : 1.f / sum, weight_a = a * inverse, weight_b = b * inverse;
  // `lse` may be one of the states: all lanes have read theirs before one of them writes.
  __syncwarp();
  if (lane_id() == 0) p.lse[t * p.lse_stride + h] = shift + logf(sum);

  const T* row_a = static_cast<const T*>(p.out_a) + t * p.out_a_stride + h * p.out_a_head_stride;
  const T* row_b = static_cast<const T*>(p.out_b) + t * p.out_b_stride + h * p.out_b_head_stride;
  T* out = static_cast<T*>(p.out) + t * p.out_stride + h * p.out_head_stride;
  for (int64_t i = lane_id() * N; i < p.head_dim; i += kWarpSize * N) {
    const int64_t left = p.head_dim - i;
    const Pack<T, N> x = load_up_to<N>(row_a + i, left, vectors), y = load_up_to<N>(row_b + i, left, vectors);
    Pack<T, N> merged;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      // An empty state has weight 0 and may hold anything.
      const float part_a = weight_a == 0.f ? 0.f : to_float(x.at[j]) * weight_a;
      const float part_b = weight_b == 0.f ? 0.f : to_float(y.at[j]) * weight_b;
      set(merged.at[j], part_a + part_b);
    }
    store_up_to<N>(out + i, merged, left, vectors);
  }
}

template <class T>
bool all_aligned(const MergeAttentionStatesParams& p) {
  const auto rows = [](const void* data, int64_t stride) {
    return is_aligned(static_cast<const T*>(data), stride, 16);
  };
  return rows(p.out, p.out_stride) && rows(p.out, p.out_head_stride) && rows(p.out_a, p.out_a_stride) &&
         rows(p.out_a, p.out_a_head_stride) && rows(p.out_b, p.out_b_stride) && rows(p.out_b, p.out_b_head_stride);
}

}  // namespace

Status merge_attention_states(const MergeAttentionStatesParams& p, void* stream) {
  const int64_t rows = p.num_tokens * p.num_heads;
  if (rows == 0) return nullptr;
  const auto blocks = static_cast<unsigned>(ceil_div<int64_t>(rows, kThreads / kWarpSize));
  return with_float_type(p.dtype, [&]<class T>(Type<T>) {
    return launch("merge_attention_states", dim3{blocks}, dim3{kThreads}, {}, stream, merge_attention_states_kernel<T>,
                  p, all_aligned<T>(p));
  });
}

}  // namespace teco::cuda

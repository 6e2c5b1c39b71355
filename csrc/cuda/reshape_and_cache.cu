// Writes the keys and values of a step into their slots of the paged cache: one warp per token, head, and key or value.
// Each element is read once (twice, the second time from L1, where a scale is found first) and written once: bound by
// bandwidth. A slot's bits depend on its token alone.
#include "cuda/kv_element.h"

namespace teco::cuda {
namespace {

constexpr int kThreads = 128;
constexpr float kTiny = 1e-30f;  // a head whose elements are all below this counts as zero

// max |x| / limit; 0 for a head of zeros, NaN when an element is not finite. The same for all lanes.
template <int N, class T>
__device__ float scale_of(const T* head, int64_t head_dim, float limit, bool vectors) {
  float largest = 0.f;
  bool bad = false;
  for (int64_t i = lane_id() * N; i < head_dim; i += kWarpSize * N) {
    const Pack<T, N> x = load_up_to<N>(head + i, head_dim - i, vectors);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const float magnitude = fabsf(to_float(x.at[j]));
      largest = fmaxf(largest, magnitude);
      bad |= !(magnitude <= 3.402823466e38f);
    }
  }
  largest = warp_max(largest);
  if (__any_sync(kAllLanes, bad)) return ptx::as_float(0x7fc00000u);
  return largest > kTiny ? largest / limit : 0.f;
}

template <class T, class E>
__device__ void store_head(const KVCacheView& cache, const ReshapeAndCacheParams& p, int64_t slot, int64_t h,
                           const T* head, bool vectors) {
  constexpr int N = smaller(kVector<T>, kVector<E>);
  const int64_t block = slot / p.block_size, offset = slot % p.block_size;
  float factor = 1.f;
  if constexpr (kElementMax<E> != 0) {
    float* place =
        cache.scale + block * cache.scale_block_stride + offset * cache.scale_slot_stride + h * cache.scale_head_stride;
    const float scale = p.writes_scales ? scale_of<N>(head, p.head_dim, kElementMax<E>, vectors) : *place;
    if (p.writes_scales && lane_id() == 0) *place = scale;
    factor = scale > 0 ? 1.f / scale : 0.f;
  }
  E* out =
      static_cast<E*>(cache.data) + block * cache.block_stride + offset * cache.slot_stride + h * cache.head_stride;
  for (int64_t i = lane_id() * N; i < p.head_dim; i += kWarpSize * N) {
    const Pack<T, N> x = load_up_to<N>(head + i, p.head_dim - i, vectors);
    Pack<E, N> elements;
#pragma unroll
    for (int j = 0; j < N; ++j) set(elements.at[j], to_float(x.at[j]) * factor);
    store_up_to<N>(out + i, elements, p.head_dim - i, vectors);
  }
}

template <class T, class E>
__global__ void __launch_bounds__(kThreads) reshape_and_cache_kernel(ReshapeAndCacheParams p, bool vectors) {
  const int64_t warp = static_cast<int64_t>(blockIdx.x) * (kThreads / kWarpSize) + warp_id();
  const int64_t is_value = warp % 2, h = warp / 2 % p.num_kv_heads, token = warp / 2 / p.num_kv_heads;
  if (token >= p.num_tokens) return;
  const int64_t slot = p.slot_mapping[token];
  if (slot < 0) return;
  if (is_value) {
    const T* head = static_cast<const T*>(p.value) + token * p.value_stride + h * p.value_head_stride;
    store_head<T, E>(p.value_cache, p, slot, h, head, vectors);
  } else {
    const T* head = static_cast<const T*>(p.key) + token * p.key_stride + h * p.key_head_stride;
    store_head<T, E>(p.key_cache, p, slot, h, head, vectors);
  }
}

template <class T, class E>
bool all_aligned(const ReshapeAndCacheParams& p) {
  constexpr int N = smaller(kVector<T>, kVector<E>);
  const auto heads = [](const void* data, int64_t stride) {
    return is_aligned(static_cast<const T*>(data), stride, N * sizeof(T));
  };
  const auto slots = [](const KVCacheView& cache) {
    const auto aligned = [&](int64_t stride) {
      return is_aligned(static_cast<const E*>(cache.data), stride, N * sizeof(E));
    };
    return aligned(cache.block_stride) && aligned(cache.slot_stride) && aligned(cache.head_stride);
  };
  return heads(p.key, p.key_stride) && heads(p.key, p.key_head_stride) && heads(p.value, p.value_stride) &&
         heads(p.value, p.value_head_stride) && slots(p.key_cache) && slots(p.value_cache);
}

}  // namespace

Status reshape_and_cache(const ReshapeAndCacheParams& p, void* stream) {
  const int64_t warps = 2 * p.num_tokens * p.num_kv_heads;
  if (warps == 0) return nullptr;
  const auto blocks = static_cast<unsigned>(ceil_div<int64_t>(warps, kThreads / kWarpSize));
  return with_float_type(p.dtype, [&]<class T>(Type<T>) {
    return with_cache_type(p.cache_dtype, [&]<class E>(Type<E>) {
      return launch("reshape_and_cache", dim3{blocks}, dim3{kThreads}, {}, stream, reshape_and_cache_kernel<T, E>, p,
                    all_aligned<T, E>(p));
    });
  });
}

}  // namespace teco::cuda

// Writes the keys and values of a step into their slots of the paged cache. Each element is read once (twice, the
// second time from L1, where a scale is found first) and written once: bound by bandwidth. A slot's bits depend on its
// token alone.
#include "cpu/kv_element.h"

namespace teco::cpu::TECO_ISA {
namespace {

constexpr float kTiny = 1e-30f;  // a head whose elements are all below this counts as zero

template <class E, class T>
void store_head(E* out, const T* head, int64_t head_dim, F32x8 factor) {
  const int64_t tail = head_dim % kLanes, body = head_dim - tail;
  for (int64_t i = 0; i < body; i += kLanes) store(out + i, load(head + i) * factor);
  if (tail) store_partial(out + body, load_partial(head + body, tail) * factor, tail);
}

// max |x| / limit; 0 for a head of zeros, NaN when an element is not finite.
template <class T>
float scale_of(const T* head, int64_t head_dim, float limit) {
  F32x8 largest = splat(0.f), poison = splat(0.f);
  for (int64_t i = 0; i < head_dim; i += kLanes) {
    const F32x8 x = load_up_to(head + i, head_dim - i);
    largest = max(largest, max(x, -x));
    poison += x * splat(0.f);
  }
  const float max = reduce_max(largest), bad = reduce_add(poison);
  return bad != bad ? bad : max > kTiny ? max / limit : 0.f;
}

template <class E, class T>
void store_token(const KVCacheView& cache, const ReshapeAndCacheParams& p, int64_t slot, const T* heads,
                 int64_t head_stride) {
  const int64_t block = slot / p.block_size, offset = slot % p.block_size;
  E* out = static_cast<E*>(cache.data) + block * cache.block_stride + offset * cache.slot_stride;
  for (int64_t h = 0; h < p.num_kv_heads; ++h) {
    const T* head = heads + h * head_stride;
    F32x8 factor = splat(1.f);
    if constexpr (kElementMax<E> != 0) {
      float* scale = cache.scale + block * cache.scale_block_stride + offset * cache.scale_slot_stride +
                     h * cache.scale_head_stride;
      if (p.writes_scales) *scale = scale_of(head, p.head_dim, kElementMax<E>);
      factor = splat(*scale > 0 ? 1.f / *scale : 0.f);
    }
    store_head(out + h * cache.head_stride, head, p.head_dim, factor);
  }
}

}  // namespace

void reshape_and_cache(const ReshapeAndCacheParams& p, int num_threads) {
  with_float_type(p.dtype, [&]<class T>(Type<T>) {
    with_cache_type(p.cache_dtype, [&]<class E>(Type<E>) {
      const int64_t token_bytes = 2 * p.num_kv_heads * p.head_dim * static_cast<int64_t>(sizeof(T) + sizeof(E));
      parallel_for(p.num_tokens, task_grain(token_bytes), num_threads, [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t) {
          const int64_t slot = p.slot_mapping[t];
          if (slot < 0) continue;
          store_token<E>(p.key_cache, p, slot, static_cast<const T*>(p.key) + t * p.key_stride, p.key_head_stride);
          store_token<E>(p.value_cache, p, slot, static_cast<const T*>(p.value) + t * p.value_stride,
                         p.value_head_stride);
        }
      });
    });
  });
}

}  // namespace teco::cpu::TECO_ISA

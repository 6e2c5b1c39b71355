// Rotary position embedding of query and key, in place.
//
// Each element is read and written once, next to a row of the cache that all heads of the token share: bound by
// bandwidth. Every pair is rotated by itself, so its bits depend on nothing else.
#include "cpu/vec.h"

namespace teco::cpu::TECO_ISA {
namespace {

// x cos - y sin, with y cos + x sin as rotate(y, -x).
inline F32x8 rotate(F32x8 x, F32x8 y, F32x8 cos, F32x8 sin) {
  return fma(x, cos, -(y * sin));
}

template <class T>
void rotate_halves(T* head, const float* cos, const float* sin, int64_t half) {
  const int64_t tail = half % kLanes, body = half - tail;
  T* x = head;
  T* y = head + half;
  for (int64_t i = 0; i < body; i += kLanes) {
    const F32x8 a = load(x + i), b = load(y + i), c = load(cos + i), s = load(sin + i);
    store(x + i, rotate(a, b, c, s));
    store(y + i, rotate(b, -a, c, s));
  }
  if (tail) {
    const F32x8 a = load_partial(x + body, tail), b = load_partial(y + body, tail);
    const F32x8 c = load_partial(cos + body, tail), s = load_partial(sin + body, tail);
    store_partial(x + body, rotate(a, b, c, s), tail);
    store_partial(y + body, rotate(b, -a, c, s), tail);
  }
}

// Four pairs to a vector: beside each element stands its partner, with the sign that the rotation gives it.
inline F32x8 rotate_pairs(F32x8 v, F32x4 cos, F32x4 sin) {
  const F32x8 sign = {1, -1, 1, -1, 1, -1, 1, -1};
  const F32x8 partner = __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6) * sign;
  return rotate(v, partner, __builtin_shufflevector(cos, cos, 0, 0, 1, 1, 2, 2, 3, 3),
                __builtin_shufflevector(sin, sin, 0, 0, 1, 1, 2, 2, 3, 3));
}

template <class T>
void rotate_interleaved(T* head, const float* cos, const float* sin, int64_t half) {
  const int64_t size = 2 * half, tail = size % kLanes, body = size - tail;
  for (int64_t i = 0; i < body; i += kLanes)
    store(head + i, rotate_pairs(load(head + i), load_bits<F32x4>(cos + i / 2), load_bits<F32x4>(sin + i / 2)));
  if (tail) {
    F32x4 c = {}, s = {};
    for (int64_t i = 0; i < tail / 2; ++i) {
      c[i] = cos[body / 2 + i];
      s[i] = sin[body / 2 + i];
    }
    store_partial(head + body, rotate_pairs(load_partial(head + body, tail), c, s), tail);
  }
}

template <class T>
void rotate_token(T* heads, int64_t num_heads, int64_t head_stride, const float* cos_sin,
                  const RotaryEmbeddingParams& p) {
  const int64_t half = p.rotary_dim / 2;
  for (int64_t h = 0; h < num_heads; ++h) {
    T* head = heads + h * head_stride;
    if (p.interleaved) {
      rotate_interleaved(head, cos_sin, cos_sin + half, half);
    } else {
      rotate_halves(head, cos_sin, cos_sin + half, half);
    }
  }
}

}  // namespace

void rotary_embedding(const RotaryEmbeddingParams& p, int num_threads) {
  with_float_type(p.dtype, [&]<class T>(Type<T>) {
    const int64_t num_heads = p.num_query_heads + p.num_kv_heads;
    const int64_t token_bytes = 2 * num_heads * p.rotary_dim * static_cast<int64_t>(sizeof(T));
    parallel_for(p.num_tokens, task_grain(token_bytes), num_threads, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        const float* cos_sin = p.cos_sin_cache + p.positions[t] * p.cos_sin_stride;
        rotate_token(static_cast<T*>(p.query) + t * p.query_stride, p.num_query_heads, p.query_head_stride, cos_sin, p);
        rotate_token(static_cast<T*>(p.key) + t * p.key_stride, p.num_kv_heads, p.key_head_stride, cos_sin, p);
      }
    });
  });
}

}  // namespace teco::cpu::TECO_ISA

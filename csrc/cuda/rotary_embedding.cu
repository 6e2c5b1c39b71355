// Rotary position embedding of query and key, in place: one block per token.
//
// Each element is read and written once, next to a row of the cache that all heads of the token share: bound by
// bandwidth. Every pair is rotated by itself, so its bits depend on nothing else.
#include "cuda/device.h"

namespace teco::cuda {
namespace {

constexpr int kThreads = 128;

// x cos - y sin, with y cos + x sin as rotate(y, -x).
__device__ __forceinline__ float rotate(float x, float y, float cos, float sin) {
  return fmaf(x, cos, -(y * sin));
}

// N pairs (i, i + half) of a head, from i on.
template <int N, class T>
__device__ void rotate_halves(T* head, const float* cos, const float* sin, int64_t half, int64_t i, bool vectors) {
  Pack<T, N> x = load_up_to<N>(head + i, half - i, vectors), y = load_up_to<N>(head + half + i, half - i, vectors);
  const Pack<float, N> c = load_up_to<N>(cos + i, half - i, vectors), s = load_up_to<N>(sin + i, half - i, vectors);
#pragma unroll
  for (int j = 0; j < N; ++j) {
    const float a = to_float(x.at[j]), b = to_float(y.at[j]);
    set(x.at[j], rotate(a, b, c.at[j], s.at[j]));
    set(y.at[j], rotate(b, -a, c.at[j], s.at[j]));
  }
  store_up_to<N>(head + i, x, half - i, vectors);
  store_up_to<N>(head + half + i, y, half - i, vectors);
}

// The pairs (2i, 2i + 1) from i on, N / 2 of them.
template <int N, class T>
__device__ void rotate_interleaved(T* head, const float* cos, const float* sin, int64_t half, int64_t i, bool vectors) {
  Pack<T, N> xy = load_up_to<N>(head + 2 * i, 2 * (half - i), vectors);
  const Pack<float, N / 2> c = load_up_to<N / 2>(cos + i, half - i, vectors);
  const Pack<float, N / 2> s = load_up_to<N / 2>(sin + i, half - i, vectors);
#pragma unroll
  for (int j = 0; j < N / 2; ++j) {
    const float a = to_float(xy.at[2 * j]), b = to_float(xy.at[2 * j + 1]);
    set(xy.at[2 * j], rotate(a, b, c.at[j], s.at[j]));
    set(xy.at[2 * j + 1], rotate(b, -a, c.at[j], s.at[j]));
  }
  store_up_to<N>(head + 2 * i, xy, 2 * (half - i), vectors);
}

template <class T>
__global__ void __launch_bounds__(kThreads) rotary_embedding_kernel(RotaryEmbeddingParams p, bool vectors) {
  constexpr int N = kVector<T>;
  const int64_t token = blockIdx.x, half = p.rotary_dim / 2, pairs = p.interleaved ? N / 2 : N;
  const int64_t steps = ceil_div(half, pairs), num_heads = p.num_query_heads + p.num_kv_heads;
  const float* cos = p.cos_sin_cache + p.positions[token] * p.cos_sin_stride;
  for (int64_t work = thread_id(); work < num_heads * steps; work += kThreads) {
    const int64_t h = work / steps, i = work % steps * pairs;
    T* head = h < p.num_query_heads
                  ? static_cast<T*>(p.query) + token * p.query_stride + h * p.query_head_stride
                  : static_cast<T*>(p.key) + token * p.key_stride + (h - p.num_query_heads) * p.key_head_stride;
    if (p.interleaved) {
      rotate_interleaved<N>(head, cos, cos + half, half, i, vectors);
    } else {
      rotate_halves<N>(head, cos, cos + half, half, i, vectors);
    }
  }
}

template <class T>
bool all_aligned(const RotaryEmbeddingParams& p) {
  const auto heads = [](const void* data, int64_t stride) {
    return is_aligned(static_cast<const T*>(data), stride, 16);
  };
  const int64_t half = p.rotary_dim / 2;
  return heads(p.query, p.query_stride) && heads(p.query, p.query_head_stride) && heads(p.key, p.key_stride) &&
         heads(p.key, p.key_head_stride) && is_aligned(p.cos_sin_cache, p.cos_sin_stride, 16) && half % 4 == 0 &&
         (p.interleaved || half % kVector<T> == 0);
}

}  // namespace

Status rotary_embedding(const RotaryEmbeddingParams& p, void* stream) {
  if (p.num_tokens == 0 || p.rotary_dim == 0) return nullptr;
  return with_float_type(p.dtype, [&]<class T>(Type<T>) {
    return launch("rotary_embedding", dim3{static_cast<unsigned>(p.num_tokens)}, dim3{kThreads}, {}, stream,
                  rotary_embedding_kernel<T>, p, all_aligned<T>(p));
  });
}

}  // namespace teco::cuda

// Gathers rows of the embedding matrix, converting them on the way. One read, one write; bound by bandwidth when there
// are many tokens, else by latency.
#include "cuda/device.h"
#include "cuda/gptq_layout.h"

namespace teco::cuda {
namespace {

constexpr int kThreads = 128;

// The row of the weight that a token has; -1 where it belongs to another part of the vocabulary: its row is zeros.
__device__ __forceinline__ int64_t row_of(const TokenRange& tokens, int64_t token_id) {
  const int64_t row = token_id - tokens.first;
  return row >= 0 && row < tokens.count ? row : -1;
}

template <class W, class T>
__global__ void __launch_bounds__(kThreads) embedding_kernel(EmbeddingParams p, bool vectors) {
  constexpr int N = smaller(kVector<W>, kVector<T>);
  const int part = static_cast<int>(blockIdx.y) * kThreads + thread_id();  // 32 bits, as in silu_and_mul
  const int64_t token = blockIdx.x, i = int64_t{part} * N;
  if (i >= p.hidden_size) return;
  const int64_t row = row_of(p.tokens, p.token_ids[token]);
  const W* elements = static_cast<const W*>(p.weight) + row * p.weight_stride + i;
  const Pack<W, N> values = load_up_to<N>(elements, row < 0 ? 0 : p.hidden_size - i, vectors);
  Pack<T, N> result;
#pragma unroll
  for (int j = 0; j < N; ++j) set(result.at[j], to_float(values.at[j]));
  store_up_to<N>(static_cast<T*>(p.out) + token * p.out_stride + i, result, p.hidden_size - i, vectors);
}

// One column of a panel, a quad to each thread, by the very operations of GPTQWeight.dequantize. Four bytes of every 64
// that a panel has are used.
template <int kBits, bool kMinimum, class T>
__global__ void __launch_bounds__(kThreads) gptq_embedding_kernel(GptqEmbeddingParams p) {
  constexpr int kQuads = kBlock / 4;
  const GptqLayout layout(p);
  const int64_t token = blockIdx.x, row = row_of(p.tokens, p.token_ids[token]);
  const int quad = static_cast<int>(blockIdx.y) * kThreads + thread_id(), block = quad / kQuads;
  if (block >= layout.num_blocks()) return;
  Header header = {};
  uint32_t codes = 0;
  if (row >= 0) {
    const int column = static_cast<int>(row % kPanel);
    const uint8_t* group = layout.group(row / kPanel, block / layout.blocks_per_group);
    header = load_header(group, column);
    codes = quad_codes<kBits>(layout.block(group, block), quad % kQuads, column);
  }
  T* out = static_cast<T*>(p.out) + token * p.out_stride;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int64_t place = static_cast<int64_t>(quad) * 4 + i, input = p.input_order ? p.input_order[place] : place;
    if (input >= 0) set(out[input], dequantize<kMinimum>(codes >> (8 * i) & 255, header));
  }
}

}  // namespace

Status embedding(const EmbeddingParams& p, void* stream) {
  if (p.num_tokens == 0 || p.hidden_size == 0) return nullptr;
  return with_float_type(p.weight_dtype, [&]<class W>(Type<W>) {
    return with_float_type(p.dtype, [&]<class T>(Type<T>) {
      constexpr int N = smaller(kVector<W>, kVector<T>);
      const bool vectors = is_aligned(static_cast<const W*>(p.weight), p.weight_stride, sizeof(W) * N) &&
                           is_aligned(static_cast<const T*>(p.out), p.out_stride, sizeof(T) * N);
      const auto parts = static_cast<unsigned>(ceil_div<int64_t>(p.hidden_size, kThreads * N));
      return launch("embedding", dim3{static_cast<unsigned>(p.num_tokens), parts}, dim3{kThreads}, {}, stream,
                    embedding_kernel<W, T>, p, vectors);
    });
  });
}

Status gptq_embedding(const GptqEmbeddingParams& p, void* stream) {
  const int quads = GptqLayout(p).num_blocks() * (kBlock / 4);
  if (p.num_tokens == 0 || quads == 0) return nullptr;
  const auto parts = static_cast<unsigned>(ceil_div(quads, kThreads));
  return with_format(p, [&]<int kBits, bool kMinimum>(Format<kBits, kMinimum>) {
    return with_float_type(p.dtype, [&]<class T>(Type<T>) {
      return launch("gptq_embedding", dim3{static_cast<unsigned>(p.num_tokens), parts}, dim3{kThreads}, {}, stream,
                    gptq_embedding_kernel<kBits, kMinimum, T>, p);
    });
  });
}

}  // namespace teco::cuda

// The input of the recycle head: projection([norm(embedding[token_ids]) ; norm(hidden)]).
//
// The kernels of the parts, one after the other on rows in scratch memory, hence their very bits: the embedding is
// gathered into the left half of a row and normed where it lies, the last hidden state is normed into the right half,
// and the matmul reads the row from L1. One row reads the projection once, beside which all else is small.
#include "cpu/matmul.h"

namespace teco::cpu::TECO_ISA {

void embedding(const EmbeddingParams& p, int num_threads);
void gptq_embedding(const GptqEmbeddingParams& p, int num_threads);
void rms_norm(const RmsNormParams& p, int num_threads);

namespace {

void fill_with_nan(void* out, int64_t count, DType dtype) {
  with_float_type(dtype, [&]<class T>(Type<T>) {
    for (int64_t i = 0; i < count; ++i) store_partial(static_cast<T*>(out) + i, splat(__builtin_nanf("")), 1);
  });
}

// Embeddings of `count` tokens into the first `size` elements of so many rows. Replayed in a plan, a row may have no
// token (kInvalidRow, of lm_head_argmax): its embedding is NaN.
template <class Embedding>
void embed(Embedding params, void (*gather)(const Embedding&, int), int64_t first, int64_t count, int64_t vocab_size,
           int64_t size, char* rows, int64_t stride, int num_threads) {
  int64_t token_ids[kScratchRows];
  const int64_t* given = params.token_ids + first;
  const auto is_token = [&](int64_t id) { return id >= 0 && id < vocab_size; };
  for (int64_t r = 0; r < count; ++r) token_ids[r] = is_token(given[r]) ? given[r] : 0;
  params.token_ids = token_ids;
  params.num_tokens = count;
  params.out = rows;
  params.out_stride = stride;
  gather(params, num_threads);
  for (int64_t r = 0; r < count; ++r)
    if (!is_token(given[r])) fill_with_nan(rows + r * stride * element_bytes(params.dtype), size, params.dtype);
}

// `count` rows from `first` on, [count][2 * hidden_size].
void make_rows(const RecycleInputParams& p, int64_t first, int64_t count, char* rows, int num_threads) {
  RmsNormParams norm = p.embedding_norm;
  const int64_t size = norm.hidden_size, stride = 2 * size, bytes = element_bytes(norm.dtype);
  if (p.packed_embedding.weight) {
    embed(p.packed_embedding, gptq_embedding, first, count, p.vocab_size, size, rows, stride, num_threads);
  } else {
    embed(p.embedding, embedding, first, count, p.vocab_size, size, rows, stride, num_threads);
  }

  norm.input = norm.out = rows;
  norm.input_stride = norm.out_stride = stride;
  norm.num_rows = norm.inner_rows = count;
  rms_norm(norm, num_threads);

  norm = p.hidden_norm;
  norm.input = static_cast<const char*>(norm.input) + first * norm.input_stride * bytes;
  norm.out = rows + size * bytes;
  norm.out_stride = stride;
  norm.num_rows = norm.inner_rows = count;
  rms_norm(norm, num_threads);
}

template <class Matmul>
void project(const RecycleInputParams& p, Matmul matmul, void (*multiply)(const Matmul&, const PanelSink&, int),
             int num_threads) {
  const int64_t num_rows = matmul.num_rows, bytes = element_bytes(matmul.dtype);
  const int64_t row_bytes = matmul.in_features * bytes;
  auto* rows = static_cast<char*>(
      thread_scratch(Scratch::kCaller, static_cast<size_t>(min(num_rows, kScratchRows) * row_bytes)));
  auto* out = static_cast<char*>(matmul.out);
  for (int64_t first = 0; first < num_rows; first += kScratchRows) {
    matmul.num_rows = min(num_rows - first, kScratchRows);
    make_rows(p, first, matmul.num_rows, rows, num_threads);
    matmul.input = rows;
    matmul.input_stride = matmul.in_features;
    matmul.out = out + first * matmul.out_stride * bytes;
    multiply(matmul, store_sink(matmul), num_threads);
  }
}

}  // namespace

void recycle_project(const RecycleProjectParams& p, int num_threads) {
  project(p.input, p.projection, multiply_dense, num_threads);
}

void gptq_recycle_project(const GptqRecycleProjectParams& p, int num_threads) {
  project(p.input, p.projection, multiply_gptq, num_threads);
}

}  // namespace teco::cpu::TECO_ISA

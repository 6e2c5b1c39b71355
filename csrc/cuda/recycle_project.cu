// The input of the recycle head: projection([norm(embedding[token_ids]) ; norm(hidden)]).
//
// The kernels of the parts, one after the other on rows in the workspace, hence their very bits: the embedding is
// gathered into the left half of a row and normed where it lies, the last hidden state is normed into the right half.
// One row reads the projection once, beside which all else is small: latency, of five launches.
#include "cuda/matmul.h"

namespace teco::cuda {

Status embedding(const EmbeddingParams& p, void* stream);
Status gptq_embedding(const GptqEmbeddingParams& p, void* stream);
Status rms_norm(const RmsNormParams& p, void* stream);

namespace {

constexpr int kThreads = 128;

// A row may have no token (kInvalidRow, of lm_head_argmax): one NaN in its embedding, which the norm makes all of it.
__global__ void __launch_bounds__(kThreads)
    spoil_rows_kernel(const int64_t* token_ids, int64_t num_tokens, int64_t vocab_size, void* rows, int64_t stride,
                      DType dtype) {
  const int64_t t = static_cast<int64_t>(blockIdx.x) * kThreads + thread_id();
  if (t >= num_tokens || (token_ids[t] >= 0 && token_ids[t] < vocab_size)) return;
  store_float(rows, t * stride, ptx::as_float(0x7fc00000u), dtype);
}

template <class Embedding>
Status embed(Embedding params, Status (*gather)(const Embedding&, void*), int64_t num_tokens, int64_t vocab_size,
             void* rows, int64_t stride, void* stream) {
  params.num_tokens = num_tokens;
  params.out = rows;
  params.out_stride = stride;
  if (const Status status = gather(params, stream)) return status;
  return launch("spoil_rows", dim3{static_cast<unsigned>(ceil_div<int64_t>(num_tokens, kThreads))}, dim3{kThreads}, {},
                stream, spoil_rows_kernel, params.token_ids, num_tokens, vocab_size, rows, stride, params.dtype);
}

int64_t element_bytes(DType dtype) {
  return dtype == DType::kFloat32 ? 4 : 2;
}

// [num_tokens][2 * hidden_size]
Status make_rows(const RecycleInputParams& p, int64_t num_tokens, void* rows, void* stream) {
  RmsNormParams norm = p.embedding_norm;
  const int64_t size = norm.hidden_size, stride = 2 * size;
  Status status = p.packed_embedding.weight
                      ? embed(p.packed_embedding, gptq_embedding, num_tokens, p.vocab_size, rows, stride, stream)
                      : embed(p.embedding, embedding, num_tokens, p.vocab_size, rows, stride, stream);
  if (status) return status;

  norm.input = norm.out = rows;
  norm.input_stride = norm.out_stride = stride;
  norm.num_rows = norm.inner_rows = num_tokens;
  status = rms_norm(norm, stream);
  if (status) return status;

  norm = p.hidden_norm;
  norm.out = static_cast<char*>(rows) + size * element_bytes(norm.dtype);
  norm.out_stride = stride;
  norm.num_rows = norm.inner_rows = num_tokens;
  return rms_norm(norm, stream);
}

template <class Params>
int64_t workspace_bytes(const Params& p) {
  return p.projection.num_rows * p.projection.in_features * element_bytes(p.projection.dtype);
}

template <class Params, class Matmul>
Status project(const Params& p, Matmul matmul, Status (*multiply)(const Matmul&, const PanelBest&, void*),
               void* workspace, void* stream) {
  if (matmul.num_rows == 0) return nullptr;
  use_workspace(workspace, workspace_bytes(p), element_bytes(matmul.dtype));
  if (matmul.in_features > 0)
    if (const Status status = make_rows(p.input, matmul.num_rows, workspace, stream)) return status;
  matmul.input = workspace;
  matmul.input_stride = matmul.in_features;
  return multiply(matmul, {}, stream);
}

}  // namespace

int64_t recycle_project_workspace(const RecycleProjectParams& p) {
  return workspace_bytes(p);
}
Status recycle_project(const RecycleProjectParams& p, void* workspace, void* stream) {
  return project(p, p.projection, multiply_dense, workspace, stream);
}
int64_t gptq_recycle_project_workspace(const GptqRecycleProjectParams& p) {
  return workspace_bytes(p);
}
Status gptq_recycle_project(const GptqRecycleProjectParams& p, void* workspace, void* stream) {
  return project(p, p.projection, multiply_gptq, workspace, stream);
}

}  // namespace teco::cuda

// The largest logit of each row, without the logits: the matmuls of dense_matmul and gptq_matmul, which leave of every
// panel of 16 columns one key (best_key.h) and, where asked for, a sum of exponentials. Bound as the matmul is: 12
// bytes for the weights of 16 columns.
//
// A second kernel, a block per row, takes the largest of the keys and adds the sums up, each thread those of its panels
// in order and then over the block.
#include "cuda/matmul.h"

namespace teco::cuda {
namespace {

constexpr int kThreads = 256;  // part of the order of the sum

__global__ void __launch_bounds__(kThreads)
    merge_panels_kernel(ArgmaxParams p, PanelBest best, int64_t num_panels, int64_t num_rows) {
  const int64_t row = blockIdx.x;
  uint64_t key = 0;
  for (int64_t panel = thread_id(); panel < num_panels; panel += kThreads)
    key = larger(key, best.keys[panel * num_rows + row]);
  key = block_fold<kThreads>(key, [](uint64_t a, uint64_t b) { return larger(a, b); });

  const bool is_nan = key == kNaNKey;
  const float largest = is_nan ? ptx::as_float(0x7fc00000u) : logit_of(key);
  float sum = 0.f;
  if (p.logsumexp && is_finite(largest))
    for (int64_t panel = thread_id(); panel < num_panels; panel += kThreads)
      sum = fmaf(best.sums[panel * num_rows + row], expf(logit_of(best.keys[panel * num_rows + row]) - largest), sum);
  sum = block_sum<kThreads>(sum);
  if (thread_id() != 0) return;
  p.token_ids[row] = is_nan ? kInvalidRow : token_of(key);
  p.logits[row] = largest;
  if (p.logsumexp) p.logsumexp[row] = is_finite(largest) ? largest + logf(sum) : largest;
}

template <class Params>
int64_t workspace_bytes(const Params& p) {
  const int64_t count = ceil_div<int64_t>(p.matmul.out_features, kPanel) * p.matmul.num_rows;
  return count * static_cast<int64_t>(sizeof(uint64_t) + (p.argmax.logsumexp ? sizeof(float) : 0));
}

template <class Params, class Matmul>
Status argmax(const Params& p, Status (*multiply)(const Matmul&, const PanelBest&, void*), void* workspace,
              void* stream) {
  const int64_t num_rows = p.matmul.num_rows, num_panels = ceil_div<int64_t>(p.matmul.out_features, kPanel);
  if (num_rows == 0) return nullptr;
  use_workspace(workspace, workspace_bytes(p));
  auto* keys = static_cast<uint64_t*>(workspace);
  const PanelBest best = {keys, p.argmax.logsumexp ? reinterpret_cast<float*>(keys + num_panels * num_rows) : nullptr};
  if (const Status status = multiply(p.matmul, best, stream)) return status;
  return launch("merge_panels", dim3{static_cast<unsigned>(num_rows)}, dim3{kThreads}, {}, stream, merge_panels_kernel,
                p.argmax, best, num_panels, num_rows);
}

}  // namespace

int64_t lm_head_argmax_workspace(const LmHeadArgmaxParams& p) {
  return workspace_bytes(p);
}
Status lm_head_argmax(const LmHeadArgmaxParams& p, void* workspace, void* stream) {
  return argmax(p, multiply_dense, workspace, stream);
}
int64_t gptq_lm_head_argmax_workspace(const GptqLmHeadArgmaxParams& p) {
  return workspace_bytes(p);
}
Status gptq_lm_head_argmax(const GptqLmHeadArgmaxParams& p, void* workspace, void* stream) {
  return argmax(p, multiply_gptq, workspace, stream);
}

}  // namespace teco::cuda

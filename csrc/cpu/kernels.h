// The CPU backend as the operator layer sees it: one function per operator, one table per instruction set.
#pragma once

#include "params.h"

namespace teco::cpu {

// Reads memory and does nothing with it: the machine's bandwidth, see ceilings.cpp.
struct ReadProbeParams {
  const void* data;
  int64_t num_bytes;
  int64_t num_streams;  // 1, 2, 4 or 8 per thread
};

struct KernelTable {
  void (*embedding)(const EmbeddingParams&, int num_threads);
  void (*gptq_embedding)(const GptqEmbeddingParams&, int num_threads);
  void (*rms_norm)(const RmsNormParams&, int num_threads);
  void (*sum_ranks)(const SumRanksParams&);
  void (*silu_and_mul)(const SiluAndMulParams&, int num_threads);
  void (*rotary_embedding)(const RotaryEmbeddingParams&, int num_threads);
  void (*sample)(const SampleParams&, int num_threads);
  void (*dense_matmul)(const DenseMatmulParams&, int num_threads);
  void (*sparse24_matmul)(const Sparse24MatmulParams&, int num_threads);
  void (*gptq_matmul)(const GptqMatmulParams&, int num_threads);
  void (*reshape_and_cache)(const ReshapeAndCacheParams&, int num_threads);
  void (*copy_blocks)(const CopyBlocksParams&, int num_threads);
  void (*paged_attention)(const PagedAttentionParams&, int num_threads);
  void (*merge_attention_states)(const MergeAttentionStatesParams&, int num_threads);
  void (*recycle_project)(const RecycleProjectParams&, int num_threads);
  void (*gptq_recycle_project)(const GptqRecycleProjectParams&, int num_threads);
  void (*lm_head_argmax)(const LmHeadArgmaxParams&, int num_threads);
  void (*gptq_lm_head_argmax)(const GptqLmHeadArgmaxParams&, int num_threads);
  void (*verify_recycled)(const VerifyRecycledParams&, int num_threads);
  void (*verify_recycled_sampled)(const VerifyRecycledSampledParams&, int num_threads);

  // Probes, which are no operators of a model: see ceilings.cpp. The last two return the operations they have done.
  void (*read_probe)(const ReadProbeParams&, int num_threads);
  int64_t (*fma_probe)(int64_t iterations, int num_threads);
  int64_t (*int8_probe)(int64_t iterations, int num_threads);
};

}  // namespace teco::cpu

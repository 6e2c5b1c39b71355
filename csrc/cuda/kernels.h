// The CUDA backend as the operator layer sees it: one function per operator. They put kernels on the stream and come
// back; what they return is null, or a text that tells what went wrong. The emulated backend has the same table.
#pragma once

#include "cuda/ranks.h"
#include "params.h"

namespace teco::cuda {

using Status = const char*;

// An operator that needs memory of its own: how many bytes, and the kernels that are given so many.
template <class Params>
struct WithWorkspace {
  int64_t (*bytes)(const Params&);
  Status (*run)(const Params&, void* workspace, void* stream);
};

struct KernelTable {
  const char* operators;  // that have a kernel here; separated by spaces
  Status (*embedding)(const EmbeddingParams&, void* stream);
  Status (*gptq_embedding)(const GptqEmbeddingParams&, void* stream);
  Status (*rms_norm)(const RmsNormParams&, void* stream);
  Status (*silu_and_mul)(const SiluAndMulParams&, void* stream);
  Status (*rotary_embedding)(const RotaryEmbeddingParams&, void* stream);
  Status (*dense_matmul)(const DenseMatmulParams&, void* stream);
  Status (*sparse24_matmul)(const Sparse24MatmulParams&, void* stream);
  Status (*gptq_matmul)(const GptqMatmulParams&, void* stream);
  Status (*reshape_and_cache)(const ReshapeAndCacheParams&, void* stream);
  Status (*copy_blocks)(const CopyBlocksParams&, void* stream);
  // No sequence has more than `max_keys` keys; the workspace is of as many bytes as the function before it asks for.
  int64_t (*paged_attention_workspace)(const PagedAttentionParams&, int64_t max_keys);
  Status (*paged_attention)(const PagedAttentionParams&, int64_t max_keys, void* workspace, void* stream);
  Status (*merge_attention_states)(const MergeAttentionStatesParams&, void* stream);
  Status (*sample)(const SampleParams&, void* stream);
  Status (*verify_recycled)(const VerifyRecycledParams&, void* stream);
  Status (*verify_recycled_sampled)(const VerifyRecycledSampledParams&, void* stream);
  WithWorkspace<LmHeadArgmaxParams> lm_head_argmax;
  WithWorkspace<GptqLmHeadArgmaxParams> gptq_lm_head_argmax;
  WithWorkspace<RecycleProjectParams> recycle_project;
  WithWorkspace<GptqRecycleProjectParams> gptq_recycle_project;

  // Collectives: every rank launches the same ones in the same order, from one stream or streams that wait for each
  // other.
  Status (*all_reduce)(const Ranks&, const AllReduceParams&, void* stream);
  Status (*all_reduce_rms_norm)(const Ranks&, const AllReduceRmsNormParams&, void* stream);
  Status (*reduce_scatter)(const Ranks&, const ReduceScatterParams&, void* stream);
  Status (*all_gather)(const Ranks&, const AllGatherParams&, void* stream);
  Status (*broadcast)(const Ranks&, const BroadcastParams&, void* stream);
  // Memory of this rank; that of another, by the handle that it got there.
  Status (*allocate_rank_memory)(int device, int64_t slot_bytes, int64_t registered_bytes, RankMemory*, RankHandle*);
  void (*free_rank_memory)(int device, const RankMemory&);
  Status (*open_rank_memory)(int device, const RankHandle&, char** memory);
  void (*close_rank_memory)(int device, char* memory);
};

}  // namespace teco::cuda

// The kernel table. Each kernel file adds its operators here and in kernels.h.
#include "cuda/kernels.h"

namespace teco::cuda {

Status embedding(const EmbeddingParams& p, void* stream);
Status gptq_embedding(const GptqEmbeddingParams& p, void* stream);
Status rms_norm(const RmsNormParams& p, void* stream);
Status silu_and_mul(const SiluAndMulParams& p, void* stream);
Status rotary_embedding(const RotaryEmbeddingParams& p, void* stream);
Status gptq_matmul(const GptqMatmulParams& p, void* stream);
Status reshape_and_cache(const ReshapeAndCacheParams& p, void* stream);
Status copy_blocks(const CopyBlocksParams& p, void* stream);
int64_t paged_attention_workspace(const PagedAttentionParams& p, int64_t max_keys);
Status paged_attention(const PagedAttentionParams& p, int64_t max_keys, void* workspace, void* stream);
Status merge_attention_states(const MergeAttentionStatesParams& p, void* stream);
Status all_reduce(const Ranks& ranks, const AllReduceParams& p, void* stream);
Status all_reduce_rms_norm(const Ranks& ranks, const AllReduceRmsNormParams& p, void* stream);
Status reduce_scatter(const Ranks& ranks, const ReduceScatterParams& p, void* stream);
Status all_gather(const Ranks& ranks, const AllGatherParams& p, void* stream);
Status broadcast(const Ranks& ranks, const BroadcastParams& p, void* stream);
Status allocate_rank_memory(int device, int64_t slot_bytes, int64_t registered_bytes, RankMemory* memory,
                            RankHandle* handle);
void free_rank_memory(int device, const RankMemory& memory);
Status open_rank_memory(int device, const RankHandle& handle, char** memory);
void close_rank_memory(int device, char* memory);

extern const KernelTable table;
const KernelTable table = {
    .operators =
        "embedding rms_norm fused_add_rms_norm silu_and_mul rotary_embedding gptq_matmul reshape_and_cache "
        "copy_blocks swap_blocks paged_attention merge_attention_states "
        "all_reduce all_reduce_rms_norm reduce_scatter all_gather broadcast",
    .embedding = embedding,
    .gptq_embedding = gptq_embedding,
    .rms_norm = rms_norm,
    .silu_and_mul = silu_and_mul,
    .rotary_embedding = rotary_embedding,
    .gptq_matmul = gptq_matmul,
    .reshape_and_cache = reshape_and_cache,
    .copy_blocks = copy_blocks,
    .paged_attention_workspace = paged_attention_workspace,
    .paged_attention = paged_attention,
    .merge_attention_states = merge_attention_states,
    .all_reduce = all_reduce,
    .all_reduce_rms_norm = all_reduce_rms_norm,
    .reduce_scatter = reduce_scatter,
    .all_gather = all_gather,
    .broadcast = broadcast,
    .allocate_rank_memory = allocate_rank_memory,
    .free_rank_memory = free_rank_memory,
    .open_rank_memory = open_rank_memory,
    .close_rank_memory = close_rank_memory,
};

}  // namespace teco::cuda

extern "C" __attribute__((visibility("default"))) const void* teco_cuda_kernels() {
  return &teco::cuda::table;
}

// The kernel table. Each kernel file adds its operators here and in kernels.h.
#include "cuda/kernels.h"

namespace teco::cuda {

Status embedding(const EmbeddingParams& p, void* stream);
Status gptq_embedding(const GptqEmbeddingParams& p, void* stream);
Status rms_norm(const RmsNormParams& p, void* stream);
Status silu_and_mul(const SiluAndMulParams& p, void* stream);
Status rotary_embedding(const RotaryEmbeddingParams& p, void* stream);
Status dense_matmul(const DenseMatmulParams& p, void* stream);
Status sparse24_matmul(const Sparse24MatmulParams& p, void* stream);
Status gptq_matmul(const GptqMatmulParams& p, void* stream);
Status reshape_and_cache(const ReshapeAndCacheParams& p, void* stream);
Status copy_blocks(const CopyBlocksParams& p, void* stream);
int64_t paged_attention_workspace(const PagedAttentionParams& p, int64_t max_keys);
Status paged_attention(const PagedAttentionParams& p, int64_t max_keys, void* workspace, void* stream);
Status merge_attention_states(const MergeAttentionStatesParams& p, void* stream);
Status sample(const SampleParams& p, void* stream);
Status verify_recycled(const VerifyRecycledParams& p, void* stream);
Status verify_recycled_sampled(const VerifyRecycledSampledParams& p, void* stream);
int64_t lm_head_argmax_workspace(const LmHeadArgmaxParams& p);
Status lm_head_argmax(const LmHeadArgmaxParams& p, void* workspace, void* stream);
int64_t gptq_lm_head_argmax_workspace(const GptqLmHeadArgmaxParams& p);
Status gptq_lm_head_argmax(const GptqLmHeadArgmaxParams& p, void* workspace, void* stream);
int64_t recycle_project_workspace(const RecycleProjectParams& p);
Status recycle_project(const RecycleProjectParams& p, void* workspace, void* stream);
int64_t gptq_recycle_project_workspace(const GptqRecycleProjectParams& p);
Status gptq_recycle_project(const GptqRecycleProjectParams& p, void* workspace, void* stream);
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
        "embedding rms_norm fused_add_rms_norm silu_and_mul rotary_embedding dense_matmul sparse24_matmul gptq_matmul "
        "reshape_and_cache copy_blocks swap_blocks paged_attention merge_attention_states "
        "sample verify_recycled verify_recycled_sampled lm_head_argmax recycle_project "
        "all_reduce all_reduce_rms_norm reduce_scatter all_gather broadcast",
    .embedding = embedding,
    .gptq_embedding = gptq_embedding,
    .rms_norm = rms_norm,
    .silu_and_mul = silu_and_mul,
    .rotary_embedding = rotary_embedding,
    .dense_matmul = dense_matmul,
    .sparse24_matmul = sparse24_matmul,
    .gptq_matmul = gptq_matmul,
    .reshape_and_cache = reshape_and_cache,
    .copy_blocks = copy_blocks,
    .paged_attention_workspace = paged_attention_workspace,
    .paged_attention = paged_attention,
    .merge_attention_states = merge_attention_states,
    .sample = sample,
    .verify_recycled = verify_recycled,
    .verify_recycled_sampled = verify_recycled_sampled,
    .lm_head_argmax = {lm_head_argmax_workspace, lm_head_argmax},
    .gptq_lm_head_argmax = {gptq_lm_head_argmax_workspace, gptq_lm_head_argmax},
    .recycle_project = {recycle_project_workspace, recycle_project},
    .gptq_recycle_project = {gptq_recycle_project_workspace, gptq_recycle_project},
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

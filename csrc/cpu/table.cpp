// The kernel table of one instruction set. Each kernel file adds its operators here and in kernels.h.
#include "cpu/kernels.h"

namespace teco::cpu::TECO_ISA {

void embedding(const EmbeddingParams& p, int num_threads);
void gptq_embedding(const GptqEmbeddingParams& p, int num_threads);
void rms_norm(const RmsNormParams& p, int num_threads);
void sum_ranks(const SumRanksParams& p);
void silu_and_mul(const SiluAndMulParams& p, int num_threads);
void rotary_embedding(const RotaryEmbeddingParams& p, int num_threads);
void sample(const SampleParams& p, int num_threads);
void dense_matmul(const DenseMatmulParams& p, int num_threads);
void sparse24_matmul(const Sparse24MatmulParams& p, int num_threads);
void gptq_matmul(const GptqMatmulParams& p, int num_threads);
void reshape_and_cache(const ReshapeAndCacheParams& p, int num_threads);
void copy_blocks(const CopyBlocksParams& p, int num_threads);
void paged_attention(const PagedAttentionParams& p, int num_threads);
void merge_attention_states(const MergeAttentionStatesParams& p, int num_threads);
void recycle_project(const RecycleProjectParams& p, int num_threads);
void gptq_recycle_project(const GptqRecycleProjectParams& p, int num_threads);
void lm_head_argmax(const LmHeadArgmaxParams& p, int num_threads);
void gptq_lm_head_argmax(const GptqLmHeadArgmaxParams& p, int num_threads);
void verify_recycled(const VerifyRecycledParams& p, int num_threads);
void verify_recycled_sampled(const VerifyRecycledSampledParams& p, int num_threads);
void read_probe(const ReadProbeParams& p, int num_threads);
int64_t fma_probe(int64_t iterations, int num_threads);
int64_t int8_probe(int64_t iterations, int num_threads);

extern const KernelTable table;
const KernelTable table = {
    .embedding = embedding,
    .gptq_embedding = gptq_embedding,
    .rms_norm = rms_norm,
    .sum_ranks = sum_ranks,
    .silu_and_mul = silu_and_mul,
    .rotary_embedding = rotary_embedding,
    .sample = sample,
    .dense_matmul = dense_matmul,
    .sparse24_matmul = sparse24_matmul,
    .gptq_matmul = gptq_matmul,
    .reshape_and_cache = reshape_and_cache,
    .copy_blocks = copy_blocks,
    .paged_attention = paged_attention,
    .merge_attention_states = merge_attention_states,
    .recycle_project = recycle_project,
    .gptq_recycle_project = gptq_recycle_project,
    .lm_head_argmax = lm_head_argmax,
    .gptq_lm_head_argmax = gptq_lm_head_argmax,
    .verify_recycled = verify_recycled,
    .verify_recycled_sampled = verify_recycled_sampled,
    .read_probe = read_probe,
    .fma_probe = fma_probe,
    .int8_probe = int8_probe,
};

}  // namespace teco::cpu::TECO_ISA

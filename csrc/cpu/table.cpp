// The kernel table of one instruction set. Each kernel file adds its operators here and in kernels.h.
#include "cpu/kernels.h"

namespace teco::cpu::TECO_ISA {

void rms_norm(const RmsNormParams& p, int num_threads);
void silu_and_mul(const SiluAndMulParams& p, int num_threads);
void rotary_embedding(const RotaryEmbeddingParams& p, int num_threads);
void sample(const SampleParams& p, int num_threads);
void dense_matmul(const DenseMatmulParams& p, int num_threads);
void gptq_matmul(const GptqMatmulParams& p, int num_threads);
void reshape_and_cache(const ReshapeAndCacheParams& p, int num_threads);
void copy_blocks(const CopyBlocksParams& p, int num_threads);
void paged_attention(const PagedAttentionParams& p, int num_threads);
void merge_attention_states(const MergeAttentionStatesParams& p, int num_threads);

extern const KernelTable table;
const KernelTable table = {
    .rms_norm = rms_norm,
    .silu_and_mul = silu_and_mul,
    .rotary_embedding = rotary_embedding,
    .sample = sample,
    .dense_matmul = dense_matmul,
    .gptq_matmul = gptq_matmul,
    .reshape_and_cache = reshape_and_cache,
    .copy_blocks = copy_blocks,
    .paged_attention = paged_attention,
    .merge_attention_states = merge_attention_states,
};

}  // namespace teco::cpu::TECO_ISA

// The operators as the dispatcher calls them; each checks its arguments, fills its params and calls the backend's
// kernel. `out` arguments come first and are written; the schemas stand in ops.cpp.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <string>

namespace teco::ops {

using torch::stable::Tensor;

void embedding(Tensor out, Tensor token_ids, Tensor weight, std::optional<int64_t> first_token);
void gptq_embedding(Tensor out, Tensor token_ids, Tensor weight, std::optional<Tensor> input_order, int64_t vocab_size,
                    int64_t hidden_size, int64_t bits, bool has_minimum, std::optional<int64_t> first_token);
void rms_norm(Tensor out, Tensor input, Tensor weight, double eps);
void fused_add_rms_norm(Tensor out, Tensor residual_out, Tensor input, Tensor residual, Tensor weight, double eps);
void silu_and_mul(Tensor out, Tensor input);
void rotary_embedding(Tensor positions, Tensor query, Tensor key, Tensor cos_sin_cache, bool interleaved);
void sample(Tensor out, Tensor logits, Tensor temperature, Tensor top_k, Tensor top_p, Tensor min_p, Tensor seed,
            Tensor offset);
void dense_matmul(Tensor out, Tensor input, Tensor weight, std::optional<Tensor> bias, int64_t out_features);
void sparse24_matmul(Tensor out, Tensor input, Tensor values, Tensor indices, std::optional<Tensor> bias,
                     int64_t in_features, int64_t out_features);
void gptq_matmul(Tensor out, Tensor input, Tensor weight, std::optional<Tensor> input_order, std::optional<Tensor> bias,
                 int64_t in_features, int64_t out_features, int64_t bits, bool has_minimum, bool int8_activation,
                 int64_t section_size);
void reshape_and_cache(Tensor key, Tensor value, Tensor key_cache, Tensor value_cache, Tensor slot_mapping,
                       std::optional<Tensor> key_scale, std::optional<Tensor> value_scale);
void copy_blocks(Tensor key_cache, Tensor value_cache, Tensor block_mapping);
void swap_blocks(Tensor source_cache, Tensor target_cache, Tensor block_mapping);
void paged_attention(Tensor out, std::optional<Tensor> lse, Tensor query, Tensor key_cache, Tensor value_cache,
                     Tensor block_table, Tensor seq_lens, std::optional<Tensor> query_start_loc,
                     std::optional<Tensor> alibi_slopes, std::optional<Tensor> sinks, std::optional<Tensor> key_scale,
                     std::optional<Tensor> value_scale, double scale, double soft_cap, int64_t sliding_window,
                     bool causal);
void merge_attention_states(Tensor out, Tensor lse, Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b);
void recycle_project(Tensor out, Tensor hidden, Tensor token_ids, Tensor embedding,
                     std::optional<Tensor> embedding_order, int64_t vocab_size, int64_t embedding_bits,
                     bool embedding_has_minimum, Tensor hidden_norm, Tensor embedding_norm, Tensor projection,
                     std::optional<Tensor> bias, int64_t out_features, double eps);
void gptq_recycle_project(Tensor out, Tensor hidden, Tensor token_ids, Tensor embedding,
                          std::optional<Tensor> embedding_order, int64_t vocab_size, int64_t embedding_bits,
                          bool embedding_has_minimum, Tensor hidden_norm, Tensor embedding_norm, Tensor projection,
                          std::optional<Tensor> input_order, std::optional<Tensor> bias, int64_t in_features,
                          int64_t out_features, int64_t bits, bool has_minimum, bool int8_activation, double eps);
void lm_head_argmax(Tensor token_ids, Tensor logits, std::optional<Tensor> logsumexp, Tensor hidden, Tensor weight,
                    std::optional<Tensor> bias, int64_t out_features);
void gptq_lm_head_argmax(Tensor token_ids, Tensor logits, std::optional<Tensor> logsumexp, Tensor hidden, Tensor weight,
                         std::optional<Tensor> input_order, std::optional<Tensor> bias, int64_t in_features,
                         int64_t out_features, int64_t bits, bool has_minimum, bool int8_activation);
void verify_recycled(Tensor out, Tensor target_token_ids, Tensor recycled_token_ids);
void verify_recycled_sampled(Tensor num_accepted, Tensor next_token_ids, Tensor target_probs, Tensor recycled_probs,
                             Tensor recycled_token_ids, Tensor seed, Tensor offset);

// Collectives; `comm` is the number of a communicator. They wait for the other ranks.
void all_reduce(Tensor out, Tensor input, int64_t comm);
void all_reduce_rms_norm(Tensor out, Tensor residual_out, Tensor input, Tensor residual, Tensor weight, double eps,
                         int64_t comm);
void all_gather(Tensor out, Tensor input, int64_t comm);
void reduce_scatter(Tensor out, Tensor input, int64_t comm);
void broadcast(Tensor out, Tensor input, int64_t root, int64_t comm);

// Probes of the machine, for `bench`.
void read_probe(Tensor data, int64_t num_streams);
int64_t fma_probe(int64_t iterations);
int64_t int8_probe(int64_t iterations);

}  // namespace teco::ops

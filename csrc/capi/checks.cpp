#include "capi/checks.h"

#include <cmath>
#include <limits>

#include "capi/require.h"

namespace teco::capi {
namespace {

constexpr int64_t kBlock = 32, kMaxHeadDim = 512, kMaxVocabSize = 1 << 22;

void require_sizes(std::initializer_list<std::pair<const char*, int64_t>> sizes) {
  for (const auto& [field, value] : sizes) require_size(field, value, 0);
}

void require_floating(const char* field, DType dtype) {
  require(dtype == DType::kFloat32 || dtype == DType::kFloat16 || dtype == DType::kBFloat16, field,
          ": expected fp32 (0), fp16 (1) or bf16 (2), got ", static_cast<int32_t>(dtype));
}

void require_cache_dtype(DType dtype) {
  if (dtype != DType::kInt8 && dtype != DType::kFloat8E4M3)
    require(dtype >= DType::kFloat32 && dtype <= DType::kBFloat16,
            "cache_dtype: expected fp32 (0), fp16 (1), bf16 (2), int8 (3) or fp8 (4), got ",
            static_cast<int32_t>(dtype));
}

void require_eps(float eps) {
  require(eps >= 0, "eps: expected a number >= 0, got ", eps);
}

// A cache of int8 or fp8 needs a scale, any other takes none.
void require_cache(const char* field, const KVCacheView& cache, DType dtype) {
  const bool is_quantized = dtype == DType::kInt8 || dtype == DType::kFloat8E4M3;
  require(cache.data, field, ".data: expected an address, got a null pointer");
  require(is_quantized == (cache.scale != nullptr), field,
          is_quantized ? ".scale: expected an address, as the cache is int8 or fp8, got a null pointer"
                       : ".scale: expected a null pointer, as the cache is neither int8 nor fp8");
}

// The weight of a packed matmul or embedding.
template <class Params>
void require_packed(const Params& p, int64_t num_inputs, const char* inputs_field) {
  require_bits(p.bits);
  require_sizes({{"num_groups", p.num_groups}, {"blocks_per_group", p.blocks_per_group}});
  int64_t packed = 0;
  const bool overflows = __builtin_mul_overflow(p.num_groups, p.blocks_per_group * kBlock, &packed);
  require(!overflows && packed <= kMaxSize, "num_groups * blocks_per_group: expected less than 2^35 blocks, got ",
          p.num_groups, " * ", p.blocks_per_group);
  require(p.input_order ? packed >= num_inputs : packed == num_inputs, inputs_field,
          p.input_order ? ": expected at most " : ": expected, without an input_order, ",
          "num_groups * blocks_per_group * 32 = ", packed, ", got ", num_inputs);
}

// Everything but the output and the input, whose place differs.
void require_weight(const DenseMatmulParams& p) {
  require_sizes({{"num_rows", p.num_rows},
                 {"in_features", p.in_features},
                 {"out_features", p.out_features},
                 {"weight_stride", p.weight_stride}});
  require_floating("dtype", p.dtype);
  require_floating("weight_dtype", p.weight_dtype);
}

void require_weight(const GptqMatmulParams& p) {
  require_sizes({{"num_rows", p.num_rows}, {"in_features", p.in_features}, {"out_features", p.out_features}});
  require_floating("dtype", p.dtype);
  require_packed(p, p.in_features, "in_features");
  require_size("groups_per_section", p.groups_per_section, 0);
  if (p.groups_per_section) {
    require(p.int8_activation, "int8_activation: expected true, as there are sections, got false");
    require(!p.input_order, "input_order: expected a null pointer, as there are sections");
  }
}

template <class Matmul>
bool check_head(const ArgmaxParams& argmax, const Matmul& matmul) {
  require_weight(matmul);
  require(matmul.out_features >= 1 && matmul.out_features <= std::numeric_limits<uint32_t>::max(),
          "matmul.out_features: expected 1 to 2^32 - 1 tokens, got ", matmul.out_features);
  if (matmul.num_rows == 0) return false;
  require_pointers({{"argmax.token_ids", argmax.token_ids},
                    {"argmax.logits", argmax.logits},
                    {"matmul.input", matmul.input},
                    {"matmul.weight", matmul.weight}});
  return true;
}

template <class Matmul>
bool check_recycle(const RecycleInputParams& input, const Matmul& projection) {
  require_weight(projection);
  const int64_t hidden_size = input.hidden_norm.hidden_size;
  const bool is_packed = input.packed_embedding.weight;
  require_size("input.hidden_norm.hidden_size", hidden_size, 1);
  require(input.embedding_norm.hidden_size == hidden_size, "input.embedding_norm.hidden_size: expected ", hidden_size,
          ", as of hidden_norm, got ", input.embedding_norm.hidden_size);
  const int64_t embedding_size = is_packed ? input.packed_embedding.hidden_size : input.embedding.hidden_size;
  require(embedding_size == hidden_size, "input.embedding.hidden_size: expected ", hidden_size,
          ", as of hidden_norm, got ", embedding_size);
  require(projection.in_features == 2 * hidden_size,
          "projection.in_features: expected 2 * hidden_size = ", 2 * hidden_size, ", got ", projection.in_features);
  require_size("input.vocab_size", input.vocab_size, 1);
  require_eps(input.embedding_norm.eps);
  require_eps(input.hidden_norm.eps);
  require(!input.embedding_norm.residual && !input.hidden_norm.residual,
          "input.hidden_norm.residual, input.embedding_norm.residual: expected null pointers");
  const DType embedding_dtype = is_packed ? input.packed_embedding.dtype : input.embedding.dtype;
  for (const DType dtype : {embedding_dtype, input.embedding_norm.dtype, input.hidden_norm.dtype})
    require(dtype == projection.dtype, "input: expected the dtype of projection everywhere, ",
            static_cast<int32_t>(projection.dtype), ", got ", static_cast<int32_t>(dtype));
  if (is_packed) {
    require_packed(input.packed_embedding, hidden_size, "input.packed_embedding.hidden_size");
  } else {
    require_floating("input.embedding.weight_dtype", input.embedding.weight_dtype);
  }
  if (projection.num_rows == 0 || projection.out_features == 0) return false;
  require_pointers({{"projection.out", projection.out},
                    {"projection.weight", projection.weight},
                    {"input.hidden_norm.input", input.hidden_norm.input},
                    {"input.hidden_norm.weight", input.hidden_norm.weight},
                    {"input.embedding_norm.weight", input.embedding_norm.weight}});
  if (is_packed) {
    require_pointers({{"input.packed_embedding.token_ids", input.packed_embedding.token_ids}});
  } else {
    require_pointers(
        {{"input.embedding.token_ids", input.embedding.token_ids}, {"input.embedding.weight", input.embedding.weight}});
  }
  return true;
}

}  // namespace

bool check(const EmbeddingParams& p) {
  require_sizes({{"num_tokens", p.num_tokens}, {"hidden_size", p.hidden_size}, {"tokens.count", p.tokens.count}});
  require_floating("dtype", p.dtype);
  require_floating("weight_dtype", p.weight_dtype);
  if (p.num_tokens == 0 || p.hidden_size == 0) return false;
  require_pointers({{"out", p.out}, {"token_ids", p.token_ids}, {"weight", p.weight}});
  return true;
}

bool check(const GptqEmbeddingParams& p) {
  require_sizes({{"num_tokens", p.num_tokens}, {"hidden_size", p.hidden_size}, {"tokens.count", p.tokens.count}});
  require_floating("dtype", p.dtype);
  require_packed(p, p.hidden_size, "hidden_size");
  if (p.num_tokens == 0 || p.hidden_size == 0) return false;
  require_pointers({{"out", p.out}, {"token_ids", p.token_ids}, {"weight", p.weight}});
  return true;
}

bool check(const RmsNormParams& p) {
  require_sizes({{"num_rows", p.num_rows}, {"hidden_size", p.hidden_size}});
  require_floating("dtype", p.dtype);
  require_eps(p.eps);
  if (p.num_rows == 0 || p.hidden_size == 0) return false;
  require(p.inner_rows >= 1 && p.num_rows % p.inner_rows == 0,
          "inner_rows: expected num_rows, or a number that divides it, got ", p.inner_rows);
  require_pointers({{"out", p.out}, {"input", p.input}, {"weight", p.weight}});
  if (p.residual) {
    require_pointers({{"residual_out", p.residual_out}});
    require(p.inner_rows == p.num_rows, "inner_rows: expected num_rows, as there is a residual, got ", p.inner_rows);
  }
  return true;
}

bool check(const SumRanksParams& p) {
  require_size("count", p.count, 0);
  require(p.num_ranks >= 1 && p.num_ranks <= 8, "num_ranks: expected 1 to 8, got ", p.num_ranks);
  require_floating("out_dtype", p.out_dtype);
  require(p.dtype == p.out_dtype || p.dtype == DType::kFloat64, "dtype: expected that of out, ",
          static_cast<int32_t>(p.out_dtype), ", or fp64 (5), got ", static_cast<int32_t>(p.dtype));
  if (p.count == 0) return false;
  require_pointers({{"out", p.out}});
  for (int32_t rank = 0; rank < p.num_ranks; ++rank)
    require(p.inputs[rank], "inputs[", rank, "]: expected an address, got a null pointer");
  return true;
}

bool check(const SiluAndMulParams& p) {
  require_sizes({{"num_rows", p.num_rows}, {"size", p.size}});
  require_floating("dtype", p.dtype);
  if (p.num_rows == 0 || p.size == 0) return false;
  require_pointers({{"out", p.out}, {"input", p.input}});
  return true;
}

bool check(const RotaryEmbeddingParams& p) {
  require_sizes({{"num_tokens", p.num_tokens},
                 {"num_query_heads", p.num_query_heads},
                 {"num_kv_heads", p.num_kv_heads},
                 {"rotary_dim", p.rotary_dim}});
  require(p.rotary_dim % 2 == 0, "rotary_dim: expected an even number, got ", p.rotary_dim);
  require_floating("dtype", p.dtype);
  if (p.num_tokens == 0 || p.rotary_dim == 0) return false;
  require_pointers({{"positions", p.positions}, {"cos_sin_cache", p.cos_sin_cache}});
  if (p.num_query_heads) require_pointers({{"query", p.query}});
  if (p.num_kv_heads) require_pointers({{"key", p.key}});
  return true;
}

bool check(const SampleParams& p) {
  require_size("num_rows", p.num_rows, 0);
  require(p.vocab_size >= 1 && p.vocab_size <= kMaxVocabSize, "vocab_size: expected 1 to 2^22, got ", p.vocab_size);
  require_floating("dtype", p.dtype);
  if (p.num_rows == 0) return false;
  require_pointers({{"token_ids", p.token_ids},
                    {"logits", p.logits},
                    {"temperature", p.temperature},
                    {"top_k", p.top_k},
                    {"top_p", p.top_p},
                    {"min_p", p.min_p},
                    {"seed", p.seed},
                    {"offset", p.offset}});
  for (int64_t row = 0; row < p.num_rows; ++row) {
    const float temperature = p.temperature[row], top_p = p.top_p[row], min_p = p.min_p[row];
    require(temperature >= 0 && std::isfinite(temperature), "temperature[", row,
            "]: expected a finite number >= 0, got ", temperature);
    require(top_p > 0 && top_p <= 1, "top_p[", row, "]: expected 0 < top_p <= 1, got ", top_p);
    require(min_p >= 0 && min_p <= 1, "min_p[", row, "]: expected 0 <= min_p <= 1, got ", min_p);
  }
  return true;
}

bool check(const DenseMatmulParams& p) {
  require_weight(p);
  if (p.num_rows == 0 || p.out_features == 0) return false;
  require_pointers({{"out", p.out}});
  if (p.in_features) require_pointers({{"input", p.input}, {"weight", p.weight}});
  return true;
}

bool check(const Sparse24MatmulParams& p) {
  require_sizes({{"num_rows", p.num_rows}, {"in_features", p.in_features}, {"out_features", p.out_features}});
  require(p.in_features % 4 == 0, "in_features: expected a multiple of 4, got ", p.in_features);
  require_floating("dtype", p.dtype);
  require_floating("value_dtype", p.value_dtype);
  if (p.num_rows == 0 || p.out_features == 0) return false;
  require_pointers({{"out", p.out}});
  if (p.in_features) require_pointers({{"input", p.input}, {"values", p.values}, {"indices", p.indices}});
  return true;
}

bool check(const GptqMatmulParams& p) {
  require_weight(p);
  if (p.num_rows == 0 || p.out_features == 0) return false;
  require(!p.out != !p.exact_out, "out, exact_out: expected one of the two, got ", p.out ? "both" : "neither");
  require(!p.exact_out || p.groups_per_section, "exact_out: expected a null pointer, as there are no sections");
  require_pointers({{"input", p.input}, {"weight", p.weight}});
  return true;
}

bool check(const ReshapeAndCacheParams& p) {
  require_sizes({{"num_tokens", p.num_tokens}, {"num_kv_heads", p.num_kv_heads}, {"head_dim", p.head_dim}});
  require_size("block_size", p.block_size, 1);
  require_floating("dtype", p.dtype);
  require_cache_dtype(p.cache_dtype);
  if (p.num_tokens == 0 || p.num_kv_heads == 0 || p.head_dim == 0) return false;
  require_pointers({{"key", p.key}, {"value", p.value}, {"slot_mapping", p.slot_mapping}});
  require_cache("key_cache", p.key_cache, p.cache_dtype);
  require_cache("value_cache", p.value_cache, p.cache_dtype);
  require(!p.writes_scales || p.key_cache.scale, "writes_scales: expected false, as the cache has no scales, got true");
  for (const KVCacheView* cache : {&p.key_cache, &p.value_cache})
    require(!p.writes_scales || (cache->scale_block_stride && cache->scale_slot_stride && cache->scale_head_stride),
            "writes_scales: expected false, as one scale (of stride 0) is for several slots or heads, got true");
  return true;
}

bool check(const CopyBlocksParams& p) {
  require_sizes({{"num_pairs", p.num_pairs}, {"outer", p.outer}, {"inner", p.inner}, {"run_bytes", p.run_bytes}});
  if (p.num_pairs == 0 || p.outer == 0 || p.inner == 0 || p.run_bytes == 0) return false;
  require_pointers({{"source", p.source}, {"target", p.target}, {"block_mapping", p.block_mapping}});
  return true;
}

bool check(const PagedAttentionParams& p) {
  require_sizes({{"num_tokens", p.num_tokens},
                 {"num_seqs", p.num_seqs},
                 {"num_heads", p.num_heads},
                 {"sliding_window", p.sliding_window}});
  require_size("num_kv_heads", p.num_kv_heads, 1);
  require_size("block_size", p.block_size, 1);
  require(p.num_heads % p.num_kv_heads == 0, "num_heads: expected a multiple of num_kv_heads = ", p.num_kv_heads,
          ", got ", p.num_heads);
  require(p.head_dim >= 1 && p.head_dim <= kMaxHeadDim, "head_dim: expected 1 to ", kMaxHeadDim, ", got ", p.head_dim);
  require(p.sliding_window <= std::numeric_limits<int32_t>::max(), "sliding_window: expected less than 2^31, got ",
          p.sliding_window);
  require(std::isfinite(p.scale), "scale: expected a finite number, got ", p.scale);
  require(p.soft_cap == 0 || (p.soft_cap > 0 && std::isnormal(p.soft_cap)),
          "soft_cap: expected 0 or a normal number > 0, got ", p.soft_cap);
  require_floating("dtype", p.dtype);
  require_cache_dtype(p.cache_dtype);
  require(p.query_start_loc || p.num_seqs == p.num_tokens,
          "num_seqs: expected num_tokens, as there is no query_start_loc, got ", p.num_seqs);
  if (p.num_tokens == 0 || p.num_heads == 0) return false;
  require_pointers({{"out", p.out}, {"query", p.query}, {"block_table", p.block_table}, {"seq_lens", p.seq_lens}});
  require_cache("key_cache", p.key_cache, p.cache_dtype);
  require_cache("value_cache", p.value_cache, p.cache_dtype);
  if (!p.query_start_loc) return true;
  const int32_t* start = p.query_start_loc;
  require(start[0] == 0, "query_start_loc[0]: expected 0, got ", start[0]);
  for (int64_t s = 0; s < p.num_seqs; ++s)
    require(start[s] <= start[s + 1], "query_start_loc[", s + 1, "]: expected at least ", start[s], ", got ",
            start[s + 1]);
  require(start[p.num_seqs] == p.num_tokens, "query_start_loc[", p.num_seqs, "]: expected num_tokens = ", p.num_tokens,
          ", got ", start[p.num_seqs]);
  return true;
}

bool check(const MergeAttentionStatesParams& p) {
  require_sizes({{"num_tokens", p.num_tokens}, {"num_heads", p.num_heads}, {"head_dim", p.head_dim}});
  require_floating("dtype", p.dtype);
  if (p.num_tokens == 0 || p.num_heads == 0 || p.head_dim == 0) return false;
  require_pointers(
      {{"out", p.out}, {"lse", p.lse}, {"out_a", p.out_a}, {"lse_a", p.lse_a}, {"out_b", p.out_b}, {"lse_b", p.lse_b}});
  return true;
}

bool check(const RecycleProjectParams& p) {
  return check_recycle(p.input, p.projection);
}

bool check(const GptqRecycleProjectParams& p) {
  require(!p.projection.groups_per_section, "projection.groups_per_section: expected 0, got ",
          p.projection.groups_per_section);
  return check_recycle(p.input, p.projection);
}

bool check(const LmHeadArgmaxParams& p) {
  return check_head(p.argmax, p.matmul);
}

bool check(const GptqLmHeadArgmaxParams& p) {
  require(!p.matmul.groups_per_section, "matmul.groups_per_section: expected 0, got ", p.matmul.groups_per_section);
  return check_head(p.argmax, p.matmul);
}

bool check(const VerifyRecycledParams& p) {
  require_sizes({{"num_seqs", p.num_seqs}, {"num_recycled", p.num_recycled}});
  if (p.num_seqs == 0) return false;
  require_pointers({{"num_accepted", p.num_accepted}});
  if (p.num_recycled) require_pointers({{"target", p.target}, {"recycled", p.recycled}});
  return true;
}

bool check(const VerifyRecycledSampledParams& p) {
  require_sizes({{"num_seqs", p.num_seqs}, {"num_recycled", p.num_recycled}});
  require(p.vocab_size >= 1 && p.vocab_size <= kMaxVocabSize, "vocab_size: expected 1 to 2^22, got ", p.vocab_size);
  require_floating("dtype", p.dtype);
  if (p.num_seqs == 0) return false;
  require_pointers({{"num_accepted", p.num_accepted},
                    {"next_token_ids", p.next_token_ids},
                    {"target", p.target},
                    {"seed", p.seed},
                    {"offset", p.offset}});
  if (p.num_recycled) require_pointers({{"recycled", p.recycled}, {"token_ids", p.token_ids}});
  for (int64_t s = 0; s < p.num_seqs; ++s)
    for (int64_t i = 0; i < p.num_recycled; ++i) {
      const int64_t id = p.token_ids[s * p.token_ids_stride + i];
      require(id >= 0 && id < p.vocab_size, "token_ids[", s, "][", i, "]: expected 0 to ", p.vocab_size - 1, ", got ",
              id);
    }
  return true;
}

}  // namespace teco::capi

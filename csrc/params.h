// One plain struct per operator: pointers, strides, sizes, scalars. Shared by every backend; knows nothing.
// Strides and sizes are int64 and count elements. "Rows" are the leading dimensions of a tensor, flattened.
#pragma once

#include <cstdint>

namespace teco {

enum class DType : int32_t { kFloat32, kFloat16, kBFloat16, kInt8, kFloat8E4M3, kFloat64 };

// A part of the vocabulary: rows of an embedding for the tokens [first, first + count). Zeros stand for those of
// others.
struct TokenRange {
  int64_t first, count;
};

// out[t] = weight[token_ids[t] - tokens.first]
struct EmbeddingParams {
  void* out;                 // [num_tokens, hidden_size]
  const int64_t* token_ids;  // [num_tokens]
  const void* weight;        // [tokens.count, hidden_size]
  TokenRange tokens;
  int64_t num_tokens, hidden_size;
  int64_t out_stride, weight_stride;
  DType dtype;  // of out
  DType weight_dtype;
};

// out[r, i] = input[r, i] * weight[i] / sqrt(mean_i(input[r, i]^2) + eps)
// With a residual: first residual_out = input + residual (rounded to the tensors' dtype), then the norm of that sum.
// Without one, rows may lie in two strides, as heads do in the tokens of a wider matrix: `inner_rows` rows with the
// inner stride (input_stride, out_stride), one such run after the other with the outer one.
struct RmsNormParams {
  void* out;
  void* residual_out;    // null without a residual
  const void* input;     // [num_rows, hidden_size]
  const void* residual;  // [num_rows, hidden_size] or null
  const void* weight;    // [hidden_size]
  int64_t num_rows, hidden_size, inner_rows;
  int64_t out_stride, residual_out_stride, input_stride, residual_stride;
  int64_t out_outer_stride, input_outer_stride;
  float eps;
  DType dtype;
};

// out[i] = ((inputs[0][i] + inputs[1][i]) + inputs[2][i]) + ..., rounded once; the sum of a collective, part by part.
// fp64 inputs are added in fp64, rounded to fp32 and then to out's dtype: exact sums of GptqMatmulParams.
struct SumRanksParams {
  void* out;              // [count]; may be one of the inputs, if they have its dtype
  void* copy;             // the same once more, or null
  const void* inputs[8];  // [num_ranks], each [count]
  int64_t count;
  int32_t num_ranks;
  DType dtype;      // of inputs: that of out, or fp64
  DType out_dtype;  // of out and copy
};

// out[r, i] = silu(input[r, i]) * input[r, size + i]
struct SiluAndMulParams {
  void* out;          // [num_rows, size]
  const void* input;  // [num_rows, 2 * size]
  int64_t num_rows, size;
  int64_t out_stride, input_stride;
  DType dtype;
};

// Rotates the first rotary_dim elements of every head, in place, by the angle of the token's position:
// (x, y) -> (x cos - y sin, y cos + x sin). Pairs are (i, i + rotary_dim / 2), or (2i, 2i + 1) when interleaved.
struct RotaryEmbeddingParams {
  const int64_t* positions;    // [num_tokens], within the cache
  void* query;                 // [num_tokens, num_query_heads, head_dim]
  void* key;                   // [num_tokens, num_kv_heads, head_dim]
  const float* cos_sin_cache;  // [max_position, rotary_dim]: cosines, then sines
  int64_t num_tokens, num_query_heads, num_kv_heads, rotary_dim;
  int64_t query_stride, query_head_stride, key_stride, key_head_stride, cos_sin_stride;
  bool interleaved;
  DType dtype;  // of query and key
};

// token_ids[r] is drawn from softmax(logits[r] / temperature[r]), filtered by min_p, then top_k, then top_p.
// A row that holds NaN, +inf or nothing but -inf gets kInvalidRow.
struct SampleParams {
  int64_t* token_ids;        // [num_rows]
  const void* logits;        // [num_rows, vocab_size]
  const float* temperature;  // [num_rows], as all below; 0: the largest logit, lowest id among equals
  const int64_t* top_k;      // <= 0: all
  const float* top_p;        // 1: all
  const float* min_p;        // 0: all
  const int64_t* seed;
  const int64_t* offset;
  int64_t num_rows, vocab_size, logits_stride;
  DType dtype;
};
constexpr int64_t kInvalidRow = -1;

// out[r, n] = sum_k input[r, k] * weight[k, n] + bias[n], weight packed in panels of 16 columns:
// [ceil(out_features / 16), in_features, 16], the last panel filled up with zeros; or as it is, [out_features,
// in_features].
struct DenseMatmulParams {
  void* out;          // [num_rows, out_features]
  const void* input;  // [num_rows, in_features]
  const void* weight;
  const float* bias;  // [out_features] or null
  int64_t num_rows, in_features, out_features;
  int64_t out_stride, input_stride;
  int64_t weight_stride;  // of rows; 0: packed
  DType dtype;            // of input and out
  DType weight_dtype;     // fp32, fp16 or bf16
};

// The same with a 2:4 sparse weight: of every four inputs 4g to 4g + 3 of a column, two count.
// values[n / 16, g, s, n % 16] is the weight of input 4g + i, i being bits 4 * (g % 8) + 2s and the next of
// indices[n / 16, g / 8, n % 16].
struct Sparse24MatmulParams {
  void* out;                // [num_rows, out_features]
  const void* input;        // [num_rows, in_features]
  const void* values;       // [ceil(out_features / 16), in_features / 4, 2, 16]
  const uint32_t* indices;  // [ceil(out_features / 16), ceil(in_features / 32), 16]
  const float* bias;        // [out_features] or null
  int64_t num_rows, in_features, out_features;
  int64_t out_stride, input_stride;
  DType dtype;        // of input and out
  DType value_dtype;  // fp32, fp16 or bf16
};

// The same with a GPTQ weight: weight[k, n] = scale[g, n] * (code[k, n] - zero[g, n]), or with minima
// weight[k, n] = scale[g, n] * code[k, n] + minimum[g, n].
//
// Inputs are ordered group by group, each group padded to whole blocks of 32. A panel of 16 columns is one contiguous
// stream of groups; a group is a header of 64 bytes (fp16 scale[16], fp16 zero[16] or minimum[16]) and its blocks:
//   2 bits, 128 bytes:  [2][16 columns][4]; byte (j, column, i) holds quads 4j to 4j + 3, lowest bits first;
//   3 bits, 192 bytes:  [3][16 columns][4]; byte (j, column, i) holds quads 2j and 2j + 1 in its six low bits; the two
//                       low bits of quad 6 are on top of byte 0, those of quad 7 on top of byte 1, and on top of byte
//                       2 the high bit of quad 6, then that of quad 7;
//   4 bits, 256 bytes:  [4][16 columns][4]; byte (j, column, i) holds quads 2j (low nibble) and 2j + 1;
//   8 bits, 512 bytes:  [8][16 columns][4]; byte (j, column, i) is quad j.
// Quad q is the four inputs 4q to 4q + 3 of a column, input 4q + i in byte i: neighbouring bytes, as one lane of an
// integer dot product takes them. A word of four bytes is unpacked with a shift and a mask per quad; only the last two
// quads of 3 bits must be put together.
//
// The inputs may be taken in sections: each section's sum, which is one of fp32, is rounded to a multiple of 2^-32, and
// these are added in fp64. That is exact while sums are below 2^21, so it does not matter who adds what first: ranks
// that have whole sections each get, all together, the bits of one that has them all.
struct GptqMatmulParams {
  void* out;                   // [num_rows, out_features]
  double* exact_out;           // in its place, of sections: sums that are not rounded any more; or null
  const void* input;           // [num_rows, in_features]
  const uint8_t* weight;       // [ceil(out_features / 16), num_groups, 64 + blocks_per_group * bits * 64]
  const int32_t* input_order;  // [num_groups * blocks_per_group * 32]: input at each packed place, -1 for padding;
                               // null when that is 0, 1, 2, ...
  const float* bias;           // [out_features] or null
  int64_t num_rows, in_features, out_features;
  int64_t num_groups, blocks_per_group;
  int64_t groups_per_section;  // the last section may have less; 0: no sections
  int64_t out_stride, input_stride;
  int32_t bits;          // 2, 3, 4 or 8
  bool has_minimum;      // minima in place of zero points
  bool int8_activation;  // quantise the input per row and block of 32; else fp32 arithmetic throughout
  DType dtype;           // of input and out
};

// out[t, k] = weight[k, token_ids[t] - tokens.first], the weight packed as it is there: rows of an embedding that is
// quantised along them. A row is a column of its panel, four bytes of every 64.
struct GptqEmbeddingParams {
  void* out;                   // [num_tokens, hidden_size]
  const int64_t* token_ids;    // [num_tokens]
  const uint8_t* weight;       // [ceil(tokens.count / 16), num_groups, 64 + blocks_per_group * bits * 64]
  const int32_t* input_order;  // [num_groups * blocks_per_group * 32] or null
  TokenRange tokens;
  int64_t num_tokens, hidden_size;
  int64_t num_groups, blocks_per_group;
  int64_t out_stride;
  int32_t bits;
  bool has_minimum;
  DType dtype;  // of out
};

// out = projection([norm(embedding[token_ids]) ; norm(hidden)]). Operators in a row: the kernel gives them a row of
// scratch memory per token, and fills in what of their params concerns it (out and its stride, input and its stride,
// num_rows).
struct RecycleInputParams {
  EmbeddingParams embedding;
  GptqEmbeddingParams packed_embedding;       // in its place, where it has a weight
  RmsNormParams embedding_norm, hidden_norm;  // of the embedding in place, of hidden
  int64_t vocab_size;
};
struct RecycleProjectParams {
  RecycleInputParams input;
  DenseMatmulParams projection;
};
struct GptqRecycleProjectParams {
  RecycleInputParams input;
  GptqMatmulParams projection;
};

// Of each row the largest product, before it is rounded to any dtype, and its column: the lowest one among equals.
// A row with NaN among its products gets kInvalidRow and NaN. logsumexp[r] = log sum_n exp(product[r, n]); an infinity
// where that is the largest product, NaN where the largest is NaN.
struct ArgmaxParams {
  int64_t* token_ids;  // [num_rows]
  float* logits;       // [num_rows]
  float* logsumexp;    // [num_rows] or null
};
struct LmHeadArgmaxParams {
  ArgmaxParams argmax;
  DenseMatmulParams matmul;  // without out
};
struct GptqLmHeadArgmaxParams {
  ArgmaxParams argmax;
  GptqMatmulParams matmul;  // without out
};

// num_accepted[s]: how many recycled tokens agree with the target's, up to the first that does not.
struct VerifyRecycledParams {
  int32_t* num_accepted;    // [num_seqs]
  const int64_t* target;    // [num_seqs, num_recycled + 1]
  const int64_t* recycled;  // [num_seqs, num_recycled]
  int64_t num_seqs, num_recycled;
  int64_t target_stride, recycled_stride;
};

// The rejection rule: a recycled token x is accepted with probability min(1, p(x) / q(x)), p being the target's
// probabilities and q those that x was drawn from. The next token is drawn from max(p - q, 0) where the first one was
// rejected, from p behind the last when all were accepted. A sequence of which something that is not a probability was
// looked at gets kInvalidRow.
struct VerifyRecycledSampledParams {
  int32_t* num_accepted;     // [num_seqs]
  int64_t* next_token_ids;   // [num_seqs]
  const void* target;        // p [num_seqs, num_recycled + 1, vocab_size]
  const void* recycled;      // q [num_seqs, num_recycled, vocab_size]
  const int64_t* token_ids;  // [num_seqs, num_recycled], within the vocabulary
  const int64_t* seed;       // [num_seqs]
  const int64_t* offset;     // [num_seqs], of the first recycled token
  int64_t num_seqs, num_recycled, vocab_size;
  int64_t target_stride, target_row_stride, recycled_stride, recycled_row_stride, token_ids_stride;
  DType dtype;  // of both probabilities
};

// Keys or values of a cache, [num_blocks, block_size, num_kv_heads, head_dim] with any strides but 1 in the last
// dimension. int8 and fp8 elements have a scale, fp32 [num_blocks, block_size, num_kv_heads] or one for all of them.
struct KVCacheView {
  void* data;
  float* scale;  // null for floating caches
  int64_t block_stride, slot_stride, head_stride;
  int64_t scale_block_stride, scale_slot_stride, scale_head_stride;  // all 0 with one scale for all
};

// cache[slot_mapping[t]] = token t's key and value, converted to the cache's dtype. A scale of its own per slot and
// head is written, max |x| / 127 (int8) or / 448 (fp8); one for all of them is only read.
struct ReshapeAndCacheParams {
  const void* key;    // [num_tokens, num_kv_heads, head_dim]
  const void* value;  // the same
  KVCacheView key_cache, value_cache;
  const int64_t* slot_mapping;  // [num_tokens]: block * block_size + offset, -1 to skip
  int64_t num_tokens, num_kv_heads, head_dim, block_size;
  int64_t key_stride, key_head_stride, value_stride, value_head_stride;
  DType dtype;         // of key and value
  DType cache_dtype;   // of both caches
  bool writes_scales;  // a scale per slot and head, where the cache has any
};

// target[destination] = source[source block] for each pair, as if one pair after the other. A block is runs of bytes,
// outer x inner of them.
struct CopyBlocksParams {
  const void* source;
  void* target;
  const int64_t* block_mapping;  // [num_pairs, 2]: source block, destination block
  int64_t num_pairs, outer, inner, run_bytes;
  int64_t source_block_bytes, source_outer_bytes, source_inner_bytes;  // strides
  int64_t target_block_bytes, target_outer_bytes, target_inner_bytes;
};

// Attention of the step's tokens over keys and values that lie in blocks of a cache. For query row (t, h) of a
// sequence, position p = seq_len - query_len + i of its i-th token, and kv head h / (num_heads / num_kv_heads):
//   score[k] = cap(scale * dot(query, key[k])) + alibi_slope * (k - p)  over the keys k that the row may see,
//   out = sum_k softmax(score)[k] * value[k],  lse = log sum_k exp(score[k]).
struct PagedAttentionParams {
  void* out;          // [num_tokens, num_heads, head_dim]
  float* lse;         // [num_tokens, num_heads] or null
  const void* query;  // [num_tokens, num_heads, head_dim]
  KVCacheView key_cache, value_cache;
  const int32_t* block_table;      // [num_seqs, ...]: block of positions 0 .. block_size - 1, of the next ones, ...
  const int32_t* seq_lens;         // [num_seqs]
  const int32_t* query_start_loc;  // [num_seqs + 1]; null: one token per sequence
  const float* alibi_slopes;       // [num_heads] or null
  const float* sinks;              // [num_heads] or null; a further logit, without a value
  int64_t num_tokens, num_seqs, num_heads, num_kv_heads, head_dim, block_size;
  int64_t out_stride, out_head_stride, query_stride, query_head_stride;
  int64_t block_table_stride;
  int64_t sliding_window;  // keys at a distance below it are seen; 0: all
  float scale;
  float soft_cap;     // cap(x) = soft_cap * tanh(x / soft_cap); 0: x
  bool causal;        // keys after p are not seen
  DType dtype;        // of query and out
  DType cache_dtype;  // any
};

// Attention over the union of two disjoint sets of keys, from the attention over each: rows are (token, head) pairs.
// lse = log(exp(lse_a) + exp(lse_b)), out = exp(lse_a - lse) * out_a + exp(lse_b - lse) * out_b. A set with lse -inf
// is empty: its out is not looked at.
struct MergeAttentionStatesParams {
  void* out;           // [num_tokens, num_heads, head_dim]
  float* lse;          // [num_tokens, num_heads]
  const void* out_a;   // like out
  const float* lse_a;  // like lse
  const void* out_b;
  const float* lse_b;
  int64_t num_tokens, num_heads, head_dim;
  int64_t out_stride, out_head_stride, out_a_stride, out_a_head_stride, out_b_stride, out_b_head_stride;
  int64_t lse_stride, lse_a_stride, lse_b_stride;
  DType dtype;  // of out, out_a and out_b
};

}  // namespace teco

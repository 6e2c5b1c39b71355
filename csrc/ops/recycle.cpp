// The operators of the recycle head.
#include "ops/gptq_weight.h"
#include "ops/matmul_weight.h"
#include "ops/ops.h"
#include "ops/plan.h"

namespace teco::ops {
namespace {

RmsNormParams norm_params(const Tensor& weight, const char* name, const Tensor& hidden, Size& hidden_size, double eps) {
  Argument(weight, name).on_device_of(hidden, "hidden").same_dtype(hidden, "hidden").shape({&hidden_size}).contiguous();
  RmsNormParams params = {};
  params.weight = weight.const_data_ptr();
  params.hidden_size = hidden_size.value;
  params.eps = static_cast<float>(eps);
  params.dtype = to_dtype(hidden.scalar_type(), "hidden");
  return params;
}

// [vocab_size, hidden_size], or packed when it has bits.
struct EmbeddingArgument {
  const Tensor& weight;
  const std::optional<Tensor>& order;
  int64_t vocab_size, bits;
  bool has_minimum;
};

// Checks all tensors, and enters what the projection has to do with them.
template <class Matmul>
RecycleInputParams recycle_input(Matmul& projection, const Tensor& weight, const Tensor& out, const Tensor& hidden,
                                 const Tensor& token_ids, const EmbeddingArgument& embedding, const Tensor& hidden_norm,
                                 const Tensor& embedding_norm, double eps) {
  Size T{"T"}, H{"hidden_size"}, V{"vocab_size", embedding.vocab_size, nullptr},
      N{"out_features", projection.out_features, "projection"};
  Argument(hidden, "hidden").floating().shape({&T, &H}).unit_last_stride();
  Argument(weight, "projection").on_device_of(hidden, "hidden");
  Argument(embedding.weight, "embedding").on_device_of(hidden, "hidden");
  Argument(token_ids, "token_ids").on_device_of(hidden, "hidden").dtype(ScalarType::Long).shape({&T}).contiguous();
  require(projection.in_features == 2 * H.value, "projection: expected 2 * hidden_size = ", 2 * H.value,
          " input features, got ", projection.in_features);
  require(eps >= 0, "eps: expected a value >= 0, got ", eps);
  Argument(out, "out")
      .on_device_of(hidden, "hidden")
      .same_dtype(hidden, "hidden")
      .shape({&T, &N})
      .unit_last_stride()
      .written();
  check_apart(out, "out", rows_of(out, "out"), hidden, "hidden", rows_of(hidden, "hidden"), InPlace::kNo);
  const auto* ids = token_ids.const_data_ptr<int64_t>();
  for (int64_t t = 0; is_readable(token_ids) && t < T.value; ++t)
    require(ids[t] >= 0 && ids[t] < V.value, "token_ids: expected 0 to ", V.value - 1, " (the rows of embedding), got ",
            ids[t], " at index ", t);

  RecycleInputParams params = {};
  const DType dtype = to_dtype(hidden.scalar_type(), "hidden");
  if (embedding.bits) {
    const PackedGptq packed = packed_gptq(embedding.weight, embedding.order, H.value, "elements in a row",
                                          embedding.vocab_size, "vocab_size", embedding.bits);
    params.packed_embedding.token_ids = ids;
    params.packed_embedding.weight = packed.data;
    params.packed_embedding.input_order = packed.input_order;
    params.packed_embedding.tokens = {0, V.value};
    params.packed_embedding.hidden_size = H.value;
    params.packed_embedding.num_groups = packed.num_groups;
    params.packed_embedding.blocks_per_group = packed.blocks_per_group;
    params.packed_embedding.bits = static_cast<int32_t>(embedding.bits);
    params.packed_embedding.has_minimum = embedding.has_minimum;
    params.packed_embedding.dtype = dtype;
  } else {
    Argument(embedding.weight, "embedding").floating().shape({&V, &H}).unit_last_stride();
    params.embedding.token_ids = ids;
    params.embedding.weight = embedding.weight.const_data_ptr();
    params.embedding.tokens = {0, V.value};
    params.embedding.hidden_size = H.value;
    params.embedding.weight_stride = embedding.weight.stride(0);
    params.embedding.dtype = dtype;
    params.embedding.weight_dtype = to_dtype(embedding.weight.scalar_type(), "embedding");
  }
  params.embedding_norm = norm_params(embedding_norm, "embedding_norm", hidden, H, eps);
  params.hidden_norm = norm_params(hidden_norm, "hidden_norm", hidden, H, eps);
  params.hidden_norm.input = hidden.const_data_ptr();
  params.hidden_norm.input_stride = hidden.stride(0);
  params.vocab_size = V.value;

  projection.out = out.mutable_data_ptr();
  projection.out_stride = out.stride(0);
  projection.num_rows = T.value;
  projection.dtype = dtype;
  return params;
}

// Checks all tensors, and enters the rows that the head multiplies.
template <class Matmul>
ArgmaxParams argmax_params(Matmul& head, const Tensor& weight, const Tensor& token_ids, const Tensor& logits,
                           const std::optional<Tensor>& logsumexp, const Tensor& hidden) {
  Size T{"T"}, H{"hidden_size", head.in_features, "weight"};
  Argument(hidden, "hidden").floating().shape({&T, &H}).unit_last_stride();
  Argument(weight, "weight").on_device_of(hidden, "hidden");
  Argument(token_ids, "out[0]").on_device_of(hidden, "hidden").dtype(ScalarType::Long).shape({&T}).contiguous();
  Argument(logits, "out[1]").on_device_of(hidden, "hidden").dtype(ScalarType::Float).shape({&T}).contiguous();
  require(head.out_features >= 1 && head.out_features < int64_t{1} << 32,
          "weight: expected a vocabulary of 1 to 2^32 - 1 tokens, got ", head.out_features);
  const Rows rows = rows_of(hidden, "hidden"), ids = {1, T.value, T.value};
  check_apart(token_ids, "out[0]", ids, hidden, "hidden", rows, InPlace::kNo);
  check_apart(logits, "out[1]", ids, hidden, "hidden", rows, InPlace::kNo);
  check_apart(logits, "out[1]", ids, token_ids, "out[0]", ids, InPlace::kNo);
  if (logsumexp) {
    Argument(*logsumexp, "logsumexp").on_device_of(hidden, "hidden").dtype(ScalarType::Float).shape({&T}).contiguous();
    check_apart(*logsumexp, "logsumexp", ids, hidden, "hidden", rows, InPlace::kNo);
    check_apart(*logsumexp, "logsumexp", ids, token_ids, "out[0]", ids, InPlace::kNo);
    check_apart(*logsumexp, "logsumexp", ids, logits, "out[1]", ids, InPlace::kNo);
  }
  head.input = hidden.const_data_ptr();
  head.input_stride = hidden.stride(0);
  head.num_rows = T.value;
  head.dtype = to_dtype(hidden.scalar_type(), "hidden");
  return {token_ids.mutable_data_ptr<int64_t>(), logits.mutable_data_ptr<float>(),
          logsumexp ? logsumexp->mutable_data_ptr<float>() : nullptr};
}

void check_no_nan(const Tensor& token_ids, const ArgmaxParams& argmax, int64_t num_rows) {
  for (int64_t r = 0; is_readable(token_ids) && r < num_rows; ++r)
    require(argmax.token_ids[r] != kInvalidRow, "hidden: expected logits that are numbers, got NaN in row ", r);
}

}  // namespace

void recycle_project(Tensor out, Tensor hidden, Tensor token_ids, Tensor embedding,
                     std::optional<Tensor> embedding_order, int64_t vocab_size, int64_t embedding_bits,
                     bool embedding_has_minimum, Tensor hidden_norm, Tensor embedding_norm, Tensor projection,
                     std::optional<Tensor> bias, int64_t out_features, double eps) {
  DenseMatmulParams matmul = dense_weight(projection, "projection", bias, out_features);
  const RecycleInputParams input =
      recycle_input(matmul, projection, out, hidden, token_ids,
                    {embedding, embedding_order, vocab_size, embedding_bits, embedding_has_minimum}, hidden_norm,
                    embedding_norm, eps);
  if (out_features > 0)
    launch(hidden, [](const auto& kernels) { return kernels.recycle_project; }, RecycleProjectParams{input, matmul});
}

void gptq_recycle_project(Tensor out, Tensor hidden, Tensor token_ids, Tensor embedding,
                          std::optional<Tensor> embedding_order, int64_t vocab_size, int64_t embedding_bits,
                          bool embedding_has_minimum, Tensor hidden_norm, Tensor embedding_norm, Tensor projection,
                          std::optional<Tensor> input_order, std::optional<Tensor> bias, int64_t in_features,
                          int64_t out_features, int64_t bits, bool has_minimum, bool int8_activation, double eps) {
  GptqMatmulParams matmul =
      gptq_weight(projection, input_order, bias, in_features, out_features, bits, has_minimum, int8_activation);
  const RecycleInputParams input =
      recycle_input(matmul, projection, out, hidden, token_ids,
                    {embedding, embedding_order, vocab_size, embedding_bits, embedding_has_minimum}, hidden_norm,
                    embedding_norm, eps);
  launch(
      hidden, [](const auto& kernels) { return kernels.gptq_recycle_project; },
      GptqRecycleProjectParams{input, matmul});
}

void lm_head_argmax(Tensor token_ids, Tensor logits, std::optional<Tensor> logsumexp, Tensor hidden, Tensor weight,
                    std::optional<Tensor> bias, int64_t out_features) {
  DenseMatmulParams head = dense_weight(weight, "weight", bias, out_features);
  const ArgmaxParams argmax = argmax_params(head, weight, token_ids, logits, logsumexp, hidden);
  launch(hidden, [](const auto& kernels) { return kernels.lm_head_argmax; }, LmHeadArgmaxParams{argmax, head});
  check_no_nan(token_ids, argmax, head.num_rows);
}

void gptq_lm_head_argmax(Tensor token_ids, Tensor logits, std::optional<Tensor> logsumexp, Tensor hidden, Tensor weight,
                         std::optional<Tensor> input_order, std::optional<Tensor> bias, int64_t in_features,
                         int64_t out_features, int64_t bits, bool has_minimum, bool int8_activation) {
  GptqMatmulParams head =
      gptq_weight(weight, input_order, bias, in_features, out_features, bits, has_minimum, int8_activation);
  const ArgmaxParams argmax = argmax_params(head, weight, token_ids, logits, logsumexp, hidden);
  launch(hidden, [](const auto& kernels) { return kernels.gptq_lm_head_argmax; }, GptqLmHeadArgmaxParams{argmax, head});
  check_no_nan(token_ids, argmax, head.num_rows);
}

void verify_recycled(Tensor out, Tensor target_token_ids, Tensor recycled_token_ids) {
  Size S{"S"}, k{"k"};
  Argument(recycled_token_ids, "recycled_token_ids").dtype(ScalarType::Long).shape({&S, &k});
  Size next{"k + 1", k.value + 1, "recycled_token_ids"};
  Argument(recycled_token_ids, "recycled_token_ids").unit_last_stride();
  Argument(target_token_ids, "target_token_ids")
      .on_device_of(recycled_token_ids, "recycled_token_ids")
      .dtype(ScalarType::Long)
      .shape({&S, &next})
      .unit_last_stride();
  Argument(out, "out")
      .on_device_of(recycled_token_ids, "recycled_token_ids")
      .dtype(ScalarType::Int)
      .shape({&S})
      .contiguous();
  const VerifyRecycledParams params = {
      .num_accepted = out.mutable_data_ptr<int32_t>(),
      .target = target_token_ids.const_data_ptr<int64_t>(),
      .recycled = recycled_token_ids.const_data_ptr<int64_t>(),
      .num_seqs = S.value,
      .num_recycled = k.value,
      .target_stride = target_token_ids.stride(0),
      .recycled_stride = recycled_token_ids.stride(0),
  };
  launch(out, [](const auto& kernels) { return kernels.verify_recycled; }, params);
}

void verify_recycled_sampled(Tensor num_accepted, Tensor next_token_ids, Tensor target_probs, Tensor recycled_probs,
                             Tensor recycled_token_ids, Tensor seed, Tensor offset) {
  constexpr int64_t kMaxVocabSize = 1 << 22;  // sums of weights (see cpu/random.h) fit 64 bits
  Size S{"S"}, k{"k"}, V{"V"};
  Argument(recycled_probs, "recycled_probs").floating().shape({&S, &k, &V}).unit_last_stride();
  Size next{"k + 1", k.value + 1, "recycled_probs"};
  Argument(target_probs, "target_probs")
      .on_device_of(recycled_probs, "recycled_probs")
      .same_dtype(recycled_probs, "recycled_probs")
      .shape({&S, &next, &V})
      .unit_last_stride();
  Argument(recycled_token_ids, "recycled_token_ids")
      .on_device_of(recycled_probs, "recycled_probs")
      .dtype(ScalarType::Long)
      .shape({&S, &k});
  Argument(recycled_token_ids, "recycled_token_ids").unit_last_stride();
  Argument(seed, "seed")
      .on_device_of(recycled_probs, "recycled_probs")
      .dtype(ScalarType::Long)
      .shape({&S})
      .contiguous();
  Argument(offset, "offset")
      .on_device_of(recycled_probs, "recycled_probs")
      .dtype(ScalarType::Long)
      .shape({&S})
      .contiguous();
  Argument(num_accepted, "out[0]")
      .on_device_of(recycled_probs, "recycled_probs")
      .dtype(ScalarType::Int)
      .shape({&S})
      .contiguous();
  Argument(next_token_ids, "out[1]")
      .on_device_of(recycled_probs, "recycled_probs")
      .dtype(ScalarType::Long)
      .shape({&S})
      .contiguous();
  require(V.value >= 1 && V.value <= kMaxVocabSize, "target_probs: expected V from 1 to 2^22, got ", V.value);
  const auto* ids = recycled_token_ids.const_data_ptr<int64_t>();
  for (int64_t s = 0; is_readable(recycled_token_ids) && s < S.value; ++s)
    for (int64_t i = 0; i < k.value; ++i) {
      const int64_t id = ids[s * recycled_token_ids.stride(0) + i];
      require(id >= 0 && id < V.value, "recycled_token_ids: expected 0 to ", V.value - 1, ", got ", id, " at [", s,
              ", ", i, "]");
    }
  const VerifyRecycledSampledParams params = {
      .num_accepted = num_accepted.mutable_data_ptr<int32_t>(),
      .next_token_ids = next_token_ids.mutable_data_ptr<int64_t>(),
      .target = target_probs.const_data_ptr(),
      .recycled = recycled_probs.const_data_ptr(),
      .token_ids = ids,
      .seed = seed.const_data_ptr<int64_t>(),
      .offset = offset.const_data_ptr<int64_t>(),
      .num_seqs = S.value,
      .num_recycled = k.value,
      .vocab_size = V.value,
      .target_stride = target_probs.stride(0),
      .target_row_stride = target_probs.stride(1),
      .recycled_stride = recycled_probs.stride(0),
      .recycled_row_stride = recycled_probs.stride(1),
      .token_ids_stride = recycled_token_ids.stride(0),
      .dtype = to_dtype(target_probs.scalar_type(), "target_probs"),
  };
  launch(recycled_probs, [](const auto& kernels) { return kernels.verify_recycled_sampled; }, params);
  for (int64_t s = 0; is_readable(next_token_ids) && s < S.value; ++s)
    require(params.next_token_ids[s] != kInvalidRow,
            "target_probs, recycled_probs: expected numbers from 0 to 1, not all of them 0, got others in sequence ",
            s);
}

}  // namespace teco::ops

#include "ops/checks.h"
#include "ops/gptq_weight.h"
#include "ops/ops.h"
#include "ops/plan.h"

namespace teco::ops {
namespace {

// Tokens must have a row, unless the weight is said to be a part of the vocabulary only.
const int64_t* check_token_ids(const Tensor& token_ids, const Tensor& weight, Size& T, int64_t vocab_size,
                               std::optional<int64_t> first) {
  Argument(token_ids, "token_ids").on_device_of(weight, "weight").dtype(ScalarType::Long).shape({&T}).contiguous();
  const auto* ids = token_ids.const_data_ptr<int64_t>();
  for (int64_t t = 0; is_readable(token_ids) && t < T.value && !first; ++t)
    require(ids[t] >= 0 && ids[t] < vocab_size, "token_ids: expected 0 to ", vocab_size - 1,
            " (the rows of weight), got ", ids[t], " at index ", t);
  return ids;
}

}  // namespace

void embedding(Tensor out, Tensor token_ids, Tensor weight, std::optional<int64_t> first_token) {
  Size T{"T"}, vocab_size{"vocab_size"}, hidden_size{"hidden_size"};
  Argument(weight, "weight").floating().shape({&vocab_size, &hidden_size}).unit_last_stride();
  const int64_t* ids = check_token_ids(token_ids, weight, T, vocab_size.value, first_token);
  Argument(out, "out").on_device_of(weight, "weight").floating().shape({&T, &hidden_size}).unit_last_stride().written();
  check_apart(out, "out", rows_of(out, "out"), weight, "weight", rows_of(weight, "weight"), InPlace::kNo);
  const EmbeddingParams params = {
      .out = out.mutable_data_ptr(),
      .token_ids = ids,
      .weight = weight.const_data_ptr(),
      .tokens = {first_token.value_or(0), vocab_size.value},
      .num_tokens = T.value,
      .hidden_size = hidden_size.value,
      .out_stride = out.stride(0),
      .weight_stride = weight.stride(0),
      .dtype = to_dtype(out.scalar_type(), "out"),
      .weight_dtype = to_dtype(weight.scalar_type(), "weight"),
  };
  launch(weight, [](const auto& kernels) { return kernels.embedding; }, params);
}

void gptq_embedding(Tensor out, Tensor token_ids, Tensor weight, std::optional<Tensor> input_order, int64_t vocab_size,
                    int64_t hidden_size, int64_t bits, bool has_minimum, std::optional<int64_t> first_token) {
  Size T{"T"}, columns{"hidden_size", hidden_size, "weight"};
  const PackedGptq packed =
      packed_gptq(weight, input_order, hidden_size, "elements in a row", vocab_size, "vocab_size", bits);
  const int64_t* ids = check_token_ids(token_ids, weight, T, vocab_size, first_token);
  Argument(out, "out").on_device_of(weight, "weight").floating().shape({&T, &columns}).unit_last_stride().written();
  check_apart(out, "out", rows_of(out, "out"), weight, "weight", rows_of(weight, "weight"), InPlace::kNo);
  const GptqEmbeddingParams params = {
      .out = out.mutable_data_ptr(),
      .token_ids = ids,
      .weight = packed.data,
      .input_order = packed.input_order,
      .tokens = {first_token.value_or(0), vocab_size},
      .num_tokens = T.value,
      .hidden_size = hidden_size,
      .num_groups = packed.num_groups,
      .blocks_per_group = packed.blocks_per_group,
      .out_stride = out.stride(0),
      .bits = static_cast<int32_t>(bits),
      .has_minimum = has_minimum,
      .dtype = to_dtype(out.scalar_type(), "out"),
  };
  launch(weight, [](const auto& kernels) { return kernels.gptq_embedding; }, params);
}

}  // namespace teco::ops

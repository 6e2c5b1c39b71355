#include "ops/matmul_weight.h"

#include <utility>

#include "ops/ops.h"
#include "ops/plan.h"

namespace teco::ops {
namespace {

// Checks and enters what all matmuls share: input [..., in_features], out [..., out_features].
template <class Params>
void set_operands(Params& params, const Tensor& out, const Tensor& input, const Tensor& weight,
                  bool exact_out = false) {
  Argument(input, "x").on_device_of(weight, "weight").floating();
  Argument(out, "out").on_device_of(weight, "weight").written();
  if (!exact_out) Argument(out, "out").same_dtype(input, "x");
  const Rows rows = rows_of(input, "x"), out_rows = rows_of(out, "out");
  require(rows.size == params.in_features, "x: expected ", params.in_features,
          " input features in the last dimension, got ", rows.size);
  require(out_rows.count == rows.count && out_rows.size == params.out_features, "out: expected ", rows.count, " x ",
          params.out_features, " elements, got ", out_rows.count, " x ", out_rows.size);
  check_apart(out, "out", out_rows, input, "x", rows, InPlace::kNo);
  params.out = out.mutable_data_ptr();
  params.input = input.const_data_ptr();
  params.num_rows = rows.count;
  params.out_stride = out_rows.stride;
  params.input_stride = rows.stride;
  params.dtype = to_dtype(input.scalar_type(), "x");
}

void set_sections(GptqMatmulParams& params, int64_t section_size) {
  const int64_t group_size = params.blocks_per_group * kBlock;
  require(section_size > 0 && section_size % group_size == 0, "section_size: expected a multiple of the ", group_size,
          " inputs of a group, got ", section_size);
  require(params.int8_activation, "section_size: expected int8 activations, with which sums are exact");
  require(!params.input_order, "section_size: expected a weight whose inputs are in their order");
  params.groups_per_section = section_size / group_size;
}

}  // namespace

void dense_matmul(Tensor out, Tensor input, Tensor weight, std::optional<Tensor> bias, int64_t out_features) {
  DenseMatmulParams params = dense_weight(weight, "weight", bias, out_features);
  set_operands(params, out, input, weight);
  if (out_features > 0) launch(input, [](const auto& kernels) { return kernels.dense_matmul; }, params);
}

void sparse24_matmul(Tensor out, Tensor input, Tensor values, Tensor indices, std::optional<Tensor> bias,
                     int64_t in_features, int64_t out_features) {
  require(in_features >= 0 && in_features % 4 == 0, "in_features: expected a multiple of 4, got ", in_features);
  Size panels{"num_panels", num_panels(out_features), "out_features"},
      groups{"in_features / 4", in_features / 4, "in_features"}, slots{"2", 2, nullptr}, columns{"16", kPanel, nullptr},
      blocks{"ceil(in_features / 32)", (in_features + kBlock - 1) / kBlock, "in_features"};
  Argument(values, "values").floating().shape({&panels, &groups, &slots, &columns}).contiguous();
  Argument(indices, "indices")
      .on_device_of(values, "values")
      .dtype(ScalarType::Int)
      .shape({&panels, &blocks, &columns})
      .contiguous();
  Sparse24MatmulParams params = {};
  params.values = values.const_data_ptr();
  params.indices = reinterpret_cast<const uint32_t*>(indices.const_data_ptr<int32_t>());
  params.bias = check_bias(bias, values, out_features);
  params.in_features = in_features;
  params.out_features = out_features;
  params.value_dtype = to_dtype(values.scalar_type(), "values");
  set_operands(params, out, input, values);
  if (out_features > 0) launch(input, [](const auto& kernels) { return kernels.sparse24_matmul; }, params);
}

void gptq_matmul(Tensor out, Tensor input, Tensor weight, std::optional<Tensor> input_order, std::optional<Tensor> bias,
                 int64_t in_features, int64_t out_features, int64_t bits, bool has_minimum, bool int8_activation,
                 int64_t section_size) {
  GptqMatmulParams params =
      gptq_weight(weight, input_order, bias, in_features, out_features, bits, has_minimum, int8_activation);
  if (section_size != 0) set_sections(params, section_size);
  const bool exact_out = section_size != 0 && out.scalar_type() == ScalarType::Double;
  set_operands(params, out, input, weight, exact_out);
  if (exact_out) params.exact_out = static_cast<double*>(std::exchange(params.out, nullptr));
  require(section_size == 0 || !caller_launch(), "section_size: kernels launched from Python take no sections");
  launch(input, [](const auto& kernels) { return kernels.gptq_matmul; }, params);
}

}  // namespace teco::ops

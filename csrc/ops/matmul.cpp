#include "ops/matmul_weight.h"

#include "ops/ops.h"
#include "ops/plan.h"

namespace teco::ops {
namespace {

// Checks and enters what all matmuls share: input [..., in_features], out [..., out_features].
template <class Params>
void set_operands(Params& params, const Tensor& out, const Tensor& input, const Tensor& weight) {
  Argument(input, "x").on_device_of(weight, "weight").floating();
  Argument(out, "out").on_device_of(weight, "weight").same_dtype(input, "x").written();
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

}  // namespace

void dense_matmul(Tensor out, Tensor input, Tensor weight, std::optional<Tensor> bias, int64_t out_features) {
  DenseMatmulParams params = dense_weight(weight, "weight", bias, out_features);
  set_operands(params, out, input, weight);
  if (out_features > 0) launch(input, cpu::kernels()->dense_matmul, params);
}

void sparse24_matmul(Tensor out, Tensor input, Tensor values, Tensor indices, std::optional<Tensor> bias,
                     int64_t in_features, int64_t out_features) {
  require(in_features >= 0 && in_features % 4 == 0, "in_features: expected a multiple of 4, got ", in_features);
  Size panels{"num_panels", num_panels(out_features), "out_features"},
      groups{"in_features / 4", in_features / 4, "in_features"}, slots{"2", 2, nullptr}, columns{"16", kPanel, nullptr},
      blocks{"ceil(in_features / 32)", (in_features + kBlock - 1) / kBlock, "in_features"};
  Argument(values, "values").on_cpu().floating().shape({&panels, &groups, &slots, &columns}).contiguous();
  Argument(indices, "indices").on_cpu().dtype(ScalarType::Int).shape({&panels, &blocks, &columns}).contiguous();
  Sparse24MatmulParams params = {};
  params.values = values.const_data_ptr();
  params.indices = reinterpret_cast<const uint32_t*>(indices.const_data_ptr<int32_t>());
  params.bias = check_bias(bias, values, out_features);
  params.in_features = in_features;
  params.out_features = out_features;
  params.value_dtype = to_dtype(values.scalar_type(), "values");
  set_operands(params, out, input, values);
  if (out_features > 0) launch(input, cpu::kernels()->sparse24_matmul, params);
}

void gptq_matmul(Tensor out, Tensor input, Tensor weight, std::optional<Tensor> input_order, std::optional<Tensor> bias,
                 int64_t in_features, int64_t out_features, int64_t bits, bool has_minimum, bool int8_activation) {
  GptqMatmulParams params =
      gptq_weight(weight, input_order, bias, in_features, out_features, bits, has_minimum, int8_activation);
  set_operands(params, out, input, weight);
  launch(input, [](const auto& kernels) { return kernels.gptq_matmul; }, params);
}

}  // namespace teco::ops

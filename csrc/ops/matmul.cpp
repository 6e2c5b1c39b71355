#include "cpu/isa.h"
#include "cpu/kernels.h"
#include "ops/checks.h"
#include "ops/gptq_weight.h"
#include "ops/ops.h"
#include "ops/plan.h"

namespace teco::ops {
namespace {

constexpr int64_t kPanel = 16, kBlock = 32;

// Checks what all matmuls share: input [..., in_features], out [..., out_features], bias [out_features].
struct Operands {
  Rows input, out;
  const float* bias;
};

Operands check_operands(const Tensor& out, const Tensor& input, const std::optional<Tensor>& bias, int64_t in_features,
                        int64_t out_features) {
  Argument(input, "x").on_cpu().floating();
  Argument(out, "out").on_cpu().same_dtype(input, "x").written();
  const Rows rows = rows_of(input, "x"), out_rows = rows_of(out, "out");
  require(rows.size == in_features, "x: expected ", in_features, " input features in the last dimension, got ",
          rows.size);
  require(out_rows.count == rows.count && out_rows.size == out_features, "out: expected ", rows.count, " x ",
          out_features, " elements, got ", out_rows.count, " x ", out_rows.size);
  check_apart(out, "out", out_rows, input, "x", rows, InPlace::kNo);
  const float* bias_data = nullptr;
  if (bias) {
    Size features{"out_features", out_features, "weight"};
    Argument(*bias, "bias").on_cpu().dtype(ScalarType::Float).shape({&features}).contiguous();
    bias_data = bias->const_data_ptr<float>();
  }
  return {rows, out_rows, bias_data};
}

int64_t num_panels(int64_t out_features) {
  return (out_features + kPanel - 1) / kPanel;
}

}  // namespace

void dense_matmul(Tensor out, Tensor input, Tensor weight, std::optional<Tensor> bias, int64_t out_features) {
  Size panels{"num_panels", num_panels(out_features), "out_features"}, in_features{"in_features"},
      columns{"16", kPanel, nullptr};
  Argument(weight, "weight").on_cpu().floating().shape({&panels, &in_features, &columns}).contiguous();
  const Operands operands = check_operands(out, input, bias, in_features.value, out_features);
  if (out_features == 0) return;
  const DenseMatmulParams params = {
      .out = out.mutable_data_ptr(),
      .input = input.const_data_ptr(),
      .weight = weight.const_data_ptr(),
      .bias = operands.bias,
      .num_rows = operands.input.count,
      .in_features = in_features.value,
      .out_features = out_features,
      .out_stride = operands.out.stride,
      .input_stride = operands.input.stride,
      .dtype = to_dtype(input.scalar_type(), "x"),
      .weight_dtype = to_dtype(weight.scalar_type(), "weight"),
  };
  launch(cpu::kernels()->dense_matmul, params);
}

void sparse24_matmul(Tensor out, Tensor input, Tensor values, Tensor indices, std::optional<Tensor> bias,
                     int64_t in_features, int64_t out_features) {
  require(in_features >= 0 && in_features % 4 == 0, "in_features: expected a multiple of 4, got ", in_features);
  Size panels{"num_panels", num_panels(out_features), "out_features"},
      groups{"in_features / 4", in_features / 4, "in_features"}, slots{"2", 2, nullptr}, columns{"16", kPanel, nullptr},
      blocks{"ceil(in_features / 32)", (in_features + kBlock - 1) / kBlock, "in_features"};
  Argument(values, "values").on_cpu().floating().shape({&panels, &groups, &slots, &columns}).contiguous();
  Argument(indices, "indices").on_cpu().dtype(ScalarType::Int).shape({&panels, &blocks, &columns}).contiguous();
  const Operands operands = check_operands(out, input, bias, in_features, out_features);
  if (out_features == 0) return;
  const Sparse24MatmulParams params = {
      .out = out.mutable_data_ptr(),
      .input = input.const_data_ptr(),
      .values = values.const_data_ptr(),
      .indices = reinterpret_cast<const uint32_t*>(indices.const_data_ptr<int32_t>()),
      .bias = operands.bias,
      .num_rows = operands.input.count,
      .in_features = in_features,
      .out_features = out_features,
      .out_stride = operands.out.stride,
      .input_stride = operands.input.stride,
      .dtype = to_dtype(input.scalar_type(), "x"),
      .value_dtype = to_dtype(values.scalar_type(), "values"),
  };
  launch(cpu::kernels()->sparse24_matmul, params);
}

void gptq_matmul(Tensor out, Tensor input, Tensor weight, std::optional<Tensor> input_order, std::optional<Tensor> bias,
                 int64_t in_features, int64_t out_features, int64_t bits, bool has_minimum, bool int8_activation) {
  const PackedGptq packed = packed_gptq(weight, input_order, in_features, "inputs", out_features, "out_features", bits);
  const Operands operands = check_operands(out, input, bias, in_features, out_features);
  const GptqMatmulParams params = {
      .out = out.mutable_data_ptr(),
      .input = input.const_data_ptr(),
      .weight = packed.data,
      .input_order = packed.input_order,
      .bias = operands.bias,
      .num_rows = operands.input.count,
      .in_features = in_features,
      .out_features = out_features,
      .num_groups = packed.num_groups,
      .blocks_per_group = packed.blocks_per_group,
      .out_stride = operands.out.stride,
      .input_stride = operands.input.stride,
      .bits = static_cast<int32_t>(bits),
      .has_minimum = has_minimum,
      .int8_activation = int8_activation,
      .dtype = to_dtype(input.scalar_type(), "x"),
  };
  launch(cpu::kernels()->gptq_matmul, params);
}

}  // namespace teco::ops

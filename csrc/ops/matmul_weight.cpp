#include "ops/matmul_weight.h"

#include "ops/gptq_weight.h"

namespace teco::ops {

const float* check_bias(const std::optional<Tensor>& bias, const Tensor& weight, int64_t out_features) {
  if (!bias) return nullptr;
  Size features{"out_features", out_features, "weight"};
  Argument(*bias, "bias").on_device_of(weight, "weight").dtype(ScalarType::Float).shape({&features}).contiguous();
  return bias->const_data_ptr<float>();
}

DenseMatmulParams dense_weight(const Tensor& weight, const char* name, const std::optional<Tensor>& bias,
                               int64_t out_features) {
  Size in_features{"in_features"};
  Argument(weight, name).floating();
  const bool is_packed = weight.dim() != 2;
  if (is_packed) {
    Size panels{"num_panels", num_panels(out_features), "out_features"}, columns{"16", kPanel, nullptr};
    Argument(weight, name).shape({&panels, &in_features, &columns}).contiguous();
  } else {
    Size outputs{"out_features", out_features, nullptr};
    Argument(weight, name).shape({&outputs, &in_features}).unit_last_stride();
    require(weight.stride(0) > 0 || weight.size(0) <= 1 || weight.size(1) == 0, name,
            ": expected rows in memory of their own, got stride ", weight.stride(0), "; call .contiguous()");
  }
  DenseMatmulParams params = {};
  params.weight = weight.const_data_ptr();
  params.bias = check_bias(bias, weight, out_features);
  params.in_features = in_features.value;
  params.out_features = out_features;
  // 0 says that it is packed; the stride of a single row is as good as any.
  params.weight_stride = is_packed ? 0 : weight.stride(0) > 0 ? weight.stride(0) : 1;
  params.weight_dtype = to_dtype(weight.scalar_type(), name);
  return params;
}

GptqMatmulParams gptq_weight(const Tensor& weight, const std::optional<Tensor>& input_order,
                             const std::optional<Tensor>& bias, int64_t in_features, int64_t out_features, int64_t bits,
                             bool has_minimum, bool int8_activation) {
  const PackedGptq packed = packed_gptq(weight, input_order, in_features, "inputs", out_features, "out_features", bits);
  GptqMatmulParams params = {};
  params.weight = packed.data;
  params.input_order = packed.input_order;
  params.bias = check_bias(bias, weight, out_features);
  params.in_features = in_features;
  params.out_features = out_features;
  params.num_groups = packed.num_groups;
  params.blocks_per_group = packed.blocks_per_group;
  params.bits = static_cast<int32_t>(bits);
  params.has_minimum = has_minimum;
  params.int8_activation = int8_activation;
  return params;
}

}  // namespace teco::ops

// The part of a matmul's params that its weight makes up, for the operators that multiply.
#pragma once

#include <optional>

#include "ops/checks.h"

namespace teco::ops {

constexpr int64_t kPanel = 16, kBlock = 32;

inline int64_t num_panels(int64_t out_features) {
  return (out_features + kPanel - 1) / kPanel;
}

// fp32 [out_features], or null without a bias.
const float* check_bias(const std::optional<Tensor>& bias, const Tensor& weight, int64_t out_features);

// All but input, out and num_rows, after checks. A dense weight is packed, [ceil(out_features / 16), in_features, 16],
// or as it is, [out_features, in_features]; `name` is the operator's name for it.
DenseMatmulParams dense_weight(const Tensor& weight, const char* name, const std::optional<Tensor>& bias,
                               int64_t out_features);
GptqMatmulParams gptq_weight(const Tensor& weight, const std::optional<Tensor>& input_order,
                             const std::optional<Tensor>& bias, int64_t in_features, int64_t out_features, int64_t bits,
                             bool has_minimum, bool int8_activation);

}  // namespace teco::ops

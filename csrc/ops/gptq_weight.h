// A packed GPTQ weight as operator arguments; the layout is described at GptqMatmulParams.
#pragma once

#include <optional>

#include "ops/checks.h"

namespace teco::ops {

struct PackedGptq {
  const uint8_t* data;
  const int32_t* input_order;  // or null
  int64_t num_groups, blocks_per_group;
};

// Checks `weight` [ceil(out_features / 16), num_groups, 64 + n * bits * 64] and `input_order`, which only a weight
// without padding can do without. The names are the operator's own for the inputs and outputs of the weight.
PackedGptq packed_gptq(const Tensor& weight, const std::optional<Tensor>& input_order, int64_t in_features,
                       const char* in_name, int64_t out_features, const char* out_name, int64_t bits);

}  // namespace teco::ops

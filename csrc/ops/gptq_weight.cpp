#include "ops/gptq_weight.h"

#include "ops/backend.h"

namespace teco::ops {

PackedGptq packed_gptq(const Tensor& weight, const std::optional<Tensor>& input_order, int64_t in_features,
                       const char* in_name, int64_t out_features, const char* out_name, int64_t bits) {
  constexpr int64_t kPanel = 16, kBlock = 32, kHeaderBytes = 64;
  require(bits == 2 || bits == 3 || bits == 4 || bits == 8, "bits: expected 2, 3, 4 or 8, got ", bits);
  Size panels{"num_panels", (out_features + kPanel - 1) / kPanel, out_name}, groups{"num_groups"}, bytes{"group_bytes"};
  Argument(weight, "weight").dtype(ScalarType::Byte).shape({&panels, &groups, &bytes}).contiguous();
  const bool is_aligned = reinterpret_cast<uintptr_t>(weight.const_data_ptr()) % 16 == 0;
  const bool is_for_gpu = cuda_kernels_for(weight) || caller_launch();
  require(is_aligned || !is_for_gpu, "weight: expected memory aligned to 16 bytes; call .clone()");
  const int64_t block_bytes = bits * 64;
  require(bytes.value > kHeaderBytes && (bytes.value - kHeaderBytes) % block_bytes == 0,
          "weight: expected groups of 64 + n * ", block_bytes, " bytes, got ", bytes.value);
  const int64_t blocks_per_group = (bytes.value - kHeaderBytes) / block_bytes;
  Size packed_size{"packed_size", groups.value * blocks_per_group * kBlock, "weight"};
  const int32_t* order = nullptr;
  if (input_order) {
    Argument(*input_order, "input_order")
        .on_device_of(weight, "weight")
        .dtype(ScalarType::Int)
        .shape({&packed_size})
        .contiguous();
    order = input_order->const_data_ptr<int32_t>();
    for (int64_t i = 0; is_readable(*input_order) && i < packed_size.value; ++i)
      require(order[i] >= -1 && order[i] < in_features, "input_order: expected -1 to ", in_features - 1, ", got ",
              order[i], " at ", i);
  } else {
    require(packed_size.value == in_features, "weight: expected ", in_features, " ", in_name, ", got ",
            packed_size.value, "; padding needs an input_order");
  }
  return {weight.const_data_ptr<uint8_t>(), order, groups.value, blocks_per_group};
}

}  // namespace teco::ops

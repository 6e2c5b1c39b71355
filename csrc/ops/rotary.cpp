#include "ops/checks.h"
#include "ops/ops.h"
#include "ops/plan.h"

namespace teco::ops {

void rotary_embedding(Tensor positions, Tensor query, Tensor key, Tensor cos_sin_cache, bool interleaved) {
  Size T{"T"}, Hq{"Hq"}, Hkv{"Hkv"}, D{"D"}, max_position{"max_position"}, rotary_dim{"rotary_dim"};
  Argument(query, "query").floating().shape({&T, &Hq, &D}).unit_last_stride().written();
  Argument(key, "key")
      .on_device_of(query, "query")
      .same_dtype(query, "query")
      .shape({&T, &Hkv, &D})
      .unit_last_stride()
      .written();
  Argument(positions, "positions").on_device_of(query, "query").dtype(ScalarType::Long).shape({&T}).contiguous();
  Argument(cos_sin_cache, "cos_sin_cache")
      .on_device_of(query, "query")
      .dtype(ScalarType::Float)
      .shape({&max_position, &rotary_dim})
      .unit_last_stride();
  require(rotary_dim.value % 2 == 0 && rotary_dim.value <= D.value,
          "cos_sin_cache: expected an even rotary_dim of at most D = ", D.value, ", got ", rotary_dim.value);
  const auto* position = static_cast<const int64_t*>(positions.const_data_ptr());
  for (int64_t t = 0; is_readable(positions) && t < T.value; ++t)
    require(position[t] >= 0 && position[t] < max_position.value, "positions: expected 0 to ", max_position.value - 1,
            " (the rows of cos_sin_cache), got ", position[t], " at index ", t);
  const RotaryEmbeddingParams params = {
      .positions = position,
      .query = query.mutable_data_ptr(),
      .key = key.mutable_data_ptr(),
      .cos_sin_cache = static_cast<const float*>(cos_sin_cache.const_data_ptr()),
      .num_tokens = T.value,
      .num_query_heads = Hq.value,
      .num_kv_heads = Hkv.value,
      .rotary_dim = rotary_dim.value,
      .query_stride = query.stride(0),
      .query_head_stride = query.stride(1),
      .key_stride = key.stride(0),
      .key_head_stride = key.stride(1),
      .cos_sin_stride = cos_sin_cache.stride(0),
      .interleaved = interleaved,
      .dtype = to_dtype(query.scalar_type(), "query"),
  };
  launch(query, [](const auto& kernels) { return kernels.rotary_embedding; }, params);
}

}  // namespace teco::ops

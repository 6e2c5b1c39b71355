#include "ops/kv_cache_view.h"

#include "ops/backend.h"

namespace teco::ops {

KVCacheView kv_cache_view(const Tensor& cache, const char* name, const std::optional<Tensor>& scale,
                          const char* scale_name, Size& num_blocks, Size& B, Size& Hkv, Size& D) {
  Argument(cache, name)
      .one_of({ScalarType::Float, ScalarType::Half, ScalarType::BFloat16, ScalarType::Char, ScalarType::Float8_e4m3fn})
      .shape({&num_blocks, &B, &Hkv, &D})
      .unit_last_stride();
  KVCacheView view{
      .data = cache.mutable_data_ptr(),
      .scale = nullptr,
      .block_stride = cache.stride(0),
      .slot_stride = cache.stride(1),
      .head_stride = cache.stride(2),
      .scale_block_stride = 0,
      .scale_slot_stride = 0,
      .scale_head_stride = 0,
  };
  const bool scaled = cache.scalar_type() == ScalarType::Char || cache.scalar_type() == ScalarType::Float8_e4m3fn;
  require(scaled == scale.has_value(), scale_name, ": expected ", scaled ? "a scale" : "None", ", as ", name, " is ",
          dtype_name(cache.scalar_type()));
  if (!scaled) return view;
  Argument(*scale, scale_name).on_device_of(cache, name).dtype(ScalarType::Float);
  view.scale = static_cast<float*>(scale->mutable_data_ptr());
  if (is_per_slot(scale)) {
    Argument(*scale, scale_name).shape({&num_blocks, &B, &Hkv});
    view.scale_block_stride = scale->stride(0);
    view.scale_slot_stride = scale->stride(1);
    view.scale_head_stride = scale->stride(2);
  } else {
    require(scale->numel() == 1, scale_name, ": expected one number or shape [num_blocks, B, Hkv], got ",
            scale->numel(), " numbers in ", scale->dim(), " dimensions");
    if (is_readable(*scale)) require(*view.scale > 0, scale_name, ": expected a positive number, got ", *view.scale);
  }
  return view;
}

}  // namespace teco::ops

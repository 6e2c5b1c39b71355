#include "ops/checks.h"
#include "ops/kv_cache_view.h"
#include "ops/ops.h"
#include "ops/plan.h"

namespace teco::ops {
namespace {

// Pairs of blocks to copy, checked against the number of blocks on either side.
const int64_t* check_mapping(const Tensor& block_mapping, const Tensor& cache, const char* cache_name,
                             int64_t source_blocks, int64_t target_blocks) {
  Size n{"n"}, pair{"2", 2};
  Argument(block_mapping, "block_mapping")
      .on_device_of(cache, cache_name)
      .dtype(ScalarType::Long)
      .shape({&n, &pair})
      .contiguous();
  const auto* mapping = static_cast<const int64_t*>(block_mapping.const_data_ptr());
  for (int64_t i = 0; is_readable(block_mapping) && i < 2 * n.value; ++i) {
    const int64_t num_blocks = i % 2 ? target_blocks : source_blocks;
    require(mapping[i] >= 0 && mapping[i] < num_blocks, "block_mapping: expected ", i % 2 ? "destination" : "source",
            " blocks from 0 to ", num_blocks - 1, ", got ", mapping[i], " in row ", i / 2);
  }
  return mapping;
}

// Caches, or their scales, of the same blocks.
void check_blocks(const Tensor& source, const char* source_name, const Tensor& target, const char* target_name) {
  Argument(source, source_name).unit_last_stride();
  Argument(target, target_name).on_device_of(source, source_name).same_dtype(source, source_name).unit_last_stride();
  require(source.dim() == 3 || source.dim() == 4, source_name,
          ": expected shape [num_blocks, B, Hkv, D] or [num_blocks, B, Hkv], got ", source.dim(), " dimensions");
  require(target.dim() == source.dim(), target_name, ": expected ", source.dim(), " dimensions, as ", source_name,
          " has, got ", target.dim());
  for (int64_t i = 1; i < source.dim(); ++i)
    require(target.size(i) == source.size(i), target_name, ": expected size ", source.size(i), " in dimension ", i,
            ", as ", source_name, " has, got ", target.size(i));
}

void copy(const Tensor& source, Tensor& target, const int64_t* mapping, int64_t num_pairs) {
  if (source.numel() == 0 || num_pairs == 0) return;
  const int64_t bytes = source.element_size(), last = source.dim() - 1;
  const bool has_inner = last == 3;
  CopyBlocksParams params{
      .source = source.const_data_ptr(),
      .target = target.mutable_data_ptr(),
      .block_mapping = mapping,
      .num_pairs = num_pairs,
      .outer = source.size(1),
      .inner = has_inner ? source.size(2) : 1,
      .run_bytes = source.size(last) * bytes,
      .source_block_bytes = source.stride(0) * bytes,
      .source_outer_bytes = source.stride(1) * bytes,
      .source_inner_bytes = has_inner ? source.stride(2) * bytes : 0,
      .target_block_bytes = target.stride(0) * bytes,
      .target_outer_bytes = target.stride(1) * bytes,
      .target_inner_bytes = has_inner ? target.stride(2) * bytes : 0,
  };
  if (params.source_inner_bytes == params.run_bytes && params.target_inner_bytes == params.run_bytes) {
    params.run_bytes *= params.inner;
    params.inner = 1;
  }
  launch(source, [](const auto& kernels) { return kernels.copy_blocks; }, params);
}

}  // namespace

void reshape_and_cache(Tensor key, Tensor value, Tensor key_cache, Tensor value_cache, Tensor slot_mapping,
                       std::optional<Tensor> key_scale, std::optional<Tensor> value_scale) {
  Size T{"T"}, Hkv{"Hkv"}, D{"D"}, num_blocks{"num_blocks"}, B{"B"};
  Argument(key, "key").floating().shape({&T, &Hkv, &D}).unit_last_stride();
  Argument(value, "value").on_device_of(key, "key").same_dtype(key, "key").shape({&T, &Hkv, &D}).unit_last_stride();
  const KVCacheView key_view = kv_cache_view(key_cache, "key_cache", key_scale, "key_scale", num_blocks, B, Hkv, D);
  Argument(key_cache, "key_cache").on_device_of(key, "key");
  Argument(value_cache, "value_cache").on_device_of(key, "key").same_dtype(key_cache, "key_cache");
  const KVCacheView value_view =
      kv_cache_view(value_cache, "value_cache", value_scale, "value_scale", num_blocks, B, Hkv, D);
  require(is_per_slot(key_scale) == is_per_slot(value_scale),
          "value_scale: expected one number or one per slot and head, whichever key_scale is");
  Argument(key_cache, "key_cache").written();
  Argument(value_cache, "value_cache").written();
  if (is_per_slot(key_scale)) {
    Argument(*key_scale, "key_scale").written();
    Argument(*value_scale, "value_scale").written();
  }
  Argument(slot_mapping, "slot_mapping").on_device_of(key, "key").dtype(ScalarType::Long).shape({&T}).contiguous();
  const auto* slots = static_cast<const int64_t*>(slot_mapping.const_data_ptr());
  const int64_t num_slots = num_blocks.value * B.value;
  for (int64_t t = 0; is_readable(slot_mapping) && t < T.value; ++t)
    require(slots[t] >= -1 && slots[t] < num_slots, "slot_mapping: expected -1 or a slot from 0 to ", num_slots - 1,
            ", got ", slots[t], " at index ", t);
  const ReshapeAndCacheParams params = {
      .key = key.const_data_ptr(),
      .value = value.const_data_ptr(),
      .key_cache = key_view,
      .value_cache = value_view,
      .slot_mapping = slots,
      .num_tokens = T.value,
      .num_kv_heads = Hkv.value,
      .head_dim = D.value,
      .block_size = B.value,
      .key_stride = key.stride(0),
      .key_head_stride = key.stride(1),
      .value_stride = value.stride(0),
      .value_head_stride = value.stride(1),
      .dtype = to_dtype(key.scalar_type(), "key"),
      .cache_dtype = to_dtype(key_cache.scalar_type(), "key_cache"),
      .writes_scales = is_per_slot(key_scale),
  };
  launch(key, [](const auto& kernels) { return kernels.reshape_and_cache; }, params);
}

void copy_blocks(Tensor key_cache, Tensor value_cache, Tensor block_mapping) {
  check_blocks(key_cache, "key_cache", value_cache, "value_cache");
  Argument(key_cache, "key_cache").written();
  Argument(value_cache, "value_cache").written();
  require(key_cache.size(0) == value_cache.size(0), "value_cache: expected ", key_cache.size(0),
          " blocks, as key_cache has, got ", value_cache.size(0));
  const int64_t* mapping = check_mapping(block_mapping, key_cache, "key_cache", key_cache.size(0), key_cache.size(0));
  copy(key_cache, key_cache, mapping, block_mapping.size(0));
  copy(value_cache, value_cache, mapping, block_mapping.size(0));
}

void swap_blocks(Tensor source_cache, Tensor target_cache, Tensor block_mapping) {
  check_blocks(source_cache, "source_cache", target_cache, "target_cache");
  Argument(target_cache, "target_cache").written();
  const int64_t* mapping =
      check_mapping(block_mapping, source_cache, "source_cache", source_cache.size(0), target_cache.size(0));
  copy(source_cache, target_cache, mapping, block_mapping.size(0));
}

}  // namespace teco::ops

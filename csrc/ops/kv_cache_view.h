// The caches of keys and values as operator arguments.
#pragma once

#include <optional>

#include "ops/checks.h"

namespace teco::ops {

// Checks one cache [num_blocks, B, Hkv, D] and its scale, which int8 and fp8 caches must have and others must not;
// binds the sizes.
KVCacheView kv_cache_view(const Tensor& cache, const char* name, const std::optional<Tensor>& scale,
                          const char* scale_name, Size& num_blocks, Size& B, Size& Hkv, Size& D);

// Whether a scale is one per slot and head; else it is one for all.
inline bool is_per_slot(const std::optional<Tensor>& scale) {
  return scale && scale->dim() == 3;
}

}  // namespace teco::ops

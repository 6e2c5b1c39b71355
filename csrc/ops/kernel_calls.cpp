#include "ops/kernel_calls.h"

#include <map>

#include "ops/checks.h"
#include "params.h"

namespace teco::ops {

int64_t kernel_calls_of(std::string name) {
  static const std::map<std::string, const std::atomic<int64_t>*> counters = {
      {"dense_matmul", &kernel_calls<DenseMatmulParams>},
      {"gptq_matmul", &kernel_calls<GptqMatmulParams>},
      {"paged_attention", &kernel_calls<PagedAttentionParams>},
      {"reshape_and_cache", &kernel_calls<ReshapeAndCacheParams>},
      {"rotary_embedding", &kernel_calls<RotaryEmbeddingParams>},
  };
  const auto found = counters.find(name);
  require(found != counters.end(), "operator: expected one whose runs are counted, got ", name);
  return found->second->load(std::memory_order_relaxed);
}

}  // namespace teco::ops

#include <algorithm>
#include <cmath>
#include <limits>

#include <torch/csrc/stable/ops.h>

#include "ops/checks.h"
#include "ops/kv_cache_view.h"
#include "ops/ops.h"
#include "ops/plan.h"

namespace teco::ops {
namespace {

constexpr int64_t kMaxHeadDim = 512;

// Rows that the CUDA kernels count: tokens times heads, a sequence having up to 16 per kv head that may be empty.
constexpr int64_t kMaxRows = int64_t{1} << 30, kRowsOfSequence = 16;

const int32_t* int32_data(const Tensor& tensor, const char* name, const Tensor& query, Size& size) {
  Argument(tensor, name).on_device_of(query, "query").dtype(ScalarType::Int).shape({&size}).contiguous();
  return tensor.const_data_ptr<int32_t>();
}

// One fp32 number per query head, or none at all.
const float* per_head(const std::optional<Tensor>& tensor, const char* name, const Tensor& query, Size& Hq) {
  if (!tensor) return nullptr;
  Argument(*tensor, name).on_device_of(query, "query").dtype(ScalarType::Float).shape({&Hq}).contiguous();
  return tensor->const_data_ptr<float>();
}

void check_start_loc(const int32_t* start, int64_t num_seqs, int64_t num_tokens) {
  require(start[0] == 0, "query_start_loc: expected 0 at index 0, got ", start[0]);
  for (int64_t s = 0; s < num_seqs; ++s)
    require(start[s] <= start[s + 1], "query_start_loc: expected values that do not decrease, got ", start[s],
            " and then ", start[s + 1], " at index ", s + 1);
  require(start[num_seqs] == num_tokens, "query_start_loc: expected T = ", num_tokens, " (from query) at the end, got ",
          start[num_seqs]);
}

// Lengths, and the block ids that will be read: those of the keys that some row sees.
void check_sequences(const PagedAttentionParams& p, int64_t max_blocks, int64_t num_blocks) {
  const bool by_position = p.causal || p.sliding_window || p.alibi_slopes;
  for (int64_t s = 0; s < p.num_seqs; ++s) {
    const int64_t seq_len = p.seq_lens[s];
    const int64_t query_len = p.query_start_loc ? p.query_start_loc[s + 1] - p.query_start_loc[s] : 1;
    require(seq_len >= 0 && seq_len <= max_blocks * p.block_size,
            "seq_lens: expected 0 to max_blocks * B = ", max_blocks * p.block_size, ", got ", seq_len, " at index ", s);
    require(!by_position || seq_len == 0 || seq_len >= query_len, "seq_lens: expected at least the ", query_len,
            " query tokens of the sequence (or 0: no keys at all), got ", seq_len, " at index ", s);
    if (query_len == 0) continue;
    const int64_t first = p.sliding_window ? std::max<int64_t>(seq_len - query_len - p.sliding_window + 1, 0) : 0;
    const int32_t* blocks = p.block_table + s * p.block_table_stride;
    for (int64_t b = first / p.block_size; b * p.block_size < seq_len; ++b)
      require(blocks[b] >= 0 && blocks[b] < num_blocks, "block_table: expected block ids from 0 to ", num_blocks - 1,
              ", got ", blocks[b], " at [", s, ", ", b, "]");
  }
}

void launch_with_workspace(const cuda::KernelTable& table, const Tensor& query, const PagedAttentionParams& params,
                           int64_t max_keys) {
  const int64_t bytes = table.paged_attention_workspace(params, max_keys);
  const Tensor workspace = torch::stable::new_empty(query, {bytes}, ScalarType::Byte);
  run_on_stream(query, [kernel = table.paged_attention, params, max_keys, workspace](void* stream) {
    count_kernel_call<PagedAttentionParams>();
    return kernel(params, max_keys, workspace.mutable_data_ptr(), stream);
  });
}

}  // namespace

void paged_attention(Tensor out, std::optional<Tensor> lse, Tensor query, Tensor key_cache, Tensor value_cache,
                     Tensor block_table, Tensor seq_lens, std::optional<Tensor> query_start_loc,
                     std::optional<Tensor> alibi_slopes, std::optional<Tensor> sinks, std::optional<Tensor> key_scale,
                     std::optional<Tensor> value_scale, double scale, double soft_cap, int64_t sliding_window,
                     bool causal) {
  Size T{"T"}, S{"S"}, Hq{"Hq"}, Hkv{"Hkv"}, D{"D"}, num_blocks{"num_blocks"}, B{"B"}, max_blocks{"max_blocks"};
  Argument(query, "query").floating().shape({&T, &Hq, &D}).unit_last_stride();
  const KVCacheView keys = kv_cache_view(key_cache, "key_cache", key_scale, "key_scale", num_blocks, B, Hkv, D);
  Argument(key_cache, "key_cache").on_device_of(query, "query");
  Argument(value_cache, "value_cache").on_device_of(query, "query").same_dtype(key_cache, "key_cache");
  const KVCacheView values =
      kv_cache_view(value_cache, "value_cache", value_scale, "value_scale", num_blocks, B, Hkv, D);
  require(D.value >= 1 && D.value <= kMaxHeadDim, "query: expected D from 1 to ", kMaxHeadDim, ", got ", D.value);
  require(B.value >= 1, "key_cache: expected B >= 1, got ", B.value);
  require(Hkv.value >= 1 && Hq.value % Hkv.value == 0, "query: expected Hq to be a multiple of Hkv = ", Hkv.value,
          " (from key_cache), got ", Hq.value);
  Argument(out, "out")
      .on_device_of(query, "query")
      .same_dtype(query, "query")
      .shape({&T, &Hq, &D})
      .unit_last_stride()
      .written();
  require(std::isfinite(static_cast<float>(scale)), "scale: expected a finite number of fp32, got ", scale);
  require(soft_cap == 0 || (soft_cap > 0 && std::isnormal(static_cast<float>(soft_cap))),
          "soft_cap: expected 0 or a normal number of fp32 > 0, got ", soft_cap);
  require(sliding_window >= 0, "sliding_window: expected a number >= 1, got ", sliding_window);
  const int32_t* lengths = int32_data(seq_lens, "seq_lens", query, S);
  Argument(block_table, "block_table")
      .on_device_of(query, "query")
      .dtype(ScalarType::Int)
      .shape({&S, &max_blocks})
      .unit_last_stride();
  const int32_t* start = nullptr;
  if (query_start_loc) {
    Size boundaries{"S + 1", S.value + 1, "seq_lens"};
    start = int32_data(*query_start_loc, "query_start_loc", query, boundaries);
    if (is_readable(query)) check_start_loc(start, S.value, T.value);
  } else {
    require(S.value == T.value, "seq_lens: expected one sequence for each of T = ", T.value,
            " (from query) tokens, as query_start_loc is None, got ", S.value);
  }
  if (lse) Argument(*lse, "lse").on_device_of(query, "query").dtype(ScalarType::Float).shape({&T, &Hq}).contiguous();

  const PagedAttentionParams params = {
      .out = out.mutable_data_ptr(),
      .lse = lse ? lse->mutable_data_ptr<float>() : nullptr,
      .query = query.const_data_ptr(),
      .key_cache = keys,
      .value_cache = values,
      .block_table = block_table.const_data_ptr<int32_t>(),
      .seq_lens = lengths,
      .query_start_loc = start,
      .alibi_slopes = per_head(alibi_slopes, "alibi_slopes", query, Hq),
      .sinks = per_head(sinks, "sinks", query, Hq),
      .num_tokens = T.value,
      .num_seqs = S.value,
      .num_heads = Hq.value,
      .num_kv_heads = Hkv.value,
      .head_dim = D.value,
      .block_size = B.value,
      .out_stride = out.stride(0),
      .out_head_stride = out.stride(1),
      .query_stride = query.stride(0),
      .query_head_stride = query.stride(1),
      .block_table_stride = block_table.stride(0),
      // No distance between int32 lengths exceeds it, and positions may be added to it.
      .sliding_window = std::min<int64_t>(sliding_window, std::numeric_limits<int32_t>::max()),
      .scale = static_cast<float>(scale),
      .soft_cap = static_cast<float>(soft_cap),
      .causal = causal,
      .dtype = to_dtype(query.scalar_type(), "query"),
      .cache_dtype = to_dtype(key_cache.scalar_type(), "key_cache"),
  };
  if (is_readable(query)) check_sequences(params, max_blocks.value, num_blocks.value);
  if (T.value == 0 || Hq.value == 0) return;
  const cuda::KernelTable* table = cuda_kernels_for(query);
  if (table && !caller_launch()) {
    const int64_t of_sequence = start ? std::max(Hq.value, kRowsOfSequence * Hkv.value) : Hq.value;
    require(std::max(T.value * Hq.value, S.value * of_sequence) <= kMaxRows,
            "query: expected 2^30 rows (tokens times heads) at the most, each sequence counting as ", of_sequence,
            " of them or more, got shape [", T.value, ", ", Hq.value, ", ", D.value, "] and ", S.value, " sequences");
    launch_with_workspace(*table, query, params, max_blocks.value * B.value);
  } else {
    launch(query, cpu::kernels()->paged_attention, params);
  }
}

void merge_attention_states(Tensor out, Tensor lse, Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b) {
  Size T{"T"}, Hq{"Hq"}, D{"D"};
  Argument(out_a, "out_a").floating().shape({&T, &Hq, &D}).unit_last_stride();
  Argument(out_b, "out_b")
      .on_device_of(out_a, "out_a")
      .same_dtype(out_a, "out_a")
      .shape({&T, &Hq, &D})
      .unit_last_stride();
  Argument(out, "out")
      .on_device_of(out_a, "out_a")
      .same_dtype(out_a, "out_a")
      .shape({&T, &Hq, &D})
      .unit_last_stride()
      .written();
  Argument(lse_a, "lse_a").on_device_of(out_a, "out_a").dtype(ScalarType::Float).shape({&T, &Hq}).unit_last_stride();
  Argument(lse_b, "lse_b").on_device_of(out_a, "out_a").dtype(ScalarType::Float).shape({&T, &Hq}).unit_last_stride();
  Argument(lse, "lse")
      .on_device_of(out_a, "out_a")
      .dtype(ScalarType::Float)
      .shape({&T, &Hq})
      .unit_last_stride()
      .written();
  const MergeAttentionStatesParams params = {
      .out = out.mutable_data_ptr(),
      .lse = lse.mutable_data_ptr<float>(),
      .out_a = out_a.const_data_ptr(),
      .lse_a = lse_a.const_data_ptr<float>(),
      .out_b = out_b.const_data_ptr(),
      .lse_b = lse_b.const_data_ptr<float>(),
      .num_tokens = T.value,
      .num_heads = Hq.value,
      .head_dim = D.value,
      .out_stride = out.stride(0),
      .out_head_stride = out.stride(1),
      .out_a_stride = out_a.stride(0),
      .out_a_head_stride = out_a.stride(1),
      .out_b_stride = out_b.stride(0),
      .out_b_head_stride = out_b.stride(1),
      .lse_stride = lse.stride(0),
      .lse_a_stride = lse_a.stride(0),
      .lse_b_stride = lse_b.stride(0),
      .dtype = to_dtype(out_a.scalar_type(), "out_a"),
  };
  launch(out_a, [](const auto& kernels) { return kernels.merge_attention_states; }, params);
}

}  // namespace teco::ops

// Attention over a paged KV cache, for prefill, chunks of it, verification and decode alike.
//
// A block takes 16 query rows of one kv head (tokens times the heads of a group, so that a key is loaded once for the
// group), and walks over the keys that they see, 32 at a time: keys to shared memory as fp32, scores, softmax, values
// to the same memory, weighted sums in registers. A row belongs to one warp; a lane is a key for the scores, and every
// 32nd element of the head for the sums. Sequences with few query rows have their keys split among up to 32 blocks, and
// a second kernel merges what these leave in the workspace, split after split.
//
// Decode: bound by reading keys and values, each once from memory in accesses of 16 bytes (8 of an 8-bit cache).
// Prefill: bound by fp32 arithmetic and by shared memory, as no tensor cores are used. What a row must not see is
// skipped, not multiplied by zero: a masked or unwritten slot may hold NaN.
#include "cuda/kv_element.h"
#include "cuda/paged_attention.h"

namespace teco::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kWarpRows = kTileRows / kWarps;  // rows w, w + 4, ...: with few rows, all warps have some

// Elements of a cache that a lane loads at a time: 16 bytes, or 8 of small elements, whose conversion takes registers.
template <class E>
constexpr int kLoad = smaller(kVector<E>, 8);

// Keys are read by 32 lanes at the same element, 16 bytes each: padding by 16 bytes keeps them in different banks.
template <int kDim>
struct Shared {
  float query[kTileRows][kDim];
  float tile[kTileKeys][kDim + 4];  // keys, then values
  float key_scale[kTileKeys], value_scale[kTileKeys];
};

// What a lane holds of a row.
template <int kDim>
struct Row {
  float max = minus_infinity(), sum = 0.f;  // the sum is that of this lane's keys
  float acc[kDim / kWarpSize] = {};         // elements lane, lane + 32, ...
};

// Padded with zeros to a multiple of 4, in which they are used.
template <int kDim>
__device__ void load_query(const AttentionProblem& problem, const Tile& tile, int rows, int kv_head,
                           Shared<kDim>& shared) {
  const PagedAttentionParams& p = problem.p;
  const int size = ceil_div(problem.head_dim, 4) * 4;
  for (int i = thread_id(); i < rows * size; i += kThreads) {
    const int r = i / size, d = i % size;
    const int row = tile.first_row + r;
    const int64_t token = tile.seq.first_token + row / problem.group,
                  head = kv_head * problem.group + row % problem.group;
    const int64_t index = token * p.query_stride + head * p.query_head_stride + d;
    shared.query[r][d] = d < problem.head_dim ? load_as_float(p.query, index, p.dtype) : 0.f;
  }
}

// Keys or values at the positions [first, first + 32), as far as they lie in `used`, with their scales.
template <int kDim, class E>
__device__ void load_tile(const AttentionProblem& problem, const Sequence& seq, const KVCacheView& cache, int kv_head,
                          int first, const Positions& used, Shared<kDim>& shared, float (&scales)[kTileKeys]) {
  constexpr int N = kLoad<E>;
  const PagedAttentionParams& p = problem.p;
  const int32_t* table = p.block_table + seq.index * p.block_table_stride;
  const int packs = ceil_div(problem.head_dim, N);
#pragma unroll 1  // more would take more registers than the loads in flight are worth
  for (int i = thread_id(); i < kTileKeys * packs; i += kThreads) {
    const int key = i / packs, d = i % packs * N, position = first + key;
    if (position < used.begin || position >= used.end) continue;
    const int64_t block = table[position / problem.block_size], slot = position % problem.block_size;
    const E* elements = static_cast<const E*>(cache.data) + block * cache.block_stride + slot * cache.slot_stride +
                        kv_head * cache.head_stride;
    const Pack<E, N> x = load_up_to<N>(elements + d, problem.head_dim - d, problem.vectors);
#pragma unroll
    for (int j = 0; j < N; j += 4) {
      Pack<float, 4> quad;
#pragma unroll
      for (int k = 0; k < 4; ++k) quad.at[k] = to_float(x.at[j + k]);
      store<4>(&shared.tile[key][d + j], quad);
    }
    if (kElementMax<E> != 0 && d == 0)
      scales[key] = cache.scale[block * cache.scale_block_stride + slot * cache.scale_slot_stride +
                                kv_head * cache.scale_head_stride];
  }
}

// The products of this lane's key and the warp's rows: one chain over the elements for each.
template <int kDim>
__device__ void dot_products(const Shared<kDim>& shared, int rows, int head_dim, float (&dots)[kWarpRows]) {
  for (int d = 0; d < head_dim; d += 4) {
    const Pack<float, 4> key = load<4>(&shared.tile[lane_id()][d]);
#pragma unroll
    for (int i = 0; i < kWarpRows; ++i) {
      if (warp_id() + i * kWarps >= rows) break;
      const Pack<float, 4> query = load<4>(&shared.query[warp_id() + i * kWarps][d]);
#pragma unroll
      for (int j = 0; j < 4; ++j) dots[i] = fmaf(query.at[j], key.at[j], dots[i]);
    }
  }
}

// From a dot product to a score.
__device__ __forceinline__ float score_of(const AttentionProblem& problem, float dot, int head, float distance) {
  const PagedAttentionParams& p = problem.p;
  float score = dot * p.scale;
  if (p.soft_cap != 0.f) score = p.soft_cap * tanhf(score / p.soft_cap);
  if (p.alibi_slopes) score = fmaf(p.alibi_slopes[head], distance, score);
  return score;
}

// Adds the sink, normalises, and writes out and lse of a row. `sum` is that of all lanes.
template <int kDim>
__device__ void write_row(const PagedAttentionParams& p, int64_t token, int64_t head, float max, float sum,
                          const float (&acc)[kDim / kWarpSize]) {
  float weight = 1.f;
  if (p.sinks) {
    const float sink = p.sinks[head], largest = fmaxf(max, sink), shift = finite_or_zero(largest);
    weight = expf(max - shift);
    sum = sum * weight + expf(sink - shift);
    max = largest;
  }
  weight = sum == 0.f ? 0.f : weight / sum;
  if (p.lse && lane_id() == 0) p.lse[token * p.num_heads + head] = finite_or_zero(max) + logf(sum);
#pragma unroll
  for (int i = 0; i < kDim / kWarpSize; ++i) {
    const int d = lane_id() + i * kWarpSize;
    const int64_t index = token * p.out_stride + head * p.out_head_stride + d;
    if (d < p.head_dim) store_float(p.out, index, sum == 0.f ? 0.f : acc[i] * weight, p.dtype);
  }
}

template <int kDim, class E>
__global__ void __launch_bounds__(kThreads, 3) paged_attention_kernel(AttentionProblem problem) {
  const PagedAttentionParams& p = problem.p;
  Shared<kDim>& shared = dynamic_shared<Shared<kDim>>();
  const Tile tile = find_tile(problem, static_cast<int>(blockIdx.x));
  if (!tile.found) return;
  const Sequence& seq = tile.seq;
  const int kv_head = static_cast<int>(blockIdx.y), split = static_cast<int>(blockIdx.z);
  const int split_keys = problem.split_keys(seq);
  const bool is_split = problem.num_splits(seq) > 1;
  if (split >= problem.num_splits(seq)) return;
  const int rows = smaller(problem.num_rows(seq) - tile.first_row, kTileRows);
  Positions used = problem.visible(seq, tile.first_row, rows);
  used = {larger(used.begin, split * split_keys), smaller(used.end, split * split_keys + split_keys)};

  load_query(problem, tile, rows, kv_head, shared);
  Row<kDim> row[kWarpRows];
  for (int first = used.begin / kTileKeys * kTileKeys; first < used.end; first += kTileKeys) {
    __syncthreads();  // the queries are there; the values of the last tile are done with
    load_tile<kDim, E>(problem, seq, p.key_cache, kv_head, first, used, shared, shared.key_scale);
    __syncthreads();
    const int position = first + lane_id();
    const bool is_used = position >= used.begin && position < used.end;
    float weights[kWarpRows] = {};
    if (is_used) dot_products(shared, rows, problem.head_dim, weights);
    const float key_scale = kElementMax<E> != 0 && is_used ? shared.key_scale[lane_id()] : 1.f;
    __syncthreads();  // the keys are done with
    load_tile<kDim, E>(problem, seq, p.value_cache, kv_head, first, used, shared, shared.value_scale);
    __syncthreads();
    const float value_scale = kElementMax<E> != 0 && is_used ? shared.value_scale[lane_id()] : 1.f;

#pragma unroll
    for (int i = 0; i < kWarpRows; ++i) {
      const int r = warp_id() + i * kWarps;
      if (r >= rows) break;
      const int index = tile.first_row + r, head = kv_head * problem.group + index % problem.group;
      const Positions seen = problem.visible(seq, index);
      const bool is_seen = is_used && position >= seen.begin && position < seen.end;
      const auto distance = static_cast<float>(position - problem.position(seq, index));
      const float score = is_seen ? score_of(problem, weights[i] * key_scale, head, distance) : minus_infinity();
      const float max = fmaxf(row[i].max, warp_max(score)), shift = finite_or_zero(max);
      const float correction = expf(row[i].max - shift), weight = is_seen ? expf(score - shift) : 0.f;
      row[i].max = max;
      row[i].sum = row[i].sum * correction + weight;
#pragma unroll
      for (int e = 0; e < kDim / kWarpSize; ++e) row[i].acc[e] *= correction;
      weights[i] = weight * value_scale;
      const int begin = larger(larger(seen.begin, used.begin) - first, 0);
      const int end = smaller(smaller(seen.end, used.end) - first, kTileKeys);
      for (int key = begin; key < end; ++key) {
        const float w = __shfl_sync(kAllLanes, weights[i], key);
#pragma unroll
        for (int e = 0; e < kDim / kWarpSize; ++e) {
          const int d = lane_id() + e * kWarpSize;
          if (d < problem.head_dim) row[i].acc[e] = fmaf(w, shared.tile[key][d], row[i].acc[e]);
        }
      }
    }
  }

#pragma unroll
  for (int i = 0; i < kWarpRows; ++i) {
    const int r = warp_id() + i * kWarps;
    if (r >= rows) break;
    const int index = tile.first_row + r, token = seq.first_token + index / problem.group;
    const float sum = warp_sum(row[i].sum);
    if (!is_split) {
      write_row<kDim>(p, token, kv_head * problem.group + index % problem.group, row[i].max, sum, row[i].acc);
      continue;
    }
    float* state = problem.partial_state(seq, kv_head, index, split);
    if (lane_id() == 0) {
      state[0] = row[i].max;
      state[1] = sum;
    }
#pragma unroll
    for (int e = 0; e < kDim / kWarpSize; ++e) {
      const int d = lane_id() + e * kWarpSize;
      if (d < problem.head_dim) state[2 + d] = row[i].acc[e];
    }
  }
}

// A warp per (sequence, kv head, row) of those that were split.
template <int kDim>
__global__ void __launch_bounds__(kThreads) merge_splits_kernel(AttentionProblem problem) {
  const PagedAttentionParams& p = problem.p;
  const int num_kv_heads = static_cast<int>(p.num_kv_heads);
  const int warp = static_cast<int>(blockIdx.x) * kWarps + warp_id();
  const int index = warp % problem.split_rows, kv_head = warp / problem.split_rows % num_kv_heads;
  const int s = warp / problem.split_rows / num_kv_heads;
  if (s >= p.num_seqs) return;
  const Sequence seq = problem.sequence(s);
  const int num_splits = problem.num_splits(seq);
  if (index >= problem.num_rows(seq) || num_splits == 1) return;
  Row<kDim> total;
  for (int split = 0; split < num_splits; ++split) {
    const float* state = problem.partial_state(seq, kv_head, index, split);
    const float max = fmaxf(total.max, state[0]), shift = finite_or_zero(max);
    const float a = expf(total.max - shift), b = expf(state[0] - shift);
    total.max = max;
    total.sum = total.sum * a + state[1] * b;
#pragma unroll
    for (int e = 0; e < kDim / kWarpSize; ++e) {
      const int d = lane_id() + e * kWarpSize;
      if (d < problem.head_dim) total.acc[e] = fmaf(state[2 + d], b, total.acc[e] * a);
    }
  }
  write_row<kDim>(p, seq.first_token + index / problem.group, kv_head * problem.group + index % problem.group,
                  total.max, total.sum, total.acc);
}

template <class E>
bool cache_aligned(const KVCacheView& cache) {
  const auto aligned = [&](int64_t stride) {
    return is_aligned(static_cast<const E*>(cache.data), stride, kLoad<E> * sizeof(E));
  };
  return aligned(cache.block_stride) && aligned(cache.slot_stride) && aligned(cache.head_stride);
}

template <int kDim>
struct Dim {};

// Calls body with the smallest size that holds a head.
template <class Body>
Status with_dim(int64_t head_dim, Body body) {
  if (head_dim <= 64) return body(Dim<64>{});
  if (head_dim <= 128) return body(Dim<128>{});
  if (head_dim <= 256) return body(Dim<256>{});
  return body(Dim<512>{});
}

template <int kDim, class E>
Status run(AttentionProblem problem, void* stream) {
  const PagedAttentionParams& p = problem.p;
  problem.vectors = cache_aligned<E>(p.key_cache) && cache_aligned<E>(p.value_cache);
  // Every sequence has one tile that is not full, at the most.
  const int64_t tiles = p.query_start_loc ? p.num_tokens * problem.group / kTileRows + p.num_seqs
                                          : p.num_seqs * ceil_div<int64_t>(problem.group, kTileRows);
  const dim3 grid = {static_cast<unsigned>(tiles), static_cast<unsigned>(p.num_kv_heads),
                     static_cast<unsigned>(problem.max_splits)};
  const Status status = launch("paged_attention", grid, dim3{kThreads}, {sizeof(Shared<kDim>)}, stream,
                               paged_attention_kernel<kDim, E>, problem);
  if (status || problem.max_splits == 1) return status;
  const auto blocks =
      static_cast<unsigned>(ceil_div<int64_t>(p.num_seqs * p.num_kv_heads * problem.split_rows, kWarps));
  return launch("merge_splits", dim3{blocks}, dim3{kThreads}, {}, stream, merge_splits_kernel<kDim>, problem);
}

}  // namespace

int64_t paged_attention_workspace(const PagedAttentionParams& p, int64_t max_keys) {
  const int64_t splits = max_splits(max_keys);
  if (splits == 1) return 0;
  return p.num_seqs * p.num_kv_heads * split_rows(p) * splits * (p.head_dim + 2) * static_cast<int64_t>(sizeof(float));
}

Status paged_attention(const PagedAttentionParams& p, int64_t max_keys, void* workspace, void* stream) {
  if (p.num_tokens == 0 || p.num_seqs == 0) return nullptr;
  use_workspace(workspace, paged_attention_workspace(p, max_keys));
  const AttentionProblem problem = {
      .p = p,
      .workspace = static_cast<float*>(workspace),
      .group = static_cast<int>(p.num_heads / p.num_kv_heads),
      .split_rows = split_rows(p),
      .max_splits = max_splits(max_keys),
      .block_size = static_cast<int>(p.block_size),
      .head_dim = static_cast<int>(p.head_dim),
      .vectors = false,
  };
  return with_dim(p.head_dim, [&]<int kDim>(Dim<kDim>) {
    return with_cache_type(p.cache_dtype, [&]<class E>(Type<E>) { return run<kDim, E>(problem, stream); });
  });
}

}  // namespace teco::cuda

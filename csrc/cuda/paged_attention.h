// Who does what in attention, and what a query row sees. All of it follows from a sequence's own lengths, so bits do not
// depend on the batch.
#pragma once

#include "cuda/attention_state.h"

namespace teco::cuda {

constexpr int kTileRows = 16;     // query rows (token, head of a group) that a block walks over keys together
constexpr int kTileKeys = 32;     // keys that share one update of the running maximum: a lane for each
constexpr int kChunkKeys = 256;   // splits are of so many keys or a multiple
constexpr int kMaxSplits = 32;

struct Positions {
  int64_t begin, end;
};

struct Sequence {
  int64_t index, first_token, query_len, seq_len;
};

// The call, and what follows from it.
struct AttentionProblem {
  PagedAttentionParams p;
  float* workspace;
  int64_t group;       // query heads per kv head
  int64_t split_rows;  // sequences with so many query rows per kv head, or fewer, have their keys split among blocks
  int64_t max_splits;  // of any sequence
  bool vectors;        // elements of the caches can be loaded 16 bytes at a time

  __device__ Sequence sequence(int64_t s) const {
    const int64_t first = p.query_start_loc ? p.query_start_loc[s] : s;
    const int64_t end = p.query_start_loc ? p.query_start_loc[s + 1] : s + 1;
    return {s, first, end - first, p.seq_lens[s]};
  }
  __device__ int64_t num_rows(const Sequence& seq) const { return seq.query_len * group; }
  __device__ int64_t position(const Sequence& seq, int64_t row) const {
    return seq.seq_len - seq.query_len + row / group;
  }
  // Keys that a row sees.
  __device__ Positions visible(const Sequence& seq, int64_t row) const {
    const int64_t own = position(seq, row);
    int64_t begin = 0, end = p.causal ? smaller(own + 1, seq.seq_len) : seq.seq_len;
    if (p.sliding_window) {
      begin = larger<int64_t>(begin, own - p.sliding_window + 1);
      end = smaller(end, own + p.sliding_window);
    }
    return {begin, larger(begin, end)};
  }
  // Keys that any row of a tile sees: begin and end both grow with the row.
  __device__ Positions visible(const Sequence& seq, int64_t first_row, int64_t rows) const {
    return {visible(seq, first_row).begin, visible(seq, first_row + rows - 1).end};
  }
  __device__ int64_t split_keys(const Sequence& seq) const {
    if (num_rows(seq) > split_rows) return larger<int64_t>(seq.seq_len, 1);
    return ceil_div(ceil_div<int64_t>(seq.seq_len, kChunkKeys), static_cast<int64_t>(kMaxSplits)) * kChunkKeys;
  }
  __device__ int64_t num_splits(const Sequence& seq) const {
    return seq.seq_len ? ceil_div(seq.seq_len, split_keys(seq)) : 1;
  }
  // Where the state of a row over a split is kept: maximum, sum, and head_dim sums of values.
  __device__ float* partial_state(const Sequence& seq, int64_t kv_head, int64_t row, int64_t split) const {
    const int64_t place = ((seq.index * p.num_kv_heads + kv_head) * split_rows + row) * max_splits + split;
    return workspace + place * (p.head_dim + 2);
  }
};

// Splits of a call whose longest sequence may have so many keys.
inline int64_t max_splits(int64_t max_keys) {
  return larger<int64_t>(smaller<int64_t>(ceil_div<int64_t>(max_keys, kChunkKeys), kMaxSplits), 1);
}

inline int64_t split_rows(const PagedAttentionParams& p) {
  return larger<int64_t>(p.num_heads / p.num_kv_heads, kTileRows);
}

// The sequence that tile number `tile` of the call is of, and its first row. Sequences have their tiles one after the
// other; a warp counts 32 of them at a time. All lanes get the same. `found` is false behind the last tile.
struct Tile {
  bool found;
  Sequence seq;
  int64_t first_row;
};
__device__ __forceinline__ Tile find_tile(const AttentionProblem& problem, int64_t tile) {
  for (int64_t first = 0; first < problem.p.num_seqs; first += kWarpSize) {
    const int64_t s = first + lane_id();
    const int64_t own =
        s < problem.p.num_seqs ? ceil_div<int64_t>(problem.num_rows(problem.sequence(s)), kTileRows) : 0;
    int64_t end = own;
    for (int distance = 1; distance < kWarpSize; distance *= 2) {
      const int64_t before = __shfl_up_sync(kAllLanes, end, distance);
      if (lane_id() >= distance) end += before;
    }
    const unsigned behind = __ballot_sync(kAllLanes, tile < end);
    if (behind) {
      const int lane = ptx::lowest_bit(behind);
      const int64_t begin = __shfl_sync(kAllLanes, end - own, lane);
      return {true, problem.sequence(first + lane), (tile - begin) * kTileRows};
    }
    tile -= __shfl_sync(kAllLanes, end, kWarpSize - 1);
  }
  return {false, {}, 0};
}

}  // namespace teco::cuda

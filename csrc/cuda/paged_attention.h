// Who does what in attention, and what a query row sees. All of it follows from a sequence's own lengths, so bits do
// not depend on the batch.
#pragma once

#include "cuda/attention_state.h"

namespace teco::cuda {

constexpr int kTileRows = 16;    // query rows (token, head of a group) that a block walks over keys together
constexpr int kTileKeys = 32;    // keys that share one update of the running maximum: a lane for each
constexpr int kChunkKeys = 256;  // splits are of so many keys or a multiple
constexpr int kMaxSplits = 32;

// Positions and rows are 32-bit integers, as lengths of sequences are: 64-bit divisions are slow. The operator layer
// admits 2^30 rows at the most.
struct Positions {
  int begin, end;
};

struct Sequence {
  int index, first_token, query_len, seq_len;
};

// The call, and what follows from it.
struct AttentionProblem {
  PagedAttentionParams p;
  float* workspace;
  int group;       // query heads per kv head
  int split_rows;  // sequences with so many query rows per kv head, or fewer, have their keys split among blocks
  int max_splits;  // of any sequence
  int block_size, head_dim;
  bool vectors;  // the caches are aligned to the largest loads

  __device__ Sequence sequence(int s) const {
    const int first = p.query_start_loc ? p.query_start_loc[s] : s;
    const int end = p.query_start_loc ? p.query_start_loc[s + 1] : s + 1;
    return {s, first, end - first, p.seq_lens[s]};
  }
  __device__ int num_rows(const Sequence& seq) const { return seq.query_len * group; }
  __device__ int position(const Sequence& seq, int row) const { return seq.seq_len - seq.query_len + row / group; }
  // Keys that a row sees.
  __device__ Positions visible(const Sequence& seq, int row) const {
    const int own = position(seq, row), window = static_cast<int>(p.sliding_window);
    int begin = 0, end = p.causal ? smaller(own + 1, seq.seq_len) : seq.seq_len;
    if (window) {
      begin = larger(begin, own - window + 1);
      if (end - own > window) end = own + window;
    }
    return {begin, larger(begin, end)};
  }
  // Keys that any row of a tile sees: begin and end both grow with the row.
  __device__ Positions visible(const Sequence& seq, int first_row, int rows) const {
    return {visible(seq, first_row).begin, visible(seq, first_row + rows - 1).end};
  }
  __device__ int split_keys(const Sequence& seq) const {
    if (num_rows(seq) > split_rows) return larger(seq.seq_len, 1);
    return ceil_div(ceil_div(seq.seq_len, kChunkKeys), kMaxSplits) * kChunkKeys;
  }
  __device__ int num_splits(const Sequence& seq) const {
    return seq.seq_len ? ceil_div(seq.seq_len, split_keys(seq)) : 1;
  }
  // Where the state of a row over a split is kept: maximum, sum, and head_dim sums of values.
  __device__ float* partial_state(const Sequence& seq, int kv_head, int row, int split) const {
    const int64_t place = ((seq.index * p.num_kv_heads + kv_head) * split_rows + row) * max_splits + split;
    return workspace + place * (head_dim + 2);
  }
};

// Splits of a call whose longest sequence may have so many keys.
inline int max_splits(int64_t max_keys) {
  const int64_t splits = smaller<int64_t>(ceil_div<int64_t>(max_keys, kChunkKeys), kMaxSplits);
  return static_cast<int>(larger<int64_t>(splits, 1));
}

// Query rows per kv head of the sequences whose keys are split: those of a token, or of a tile.
inline int split_rows(const PagedAttentionParams& p) {
  const int group = static_cast<int>(p.num_heads / p.num_kv_heads);
  return p.query_start_loc ? larger(group, kTileRows) : group;
}

// The sequence that tile number `tile` of the call is of, and its first row. Sequences have their tiles one after the
// other; where they have different numbers of them, a warp counts 32 sequences at a time. All lanes get the same.
// `found` is false behind the last tile.
struct Tile {
  bool found;
  Sequence seq;
  int first_row;
};
__device__ __forceinline__ Tile find_tile(const AttentionProblem& problem, int tile) {
  if (!problem.p.query_start_loc) {
    const int tiles = ceil_div(problem.group, kTileRows);
    return {true, problem.sequence(tile / tiles), tile % tiles * kTileRows};
  }
  for (int first = 0; first < problem.p.num_seqs; first += kWarpSize) {
    const int s = first + lane_id();
    const int own = s < problem.p.num_seqs ? ceil_div(problem.num_rows(problem.sequence(s)), kTileRows) : 0;
    int end = own;
    for (int distance = 1; distance < kWarpSize; distance *= 2) {
      const int before = __shfl_up_sync(kAllLanes, end, distance);
      if (lane_id() >= distance) end += before;
    }
    const unsigned behind = __ballot_sync(kAllLanes, tile < end);
    if (behind) {
      const int lane = ptx::lowest_bit(behind);
      const int begin = __shfl_sync(kAllLanes, end - own, lane);
      return {true, problem.sequence(first + lane), (tile - begin) * kTileRows};
    }
    tile -= __shfl_sync(kAllLanes, end, kWarpSize - 1);
  }
  return {false, {}, 0};
}

}  // namespace teco::cuda

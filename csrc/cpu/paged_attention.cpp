// Attention over a paged KV cache, for prefill, chunks of it, verification and decode alike.
//
// Each query row (token, head) follows one order of operations, fixed by the positions of its own keys. Chunks of 256
// keys at absolute positions are attended to one by one and merged in order; within a chunk, blocks of 64 keys share
// one update of the running maximum; see paged_attention_tiles.h and paged_attention_softmax.h for the rest. All that
// varies is who does what: rows of one kv head that share keys are walked together, and the chunks of one long sequence
// may be dealt out to threads.
//
// Few rows (decode): bound by reading keys and values. All heads of a group use an element while it is in a register,
// the next elements are prefetched, as a head's slots lie far apart. Many rows (prefill): bound by fma throughput; a
// block of keys and values is unpacked to fp32 into scratch memory once and used by all rows of the unit.
#include "cpu/kv_element.h"
#include "cpu/paged_attention_softmax.h"
#include "cpu/paged_attention_tiles.h"

namespace teco::cpu::TECO_ISA {
namespace {

constexpr int64_t kChunkKeys = 256;
constexpr int64_t kBlockKeys = 64;
constexpr int64_t kGroupKeys = 16;          // keys and values of a group stay in L1 while the rows pass by
constexpr int64_t kUnitFloats = 12 * 1024;  // of query rows walked together: with sums and scores, half of L2
constexpr int64_t kMinUnitRows = 12;        // a unit is not cut below this to make more of them
constexpr int64_t kMaxSplitRows = 16;       // chunks of a unit with more rows are not dealt out
constexpr int64_t kItemsPerThread = 4;

// Rows of one sequence that are walked together, numbered token by token, the heads of a group side by side.
struct Unit {
  int64_t seq, first_row, num_rows;
  int64_t key_begin, key_end;  // positions that any of the rows sees
  int64_t first_item;          // work items of a kv head that come before
  int64_t partial;             // where its states per kv head and chunk begin; -1: not split

  int64_t first_chunk() const { return key_begin / kChunkKeys; }
  int64_t num_chunks() const { return key_end > key_begin ? ceil_div(key_end, kChunkKeys) - first_chunk() : 0; }
};

struct Positions {
  int64_t begin, end;
};

struct Sequence {
  int64_t first_token, query_len, seq_len;
};

// What all functions below share.
struct Problem {
  const PagedAttentionParams& p;
  int64_t group;   // query heads per kv head
  int64_t padded;  // head_dim, rounded up to whole vectors

  Sequence sequence(int64_t s) const {
    const int64_t first = p.query_start_loc ? p.query_start_loc[s] : s;
    const int64_t end = p.query_start_loc ? p.query_start_loc[s + 1] : s + 1;
    return {first, end - first, p.seq_lens[s]};
  }
  int64_t position(const Sequence& seq, int64_t row) const { return seq.seq_len - seq.query_len + row / group; }
  // Keys that a row sees.
  Positions visible(const Sequence& seq, int64_t row) const {
    const int64_t own = position(seq, row);
    int64_t begin = 0, end = p.causal ? min(own + 1, seq.seq_len) : seq.seq_len;
    if (p.sliding_window) {
      begin = max<int64_t>(begin, own - p.sliding_window + 1);
      end = min(end, own + p.sliding_window);
    }
    return {begin, max(begin, end)};
  }
  int64_t state_floats(const Unit& unit) const { return unit.num_rows * (padded + 2); }
};

// Cuts every sequence into units of at most `limit` rows; returns how many. units may be null.
int64_t make_units(const Problem& problem, int64_t limit, Unit* units) {
  int64_t count = 0;
  for (int64_t s = 0; s < problem.p.num_seqs; ++s) {
    const Sequence seq = problem.sequence(s);
    const int64_t num_rows = seq.query_len * problem.group;
    if (!units) {
      count += ceil_div(num_rows, limit);
      continue;
    }
    for (int64_t row = 0; row < num_rows; row += limit) {
      const int64_t rows = min(limit, num_rows - row);
      units[count++] = {s, row, rows, problem.visible(seq, row).begin, problem.visible(seq, row + rows - 1).end, 0, -1};
    }
  }
  return count;
}

// Bytes read, roughly, with arithmetic counted as the bytes that could be read meanwhile.
int64_t cost(const Problem& problem, const Unit& unit) {
  return (unit.key_end - unit.key_begin + kGroupKeys) * problem.padded * (4 + unit.num_rows);
}

// Where the work memory of a task lies.
struct Workspace {
  float *query, *acc, *total, *scores, *keys, *values;
  RunningSoftmax* running;
  AttentionState *chunk, *sum;
  KeyRange* ranges;
};

template <class T>
T* carve(char*& memory, int64_t count) {
  T* result = reinterpret_cast<T*>(memory);
  memory += ceil_div<int64_t>(count * sizeof(T), 64) * 64;
  return result;
}

Workspace make_workspace(int64_t rows, int64_t padded) {
  const int64_t floats = rows * (3 * padded + kBlockKeys) + 2 * kBlockKeys * padded;
  const int64_t per_row = sizeof(RunningSoftmax) + 2 * sizeof(AttentionState) + sizeof(KeyRange);
  char* memory = static_cast<char*>(thread_scratch(Scratch::kTask, floats * sizeof(float) + rows * per_row + 10 * 64));
  Workspace w;
  w.query = carve<float>(memory, rows * padded);
  w.acc = carve<float>(memory, rows * padded);
  w.total = carve<float>(memory, rows * padded);
  w.scores = carve<float>(memory, rows * kBlockKeys);
  w.keys = carve<float>(memory, kBlockKeys * padded);
  w.values = carve<float>(memory, kBlockKeys * padded);
  w.running = carve<RunningSoftmax>(memory, rows);
  w.chunk = carve<AttentionState>(memory, rows);
  w.sum = carve<AttentionState>(memory, rows);
  w.ranges = carve<KeyRange>(memory, rows);
  return w;
}

void clear_states(AttentionState* states, float* acc, int64_t rows, int64_t size) {
  __builtin_memset(acc, 0, rows * size * sizeof(float));
  for (int64_t r = 0; r < rows; ++r) states[r] = {-kInfinity, 0.f, acc + r * size};
}

void load_query(const Problem& problem, const Unit& unit, int64_t kv_head, float* rows) {
  const PagedAttentionParams& p = problem.p;
  const Sequence seq = problem.sequence(unit.seq);
  with_float_type(p.dtype, [&]<class T>(Type<T>) {
    for (int64_t r = 0; r < unit.num_rows; ++r) {
      const int64_t row = unit.first_row + r, token = seq.first_token + row / problem.group;
      const int64_t head = kv_head * problem.group + row % problem.group;
      const T* query = static_cast<const T*>(p.query) + token * p.query_stride + head * p.query_head_stride;
      float* target = rows + r * problem.padded;
      for (int64_t d = 0; d < p.head_dim; d += kLanes) store(target + d, load_up_to(query + d, p.head_dim - d));
    }
  });
}

// Adds the sink, normalises, and writes out and lse of row r of the unit.
void write_row(const Problem& problem, const Unit& unit, int64_t kv_head, int64_t r, const AttentionState& state) {
  const PagedAttentionParams& p = problem.p;
  const int64_t row = unit.first_row + r, token = problem.sequence(unit.seq).first_token + row / problem.group;
  const int64_t head = kv_head * problem.group + row % problem.group;
  float largest = state.max, sum = state.sum, weight = 1.f;
  if (p.sinks) {
    largest = max(largest, p.sinks[head]);
    const float shift = finite_or_zero(largest);
    weight = exp_one(state.max - shift);
    sum = sum * weight + exp_one(p.sinks[head] - shift);
  }
  weight = sum == 0.f ? 0.f : weight / sum;
  if (p.lse) p.lse[token * p.num_heads + head] = finite_or_zero(largest) + log_one(sum);
  with_float_type(p.dtype, [&]<class T>(Type<T>) {
    T* out = static_cast<T*>(p.out) + token * p.out_stride + head * p.out_head_stride;
    for (int64_t d = 0; d < p.head_dim; d += kLanes) {
      const F32x8 x = sum == 0.f ? splat(0.f) : load(state.acc + d) * splat(weight);
      store_up_to(out + d, x, p.head_dim - d);
    }
  });
}

// The block of keys at positions [first, first + 64), of which [begin, end) are used: where they lie. The places up to
// the next multiple of 8 repeat a used key, so that whole vectors of scores can be computed.
template <class C>
struct KeyBlock {
  const C* keys[kBlockKeys];
  const C* values[kBlockKeys];
  float key_scales[kBlockKeys], value_scales[kBlockKeys];
  int64_t first;
  int32_t begin, end;
  int32_t padded_begin() const { return begin / kLanes * kLanes; }
  int32_t padded_end() const { return ceil_div(end, kLanes) * kLanes; }
};

// Keys or values [begin, end) of a run of slots of one block.
template <class C>
void find_slots(const KVCacheView& cache, int64_t id, int64_t slot, int64_t kv_head, int32_t begin, int32_t end,
                const C** rows, float* scales) {
  const C* row = static_cast<const C*>(cache.data) + id * cache.block_stride + slot * cache.slot_stride +
                 kv_head * cache.head_stride;
  for (int32_t j = begin; j < end; ++j, row += cache.slot_stride) rows[j] = row;
  if (!cache.scale) return;
  const float* scale =
      cache.scale + id * cache.scale_block_stride + slot * cache.scale_slot_stride + kv_head * cache.scale_head_stride;
  for (int32_t j = begin; j < end; ++j, scale += cache.scale_slot_stride) scales[j] = *scale;
}

template <class C>
void find_block(const Problem& problem, const Unit& unit, int64_t kv_head, int64_t first, KeyBlock<C>& block) {
  const PagedAttentionParams& p = problem.p;
  const int32_t* table = p.block_table + unit.seq * p.block_table_stride;
  block.first = first;
  block.begin = static_cast<int32_t>(max<int64_t>(unit.key_begin - first, 0));
  block.end = static_cast<int32_t>(min(unit.key_end - first, kBlockKeys));
  for (int32_t j = block.begin; j < block.end;) {
    const int64_t id = table[(first + j) / p.block_size], slot = (first + j) % p.block_size;
    const auto end = static_cast<int32_t>(min<int64_t>(block.end, j + p.block_size - slot));
    find_slots(p.key_cache, id, slot, kv_head, j, end, block.keys, block.key_scales);
    find_slots(p.value_cache, id, slot, kv_head, j, end, block.values, block.value_scales);
    j = end;
  }
  for (int32_t j = block.padded_begin(); j < block.padded_end(); ++j) {
    if (j >= block.begin && j < block.end) continue;
    block.keys[j] = block.keys[j < block.begin ? block.begin : block.end - 1];
    block.key_scales[j] = block.value_scales[j] = 1.f;
  }
}

template <class C>
inline void prefetch_rows(const C* const* rows, int32_t begin, int32_t end, int64_t head_dim) {
  constexpr int64_t line = 64 / sizeof(C);
  for (int32_t j = begin; j < end; ++j)
    for (int64_t d = 0; d < head_dim; d += line) __builtin_prefetch(rows[j] + d, 0, 2);
}

// Rows as fp32, padded with zeros; fills in where they lie.
template <class C>
void unpack_rows(const C* const* rows, int32_t begin, int32_t end, int64_t head_dim, int64_t padded, float* out,
                 const float** out_rows) {
  for (int32_t j = begin; j < end; ++j) {
    float* target = out + j * padded;
    out_rows[j] = target;
    for (int64_t d = 0; d < head_dim; d += kLanes) store(target + d, load_up_to(rows[j] + d, head_dim - d));
  }
}

template <class E>
void score_block(const Problem& problem, const Unit& unit, const E* const* keys, int32_t begin, int32_t end,
                 const Workspace& w) {
  score_rows(w.query, unit.num_rows, problem.padded, keys + begin, end - begin, w.scores + begin, kBlockKeys);
}
template <class E>
void value_block(const Problem& problem, const Unit& unit, const E* const* values, int32_t begin, int32_t end,
                 float* acc, const Workspace& w) {
  value_rows(w.scores, kBlockKeys, w.ranges, unit.num_rows, values, begin, end, acc, problem.padded);
}

// Weights of the block's keys for every row, from the dot products; rescales what the rows have accumulated.
template <class C>
void softmax_block(const Problem& problem, const Unit& unit, int64_t kv_head, const KeyBlock<C>& block, float* acc,
                   const Workspace& w) {
  const PagedAttentionParams& p = problem.p;
  const Sequence seq = problem.sequence(unit.seq);
  const float inverse_cap = p.soft_cap != 0.f ? 1.f / p.soft_cap : 0.f;
  for (int64_t r = 0; r < unit.num_rows; ++r) {
    const Positions seen = problem.visible(seq, unit.first_row + r);
    const auto begin = static_cast<int32_t>(min(max<int64_t>(seen.begin - block.first, 0), kBlockKeys));
    const auto end = static_cast<int32_t>(max<int64_t>(min(seen.end - block.first, kBlockKeys), begin));
    w.ranges[r] = {begin, end};
    if (begin == end) continue;
    const int64_t row = unit.first_row + r;
    const RowScores scores = {
        .scale = p.scale,
        .soft_cap = p.soft_cap,
        .inverse_cap = inverse_cap,
        .slope = p.alibi_slopes ? p.alibi_slopes[kv_head * problem.group + row % problem.group] : 0.f,
        .first_distance = static_cast<float>(block.first - problem.position(seq, row)),
        .begin = begin,
        .end = end,
    };
    const float correction =
        softmax_row(scores, w.scores + r * kBlockKeys, p.key_cache.scale ? block.key_scales : nullptr,
                    p.value_cache.scale ? block.value_scales : nullptr, w.running[r]);
    if (correction != 1.f) {
      float* row_acc = acc + r * problem.padded;
      for (int64_t d = 0; d < problem.padded; d += kLanes) store(row_acc + d, load(row_acc + d) * splat(correction));
    }
  }
}

// Attention of the unit's rows over one chunk of keys, into states[row].
template <class C>
void attend_chunk(const Problem& problem, const Unit& unit, int64_t kv_head, int64_t chunk, AttentionState* states,
                  float* acc, const Workspace& w) {
  const int64_t head_dim = problem.p.head_dim, padded = problem.padded;
  const bool unpack = unit.num_rows > kMaxTileRows || head_dim != padded;
  const int64_t end = min(unit.key_end, (chunk + 1) * kChunkKeys);
  int64_t first = max(unit.key_begin, chunk * kChunkKeys) / kBlockKeys * kBlockKeys;
  clear_states(states, acc, unit.num_rows, padded);
  for (int64_t r = 0; r < unit.num_rows; ++r) w.running[r] = {-kInfinity, splat(0.f)};

  KeyBlock<C> blocks[2];
  KeyBlock<C>*block = &blocks[0], *next = &blocks[1];
  find_block(problem, unit, kv_head, first, *block);
  for (; first < end; first += kBlockKeys) {
    const int32_t padded_begin = block->padded_begin(), padded_end = block->padded_end();
    const bool last = first + kBlockKeys >= end;
    if (!last) find_block(problem, unit, kv_head, first + kBlockKeys, *next);
    const float *keys[kBlockKeys], *values[kBlockKeys];
    if (unpack) {
      unpack_rows(block->keys, padded_begin, padded_end, head_dim, padded, w.keys, keys);
      unpack_rows(block->values, block->begin, block->end, head_dim, padded, w.values, values);
    }
    for (int32_t j = padded_begin; j < padded_end; j += kGroupKeys) {
      const int32_t group_end = min<int32_t>(j + kGroupKeys, padded_end);
      if (unpack) {
        score_block(problem, unit, keys, j, group_end, w);
      } else {
        prefetch_rows(block->values, max(j, block->begin), min(group_end, block->end), head_dim);
        score_block(problem, unit, block->keys, j, group_end, w);
      }
    }
    softmax_block(problem, unit, kv_head, *block, acc, w);
    for (int32_t j = block->begin; j < block->end; j += kGroupKeys) {
      const int32_t group_end = min<int32_t>(j + kGroupKeys, block->end);
      if (unpack) {
        value_block(problem, unit, values, j, group_end, acc, w);
      } else {
        if (!last) prefetch_rows(next->keys, max(j, next->begin), min(group_end, next->end), head_dim);
        value_block(problem, unit, block->values, j, group_end, acc, w);
      }
    }
    KeyBlock<C>* done = block;
    block = next;
    next = done;
  }
  for (int64_t r = 0; r < unit.num_rows; ++r) {
    states[r].max = w.running[r].max;
    states[r].sum = reduce_add(w.running[r].sum);
  }
}

// Merges the states of one chunk into the sums, for the rows that see a key of it.
void merge_chunk(const Problem& problem, const Unit& unit, int64_t chunk, const AttentionState* states,
                 AttentionState* sums) {
  const Sequence seq = problem.sequence(unit.seq);
  for (int64_t r = 0; r < unit.num_rows; ++r) {
    const Positions seen = problem.visible(seq, unit.first_row + r);
    if (max(seen.begin, chunk * kChunkKeys) < min(seen.end, (chunk + 1) * kChunkKeys))
      merge_state(sums[r], states[r], problem.padded);
  }
}

void write_rows(const Problem& problem, const Unit& unit, int64_t kv_head, const AttentionState* sums) {
  for (int64_t r = 0; r < unit.num_rows; ++r) write_row(problem, unit, kv_head, r, sums[r]);
}

// The units of a call, cut into work items: (kv head, unit), or (kv head, unit, chunk) where few items would otherwise
// leave threads idle. That choice changes no bits: chunks are merged in order either way.
struct Plan {
  Unit* units;
  float* partials;  // states of split units
  int64_t num_units, max_rows;
  int64_t items_per_head, cost_per_head, partial_floats;

  const Unit& unit_of(int64_t item) const {
    int64_t begin = 0, end = num_units;
    while (end - begin > 1) {
      const int64_t middle = (begin + end) / 2;
      (units[middle].first_item <= item ? begin : end) = middle;
    }
    return units[begin];
  }
};

void split_units(const Problem& problem, int num_threads, Plan& plan) {
  const int64_t num_kv_heads = problem.p.num_kv_heads;
  plan.items_per_head = plan.cost_per_head = plan.partial_floats = plan.max_rows = 0;
  for (int64_t u = 0; u < plan.num_units; ++u) plan.cost_per_head += cost(problem, plan.units[u]);
  for (int64_t u = 0; u < plan.num_units; ++u) {
    Unit& unit = plan.units[u];
    unit.first_item = plan.items_per_head;
    const bool large = cost(problem, unit) * kItemsPerThread * num_threads > plan.cost_per_head * num_kv_heads;
    if (num_threads > 1 && large && unit.num_rows <= kMaxSplitRows && unit.num_chunks() > 1) {
      unit.partial = plan.partial_floats;
      plan.partial_floats += num_kv_heads * unit.num_chunks() * problem.state_floats(unit);
      plan.items_per_head += unit.num_chunks();
    } else {
      plan.items_per_head += 1;
    }
    plan.max_rows = max(plan.max_rows, unit.num_rows);
  }
}

Plan make_plan(const Problem& problem, int num_threads) {
  const int64_t wanted = kItemsPerThread * num_threads;
  int64_t limit = max(kUnitFloats / problem.padded / kMinUnitRows, int64_t{1}) * kMinUnitRows;
  while (limit / 2 >= kMinUnitRows && make_units(problem, limit, nullptr) * problem.p.num_kv_heads < wanted) limit /= 2;

  Plan plan = {};
  plan.num_units = make_units(problem, limit, nullptr);
  const int64_t unit_bytes = ceil_div<int64_t>(plan.num_units * sizeof(Unit), 64) * 64;
  for (int64_t partial_floats = 0;;) {  // a second time when there turns out to be something to split
    char* memory = static_cast<char*>(thread_scratch(Scratch::kShared, unit_bytes + partial_floats * sizeof(float)));
    plan.units = reinterpret_cast<Unit*>(memory);
    plan.partials = reinterpret_cast<float*>(memory + unit_bytes);
    make_units(problem, limit, plan.units);
    split_units(problem, num_threads, plan);
    if (plan.partial_floats <= partial_floats) return plan;
    partial_floats = plan.partial_floats;
  }
}

// The states of a split unit over one of its chunks; where they are kept.
void partial_states(const Problem& problem, const Plan& plan, const Unit& unit, int64_t kv_head, int64_t index,
                    float** max_and_sum, float** acc) {
  float* memory = plan.partials + unit.partial + (kv_head * unit.num_chunks() + index) * problem.state_floats(unit);
  *max_and_sum = memory;
  *acc = memory + 2 * unit.num_rows;
}

template <class C>
void attend_item(const Problem& problem, const Plan& plan, int64_t item, const Workspace& w) {
  const int64_t kv_head = item / plan.items_per_head, index = item % plan.items_per_head;
  const Unit& unit = plan.unit_of(index);
  load_query(problem, unit, kv_head, w.query);
  if (unit.partial >= 0) {
    const int64_t c = index - unit.first_item;
    float *max_and_sum, *acc;
    partial_states(problem, plan, unit, kv_head, c, &max_and_sum, &acc);
    attend_chunk<C>(problem, unit, kv_head, unit.first_chunk() + c, w.chunk, acc, w);
    for (int64_t r = 0; r < unit.num_rows; ++r) {
      max_and_sum[2 * r] = w.chunk[r].max;
      max_and_sum[2 * r + 1] = w.chunk[r].sum;
    }
    return;
  }
  clear_states(w.sum, w.total, unit.num_rows, problem.padded);
  for (int64_t c = unit.first_chunk(); c < unit.first_chunk() + unit.num_chunks(); ++c) {
    attend_chunk<C>(problem, unit, kv_head, c, w.chunk, w.acc, w);
    merge_chunk(problem, unit, c, w.chunk, w.sum);
  }
  write_rows(problem, unit, kv_head, w.sum);
}

void merge_split_unit(const Problem& problem, const Plan& plan, const Unit& unit, int64_t kv_head, const Workspace& w) {
  clear_states(w.sum, w.total, unit.num_rows, problem.padded);
  for (int64_t c = 0; c < unit.num_chunks(); ++c) {
    float *max_and_sum, *acc;
    partial_states(problem, plan, unit, kv_head, c, &max_and_sum, &acc);
    for (int64_t r = 0; r < unit.num_rows; ++r)
      w.chunk[r] = {max_and_sum[2 * r], max_and_sum[2 * r + 1], acc + r * problem.padded};
    merge_chunk(problem, unit, unit.first_chunk() + c, w.chunk, w.sum);
  }
  write_rows(problem, unit, kv_head, w.sum);
}

}  // namespace

void paged_attention(const PagedAttentionParams& p, int num_threads) {
  const Problem problem = {p, p.num_heads / p.num_kv_heads, ceil_div<int64_t>(p.head_dim, kLanes) * kLanes};
  const Plan plan = make_plan(problem, num_threads);
  if (plan.num_units == 0) return;
  const int64_t num_items = plan.items_per_head * p.num_kv_heads;
  const int64_t grain = ceil_div(kMinTaskBytes * plan.items_per_head, plan.cost_per_head);
  with_cache_type(p.cache_dtype, [&]<class C>(Type<C>) {
    parallel_for(num_items, grain, num_threads, [&](int64_t begin, int64_t end) {
      const Workspace w = make_workspace(plan.max_rows, problem.padded);
      for (int64_t item = begin; item < end; ++item) attend_item<C>(problem, plan, item, w);
    });
  });
  if (plan.partial_floats == 0) return;
  const int64_t merge_grain =
      ceil_div<int64_t>(kMinTaskBytes * plan.num_units * p.num_kv_heads, plan.partial_floats * sizeof(float));
  parallel_for(plan.num_units * p.num_kv_heads, merge_grain, num_threads, [&](int64_t begin, int64_t end) {
    const Workspace w = make_workspace(plan.max_rows, problem.padded);
    for (int64_t i = begin; i < end; ++i)
      if (const Unit& unit = plan.units[i % plan.num_units]; unit.partial >= 0)
        merge_split_unit(problem, plan, unit, i / plan.num_units, w);
  });
}

}  // namespace teco::cpu::TECO_ISA

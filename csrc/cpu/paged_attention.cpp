// Attention over a paged KV cache, for prefill, chunks of it, verification and decode alike.
//
// Each query row (token, head) follows one order of operations, fixed by the positions of its own keys. Chunks of 256
// keys at absolute positions are attended to one by one and merged in order; within a chunk, blocks of 64 keys share
// one update of the running maximum; see paged_attention_tiles.h and paged_attention_softmax.h for the rest. All that
// varies is who does what: rows of one kv head that share keys are walked together, and the chunks of one long sequence
// may be dealt out to threads.
//
// Few rows (decode, verification): bound by reading keys and values. All heads of a group use an element while it is in
// a register; what comes next is prefetched, as a head's slots lie far apart. Many rows (prefill): bound by fma
// throughput; a block of keys and values is unpacked to fp32 into scratch memory once and used by all rows of the unit.
#include "cpu/kv_element.h"
#include "cpu/paged_attention_plan.h"
#include "cpu/paged_attention_softmax.h"
#include "cpu/paged_attention_unpacked.h"

namespace teco::cpu::TECO_ISA {
namespace {

constexpr int64_t kSliceRows = 12;    // rows that pass by between two prefetches
constexpr int64_t kInPlaceRows = 12;  // so few rows use keys and values where they lie

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
  const int64_t floats = rows * (3 * padded + kBlockKeys) + kBlockKeys * (2 * padded + kLanes);
  const int64_t per_row = sizeof(RunningSoftmax) + 2 * sizeof(AttentionState) + sizeof(KeyRange);
  char* memory = static_cast<char*>(thread_scratch(Scratch::kTask, floats * sizeof(float) + rows * per_row + 10 * 64));
  Workspace w;
  w.query = carve<float>(memory, rows * padded);
  w.acc = carve<float>(memory, rows * padded);
  w.total = carve<float>(memory, rows * padded);
  w.scores = carve<float>(memory, rows * kBlockKeys);
  w.keys = carve<float>(memory, kBlockKeys * (padded + kLanes));  // transposed, padded to 16
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

// The block of keys at positions [first, first + 64), of which [begin, end) are used: where the rows of one kv head
// lie. All other places repeat a used key, so that whole vectors of scores can be computed and any place can be
// prefetched.
template <class C>
struct KeyBlock {
  const C* keys[kBlockKeys];
  const C* values[kBlockKeys];
  int64_t first;
  int32_t begin, end;
  int32_t padded_begin() const { return begin / kLanes * kLanes; }
  int32_t padded_end() const { return ceil_div(end, kLanes) * kLanes; }
};

// Calls run(id, slot, begin, end) for runs of keys that lie in one block of the cache.
template <class F>
void for_each_run(const PagedAttentionParams& p, int64_t seq, int64_t first, int32_t begin, int32_t end, F run) {
  const int32_t* table = p.block_table + seq * p.block_table_stride;
  for (int32_t j = begin; j < end;) {
    const int64_t id = table[(first + j) / p.block_size], slot = (first + j) % p.block_size;
    const auto stop = static_cast<int32_t>(min<int64_t>(end, j + p.block_size - slot));
    run(id, slot, j, stop);
    j = stop;
  }
}

template <class C>
void find_block(const Problem& problem, const Unit& unit, int64_t kv_head, int64_t first, KeyBlock<C>& block) {
  const PagedAttentionParams& p = problem.p;
  block.first = first;
  block.begin = static_cast<int32_t>(max<int64_t>(unit.key_begin - first, 0));
  block.end = static_cast<int32_t>(min(unit.key_end - first, kBlockKeys));
  for_each_run(p, unit.seq, first, block.begin, block.end, [&](int64_t id, int64_t slot, int32_t begin, int32_t end) {
    const auto find = [&](const KVCacheView& cache, const C** rows) {
      const C* row = static_cast<const C*>(cache.data) + id * cache.block_stride + slot * cache.slot_stride +
                     kv_head * cache.head_stride;
      for (int32_t j = begin; j < end; ++j, row += cache.slot_stride) rows[j] = row;
    };
    find(p.key_cache, block.keys);
    find(p.value_cache, block.values);
  });
  const auto repeat = [&](int32_t used, int32_t begin, int32_t end) {
    for (int32_t j = begin; j < end; ++j) {
      block.keys[j] = block.keys[used];
      block.values[j] = block.values[used];
    }
  };
  repeat(block.begin, 0, block.begin);
  repeat(block.end - 1, block.end, kBlockKeys);
}

// The scales of a block's keys or values, 1 where none is used; null for a cache without.
template <class C>
const float* find_scales(const Problem& problem, const Unit& unit, const KVCacheView& cache, int64_t kv_head,
                         const KeyBlock<C>& block, float* scales) {
  if (!cache.scale) return nullptr;
  for (int32_t j = 0; j < kBlockKeys; ++j) scales[j] = 1.f;
  for_each_run(problem.p, unit.seq, block.first, block.begin, block.end,
               [&](int64_t id, int64_t slot, int32_t begin, int32_t end) {
                 const float* scale = cache.scale + id * cache.scale_block_stride + slot * cache.scale_slot_stride +
                                      kv_head * cache.scale_head_stride;
                 for (int32_t j = begin; j < end; ++j, scale += cache.scale_slot_stride) scales[j] = *scale;
               });
  return scales;
}

// Weights of the block's keys for every row, from the dot products; rescales what the rows have accumulated.
template <class C>
void softmax_block(const Problem& problem, const Unit& unit, int64_t kv_head, const KeyBlock<C>& block, float* scores,
                   RunningSoftmax* running, float* acc, const Workspace& w) {
  const PagedAttentionParams& p = problem.p;
  const Sequence seq = problem.sequence(unit.seq);
  float key_memory[kBlockKeys], value_memory[kBlockKeys];
  const float* key_scales = find_scales(problem, unit, p.key_cache, kv_head, block, key_memory);
  const float* value_scales = find_scales(problem, unit, p.value_cache, kv_head, block, value_memory);
  const float inverse_cap = p.soft_cap != 0.f ? 1.f / p.soft_cap : 0.f;
  for (int64_t r = 0; r < unit.num_rows; ++r) {
    const int64_t row = unit.first_row + r;
    const Positions seen = problem.visible(seq, row);
    const auto begin = static_cast<int32_t>(min(max<int64_t>(seen.begin - block.first, 0), kBlockKeys));
    const auto end = static_cast<int32_t>(max<int64_t>(min(seen.end - block.first, kBlockKeys), begin));
    w.ranges[r] = {begin, end};
    if (begin == end) continue;
    const RowScores how = {
        .scale = p.scale,
        .soft_cap = p.soft_cap,
        .inverse_cap = inverse_cap,
        .slope = p.alibi_slopes ? p.alibi_slopes[kv_head * problem.group + row % problem.group] : 0.f,
        .first_distance = static_cast<float>(block.first - problem.position(seq, row)),
        .begin = begin,
        .end = end,
    };
    const float correction = softmax_row(how, scores + r * kBlockKeys, key_scales, value_scales, running[r]);
    if (correction != 1.f) {
      float* row_acc = acc + r * problem.padded;
      for (int64_t d = 0; d < problem.padded; d += kLanes) store(row_acc + d, load(row_acc + d) * splat(correction));
    }
  }
}

// Attention of the unit's rows, for several kv heads, over one block of keys, used in place. Prefetches the values
// while the keys are used, then the keys of `next`: all heads' scores come first, so that these have the time to
// arrive. A group of keys is visited with all heads before the next, as the heads of a slot lie side by side.
template <class C>
void attend_in_place(const Problem& problem, const Unit& unit, const Heads& heads, const KeyBlock<C>& block,
                     const KeyBlock<C>* next, float* acc, const Workspace& w) {
  const PagedAttentionParams& p = problem.p;
  const int64_t size = problem.padded, rows = unit.num_rows;
  const auto at = [](const KVCacheView& cache, const C* const* first, int64_t h) {
    return KeyRows<C>{first, h * cache.head_stride};
  };
  for (int32_t j = block.padded_begin(); j < block.padded_end(); j += kGroupKeys) {
    const int32_t count = min<int32_t>(kGroupKeys, block.padded_end() - j);
    for (int64_t h = 0; h < heads.count; ++h)
      score_rows(w.query + h * rows * size, rows, size, at(p.key_cache, block.keys + j, h), count,
                 w.scores + h * rows * kBlockKeys + j, kBlockKeys, at(p.value_cache, block.values + j, h));
  }
  for (int64_t h = 0; h < heads.count; ++h)
    softmax_block(problem, unit, heads.begin + h, block, w.scores + h * rows * kBlockKeys, w.running + h * rows,
                  acc + h * rows * size, w);
  for (int32_t j = block.begin; j < block.end; j += kGroupKeys) {
    const int32_t end = min<int32_t>(j + kGroupKeys, block.end);
    for (int64_t h = 0; h < heads.count; ++h)
      value_rows<ValueTiles<C>>(w.scores + h * rows * kBlockKeys, kBlockKeys, w.ranges, rows,
                                at(p.value_cache, block.values, h), j, end, acc + h * rows * size, size,
                                at(p.key_cache, next ? next->keys : nullptr, h));
  }
}

// The same for one kv head, over keys and values that are unpacked to fp32 first. Those of `next`, of kv head
// `next_head` of the unit's, are prefetched a few at a time.
template <class C>
void attend_unpacked(const Problem& problem, const Unit& unit, const Heads& heads, int64_t h, const KeyBlock<C>& block,
                     const KeyBlock<C>* next, int64_t next_head, float* acc, const Workspace& w) {
  const PagedAttentionParams& p = problem.p;
  const int64_t head_dim = p.head_dim, size = problem.padded, rows = unit.num_rows;
  const float* query = w.query + h * rows * size;
  acc += h * rows * size;
  const float* values[kBlockKeys];
  UnpackedKeys keys;
  keys.unpack<C>({block.keys, h * p.key_cache.head_stride}, block.padded_begin(), block.padded_end(), head_dim, size,
                 w.keys);
  unpack_rows<C>({block.values, h * p.value_cache.head_stride}, block.begin, block.end, head_dim, size, w.values,
                 values);
  int64_t prefetched = 0;
  const int64_t step = ceil_div(kBlockKeys, (kBlockKeys / kGroupKeys) * ceil_div(rows, kSliceRows));
  for (int32_t j = block.begin / kGroupKeys * kGroupKeys; j < block.padded_end(); j += kGroupKeys) {
    for (int64_t r = 0; r < rows; r += kSliceRows) {
      for (const int64_t stop = min(prefetched + step, kBlockKeys); next && prefetched < stop; ++prefetched) {
        prefetch_row(next->keys[prefetched] + next_head * p.key_cache.head_stride, head_dim);
        prefetch_row(next->values[prefetched] + next_head * p.value_cache.head_stride, head_dim);
      }
      keys.score(query + r * size, min(rows - r, kSliceRows), size, j, w.scores + r * kBlockKeys);
    }
  }
  softmax_block(problem, unit, heads.begin + h, block, w.scores, w.running + h * rows, acc, w);
  for (int32_t j = block.begin; j < block.end; j += UnpackedValueTiles::kKeys) {
    const int32_t end = min<int32_t>(j + UnpackedValueTiles::kKeys, block.end);
    value_rows<UnpackedValueTiles, float>(w.scores, kBlockKeys, w.ranges, rows, {values, 0}, j, end, acc, size, {});
  }
}

// Attention of the unit's rows over one chunk of keys, into states[head * rows + row].
template <class C>
void attend_chunk(const Problem& problem, const Unit& unit, const Heads& heads, int64_t chunk, AttentionState* states,
                  float* acc, const Workspace& w) {
  const int64_t rows = unit.num_rows, size = problem.padded;
  const bool in_place = rows <= kInPlaceRows && problem.p.head_dim == size;
  const int64_t first = max(unit.key_begin, chunk * kChunkKeys) / kBlockKeys;
  const int64_t end = ceil_div(min(unit.key_end, (chunk + 1) * kChunkKeys), kBlockKeys);
  clear_states(states, acc, heads.count * rows, size);
  for (int64_t r = 0; r < heads.count * rows; ++r) w.running[r] = {-kInfinity, splat(0.f)};

  KeyBlock<C> blocks[2];
  if (first < end) find_block(problem, unit, heads.begin, first * kBlockKeys, blocks[first % 2]);
  for (int64_t b = first; b < end; ++b) {
    const KeyBlock<C>& block = blocks[b % 2];
    KeyBlock<C>* next = b + 1 < end ? &blocks[(b + 1) % 2] : nullptr;
    if (next) find_block(problem, unit, heads.begin, (b + 1) * kBlockKeys, *next);
    if (in_place) {
      attend_in_place(problem, unit, heads, block, next, acc, w);
      continue;
    }
    for (int64_t h = 0; h < heads.count; ++h) {
      const bool is_last = h + 1 == heads.count;
      attend_unpacked(problem, unit, heads, h, block, is_last ? next : &block, is_last ? 0 : h + 1, acc, w);
    }
  }
  for (int64_t r = 0; r < heads.count * rows; ++r) {
    states[r].max = w.running[r].max;
    states[r].sum = reduce_add(w.running[r].sum);
  }
}

// Merges the states of one chunk into the sums, for the rows that see a key of it.
void merge_chunk(const Problem& problem, const Unit& unit, int64_t num_heads, int64_t chunk,
                 const AttentionState* states, AttentionState* sums) {
  const Sequence seq = problem.sequence(unit.seq);
  for (int64_t r = 0; r < unit.num_rows; ++r) {
    const Positions seen = problem.visible(seq, unit.first_row + r);
    if (max(seen.begin, chunk * kChunkKeys) >= min(seen.end, (chunk + 1) * kChunkKeys)) continue;
    for (int64_t i = r; i < num_heads * unit.num_rows; i += unit.num_rows)
      merge_state(sums[i], states[i], problem.padded);
  }
}

void write_rows(const Problem& problem, const Unit& unit, const Heads& heads, const AttentionState* sums) {
  for (int64_t h = 0; h < heads.count; ++h)
    for (int64_t r = 0; r < unit.num_rows; ++r)
      write_row(problem, unit, heads.begin + h, r, sums[h * unit.num_rows + r]);
}

template <class C>
void attend_item(const Problem& problem, const Plan& plan, const Item& item, const Workspace& w) {
  const Unit& unit = item.unit;
  const int64_t rows = item.heads.count * unit.num_rows;
  for (int64_t h = 0; h < item.heads.count; ++h)
    load_query(problem, unit, item.heads.begin + h, w.query + h * unit.num_rows * problem.padded);
  if (item.chunk >= 0) {
    const PartialStates partial = plan.partial_states(unit, item.chunk);
    const int64_t first = item.heads.begin * unit.num_rows;
    attend_chunk<C>(problem, unit, item.heads, item.chunk, w.chunk, partial.acc + first * problem.padded, w);
    for (int64_t r = 0; r < rows; ++r) {
      partial.max_and_sum[2 * (first + r)] = w.chunk[r].max;
      partial.max_and_sum[2 * (first + r) + 1] = w.chunk[r].sum;
    }
    return;
  }
  clear_states(w.sum, w.total, rows, problem.padded);
  for (int64_t c = unit.first_chunk(); c < unit.first_chunk() + unit.num_chunks(); ++c) {
    attend_chunk<C>(problem, unit, item.heads, c, w.chunk, w.acc, w);
    merge_chunk(problem, unit, item.heads.count, c, w.chunk, w.sum);
  }
  write_rows(problem, unit, item.heads, w.sum);
}

void merge_split_unit(const Problem& problem, const Plan& plan, const Unit& unit, int64_t kv_head, const Workspace& w) {
  clear_states(w.sum, w.total, unit.num_rows, problem.padded);
  for (int64_t c = unit.first_chunk(); c < unit.first_chunk() + unit.num_chunks(); ++c) {
    const PartialStates partial = plan.partial_states(unit, c);
    for (int64_t r = 0; r < unit.num_rows; ++r) {
      const int64_t i = kv_head * unit.num_rows + r;
      w.chunk[r] = {partial.max_and_sum[2 * i], partial.max_and_sum[2 * i + 1], partial.acc + i * problem.padded};
    }
    merge_chunk(problem, unit, 1, c, w.chunk, w.sum);
  }
  write_rows(problem, unit, {kv_head, 1}, w.sum);
}

}  // namespace

void paged_attention(const PagedAttentionParams& p, int num_threads) {
  const Problem problem = {p, p.num_heads / p.num_kv_heads, ceil_div<int64_t>(p.head_dim, kLanes) * kLanes};
  const Plan plan(problem, num_threads);
  if (plan.num_items() == 0) return;
  const int64_t grain = ceil_div(kMinTaskBytes * plan.num_items(), plan.cost());
  with_cache_type(p.cache_dtype, [&]<class C>(Type<C>) {
    parallel_for(plan.num_items(), grain, num_threads, [&](int64_t begin, int64_t end) {
      const Workspace w = make_workspace(plan.max_rows(), problem.padded);
      for (int64_t i = begin; i < end; ++i) attend_item<C>(problem, plan, plan.item(i), w);
    });
  });
  if (plan.partial_floats() == 0) return;
  const int64_t num_merges = plan.num_units() * p.num_kv_heads;
  const int64_t merge_grain =
      ceil_div<int64_t>(kMinTaskBytes * num_merges, plan.partial_floats() * static_cast<int64_t>(sizeof(float)));
  parallel_for(num_merges, merge_grain, num_threads, [&](int64_t begin, int64_t end) {
    const Workspace w = make_workspace(plan.max_rows(), problem.padded);
    for (int64_t i = begin; i < end; ++i)
      if (const Unit& unit = plan.unit(i / p.num_kv_heads); unit.partial >= 0)
        merge_split_unit(problem, plan, unit, i % p.num_kv_heads, w);
  });
}

}  // namespace teco::cpu::TECO_ISA

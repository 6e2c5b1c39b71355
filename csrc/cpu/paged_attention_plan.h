// Who does what in attention: the rows of a call are cut into units, and these into work items. None of it changes
// bits.
#pragma once

#include "cpu/vec.h"

namespace teco::cpu::TECO_ISA {

constexpr int64_t kChunkKeys = 256;  // keys whose state is made at a time; part of the order of operations
constexpr int64_t kUnitFloats =
    24 * 1024;  // of query rows walked together: with sums and scores, 0.4 MB; L2 has 1 MB where it was tried
constexpr int64_t kMinUnitRows = 12;   // units are not made smaller to have more of them
constexpr int64_t kMaxSplitRows = 16;  // chunks of a unit with more rows are not dealt out
constexpr int64_t kItemsPerThread = 4;

struct Positions {
  int64_t begin, end;
};

struct Sequence {
  int64_t first_token, query_len, seq_len;
};

struct Heads {  // of keys and values
  int64_t begin, count;
};

// Rows of one sequence that are walked together, numbered token by token, the heads of a group side by side. Several
// kv heads are walked together too, chunk by chunk: in a cache with all heads of a slot side by side, each page is then
// visited once rather than once per head.
struct Unit {
  int64_t seq, first_row, num_rows;
  int64_t key_begin, key_end;  // positions that any of the rows sees
  int64_t first_item = 0;      // work items of the units before
  int64_t heads = 1;           // walked together; the last ones may be fewer
  int64_t partial = -1;        // split into chunks: where their states begin

  int64_t first_chunk() const { return key_begin / kChunkKeys; }
  int64_t num_chunks() const { return key_end > key_begin ? ceil_div(key_end, kChunkKeys) - first_chunk() : 0; }
};

// The call, and what follows from it.
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
  // Bytes that a kv head of the unit reads, roughly, with arithmetic counted as the bytes that could be read meanwhile.
  int64_t cost(const Unit& unit) const { return (unit.key_end - unit.key_begin + 16) * padded * (4 + unit.num_rows); }
};

// States of a split unit over one chunk, all kv heads.
struct PartialStates {
  float* max_and_sum;  // [kv heads * rows, 2]
  float* acc;          // [kv heads * rows, padded]
};

// What a thread does at a time: some kv heads of a unit, over all chunks or over one.
struct Item {
  const Unit& unit;
  Heads heads;
  int64_t chunk;  // -1: all
};

// Cuts every sequence into units of at most `limit` rows; returns how many. units may be null.
inline int64_t make_units(const Problem& problem, int64_t limit, Unit* units) {
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
      units[count++] = {s, row, rows, problem.visible(seq, row).begin, problem.visible(seq, row + rows - 1).end};
    }
  }
  return count;
}

class Plan {
 public:
  Plan(const Problem& problem, int num_threads) : problem_(problem) {
    const int64_t wanted = kItemsPerThread * num_threads;
    int64_t limit = max(kUnitFloats / problem.padded / kMinUnitRows, int64_t{1}) * kMinUnitRows;
    while (limit / 2 >= kMinUnitRows && make_units(problem, limit, nullptr) * problem.p.num_kv_heads < wanted)
      limit /= 2;
    num_units_ = make_units(problem, limit, nullptr);
    const int64_t unit_bytes = ceil_div<int64_t>(num_units_ * sizeof(Unit), 64) * 64;
    for (int64_t partial_floats = 0;;) {  // a second time when there turns out to be something to split
      char* memory = static_cast<char*>(thread_scratch(Scratch::kShared, unit_bytes + partial_floats * sizeof(float)));
      units_ = reinterpret_cast<Unit*>(memory);
      partials_ = reinterpret_cast<float*>(memory + unit_bytes);
      make_units(problem, limit, units_);
      make_items(num_threads > 1, wanted);
      if (partial_floats_ <= partial_floats) return;
      partial_floats = partial_floats_;
    }
  }

  int64_t num_units() const { return num_units_; }
  const Unit& unit(int64_t i) const { return units_[i]; }
  int64_t num_items() const { return num_items_; }
  int64_t cost() const { return cost_; }
  int64_t partial_floats() const { return partial_floats_; }
  int64_t max_rows() const { return max_rows_; }  // of an item: rows of a unit times kv heads

  // Costly items come first: with causal masking those are the last rows of a sequence.
  Item item(int64_t i) const {
    const int64_t index = num_items_ - 1 - i;
    int64_t begin = 0, end = num_units_;
    while (end - begin > 1) {
      const int64_t middle = (begin + end) / 2;
      (units_[middle].first_item <= index ? begin : end) = middle;
    }
    const Unit& unit = units_[begin];
    const int64_t groups = head_groups(unit), rest = index - unit.first_item, first = rest % groups * unit.heads;
    return {unit,
            {first, min(unit.heads, problem_.p.num_kv_heads - first)},
            unit.partial >= 0 ? unit.first_chunk() + rest / groups : -1};
  }

  PartialStates partial_states(const Unit& unit, int64_t chunk) const {
    float* states = partials_ + unit.partial + (chunk - unit.first_chunk()) * chunk_floats(unit);
    return {states, states + 2 * problem_.p.num_kv_heads * unit.num_rows};
  }

 private:
  int64_t head_groups(const Unit& unit) const { return ceil_div(problem_.p.num_kv_heads, unit.heads); }
  int64_t chunk_floats(const Unit& unit) const {
    return problem_.p.num_kv_heads * unit.num_rows * (problem_.padded + 2);
  }

  // Chunks of large units become items of their own where there would be too few of them, and fewer heads are walked
  // together where that still leaves too few.
  void make_items(bool may_split, int64_t wanted) {
    const int64_t num_kv_heads = problem_.p.num_kv_heads;
    int64_t num_chunks = 0;
    num_items_ = cost_ = partial_floats_ = max_rows_ = 0;
    for (int64_t u = 0; u < num_units_; ++u) {
      cost_ += problem_.cost(units_[u]) * num_kv_heads;
      num_chunks += units_[u].num_rows <= kMaxSplitRows ? max<int64_t>(units_[u].num_chunks(), 1) : 1;
    }
    const int64_t heads = may_split ? max<int64_t>(num_kv_heads * num_chunks / wanted, 1) : num_kv_heads;
    for (int64_t u = 0; u < num_units_; ++u) {
      Unit& unit = units_[u];
      unit.heads = max<int64_t>(min(min(heads, num_kv_heads), kUnitFloats / (unit.num_rows * problem_.padded)), 1);
      unit.heads = ceil_div(num_kv_heads, head_groups(unit));
      unit.first_item = num_items_;
      const bool large = problem_.cost(unit) * unit.heads * wanted > cost_;
      int64_t parts = 1;
      if (may_split && large && unit.num_rows <= kMaxSplitRows && unit.num_chunks() > 1) {
        parts = unit.num_chunks();
        unit.partial = partial_floats_;
        partial_floats_ += parts * chunk_floats(unit);
      }
      num_items_ += parts * head_groups(unit);
      max_rows_ = max(max_rows_, unit.num_rows * unit.heads);
    }
  }

  const Problem& problem_;
  Unit* units_;
  float* partials_;
  int64_t num_units_, num_items_, cost_, partial_floats_, max_rows_;
};

}  // namespace teco::cpu::TECO_ISA

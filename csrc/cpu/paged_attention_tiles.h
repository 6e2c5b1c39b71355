// The two inner products of attention, for a tile of query rows: scores = query . key, acc += weight * value.
//
// The order of operations is the same for every tile shape. A score is eight fma chains over head_dim, lane i taking
// the elements i, i + 8, ..., added up by the tree of reduce_add(): keys are used as they lie in memory. An output
// element is one fma chain over the keys. Shapes are chosen for registers: at most 12 sums (24 where there are 32
// registers), and 8 of them or more, as an fma has a latency of four cycles and two begin per cycle.
#pragma once

#include "cpu/wide.h"

namespace teco::cpu::TECO_ISA {

constexpr int kMaxTileRows = 4;

// Keys of a score tile, and vectors of head_dim of a value tile. With 32 registers, four rows make 16 sums.
#if defined(TECO_ISA_AVX512)
template <int R>
constexpr int kTileWidth = R == 1 ? 8 : 4;
#else
template <int R>
constexpr int kTileWidth = R == 1   ? 8
                           : R == 4 ? 2
                                    : 4;
#endif

// Each step adds lanes of two vectors at once; both halves of the result belong to one of them each.
inline F32x8 add_halves(F32x8 a, F32x8 b) {  // i with i + 4: [a a a a b b b b]
  return F32x8(__builtin_shufflevector(a, b, 0, 1, 2, 3, 12, 13, 14, 15)) +
         F32x8(__builtin_shufflevector(a, b, 4, 5, 6, 7, 8, 9, 10, 11));
}
inline F32x8 add_quarters(F32x8 a, F32x8 b) {  // i with i + 2, in both halves
  return F32x8(__builtin_shufflevector(a, b, 0, 1, 10, 11, 4, 5, 14, 15)) +
         F32x8(__builtin_shufflevector(a, b, 2, 3, 8, 9, 6, 7, 12, 13));
}
inline F32x8 add_pairs(F32x8 a, F32x8 b) {  // i with i + 1, in both halves
  return F32x8(__builtin_shufflevector(a, b, 0, 2, 8, 10, 4, 6, 12, 14)) +
         F32x8(__builtin_shufflevector(a, b, 1, 3, 9, 11, 5, 7, 13, 15));
}
// reduce_add() of eight vectors, in order.
inline F32x8 reduce_eight(const F32x8* v) {
  return add_pairs(add_quarters(add_halves(v[0], v[4]), add_halves(v[1], v[5])),
                   add_quarters(add_halves(v[2], v[6]), add_halves(v[3], v[7])));
}
// Of four: lanes 0 1 4 5 of the result.
inline F32x4 reduce_four(const F32x8* v) {
  const F32x8 s = add_quarters(add_halves(v[0], v[2]), add_halves(v[1], v[3]));
  const F32x8 t = add_pairs(s, s);
  return __builtin_shufflevector(t, t, 0, 1, 4, 5);
}

template <int R>
inline void store_scores(const F32x8* sums, float* scores, int64_t stride) {
  if constexpr (R * kTileWidth<R> == 16) {
    for (int i = 0; i < 2; ++i) {
      const F32x8 s = reduce_eight(sums + 8 * i);
      store_bits(scores + 2 * i * stride, F32x4(__builtin_shufflevector(s, s, 0, 1, 2, 3)));
      store_bits(scores + (2 * i + 1) * stride, F32x4(__builtin_shufflevector(s, s, 4, 5, 6, 7)));
    }
  } else if constexpr (R == 3) {
    const F32x8 s = reduce_eight(sums);
    store_bits(scores, F32x4(__builtin_shufflevector(s, s, 0, 1, 2, 3)));
    store_bits(scores + stride, F32x4(__builtin_shufflevector(s, s, 4, 5, 6, 7)));
    store_bits(scores + 2 * stride, reduce_four(sums + 8));
  } else {
    float lanes[kLanes];
    store(lanes, reduce_eight(sums));
    constexpr int C = kTileWidth<R>;
    for (int r = 0; r < R; ++r) __builtin_memcpy(scores + r * stride, lanes + r * C, C * sizeof(float));
  }
}

// Prefetches go to L2: slots of a head often lie a multiple of 4 KB apart, where they would crowd a few sets of L1.
// They are strewn among the arithmetic, for a burst of them holds up the loads behind it.
constexpr int64_t kLineBytes = 64;
template <class T>
inline void prefetch_line(const T* p) {
  __builtin_prefetch(p, 0, 2);
}
template <class T>
inline void prefetch_row(const T* row, int64_t size) {
  for (int64_t d = 0; d < size; d += kLineBytes / sizeof(T)) prefetch_line(row + d);
}

// Where the rows of several keys lie, keys or values: those of one head, so far behind those of the first.
template <class T>
struct KeyRows {
  const T* const* first;  // null: none
  int64_t offset;         // elements

  const T* operator[](int64_t j) const { return first[j] + offset; }
  KeyRows from(int64_t j) const { return {first ? first + j : nullptr, offset}; }
};

// scores[r][j] = query[r] . keys[j] for R rows and `count` keys (a multiple of 8); head_dim a multiple of 8. Prefetches
// ahead[j], as many rows of as many elements.
template <class K, int R>
[[gnu::noinline]] void score_tile(const float* query, int64_t head_dim, KeyRows<K> keys, int64_t count, float* scores,
                                  int64_t score_stride, KeyRows<K> ahead) {
  constexpr int C = kTileWidth<R>;
  for (int64_t j = 0; j < count; j += C) {
    F32x8 sum[R * C];
#pragma GCC unroll 16
    for (int i = 0; i < R * C; ++i) sum[i] = splat(0.f);
    for (int64_t d = 0; d < head_dim; d += kLanes) {
      F32x8 q[R];
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        q[r] = load(query + r * head_dim + d);
        keep_in_register(q[r]);
      }
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) {
        F32x8 k = load(keys[j + c] + d);
        keep_in_register(k);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) sum[r * C + c] = fma(q[r], k, sum[r * C + c]);
      }
    }
    store_scores<R>(sum, scores + j, score_stride);
    if (ahead.first)
      for (int c = 0; c < C; ++c) prefetch_row(ahead[j + c], head_dim);
  }
}

// As many elements as a vector W has lanes, as fp32.
template <class W, class T>
inline W load_lanes(const T* p) {
  if constexpr (sizeof(W) == sizeof(F32x8)) {
    return load(p);
  } else {
    return load_bits<W>(p);
  }
}

// acc[r][d] += sum_j weights[r][j] * values[j][d], for N vectors W of d. Prefetches the same part of ahead[j].
template <class W, class V, int R, int N>
inline void value_strip(const float* weights, int64_t weight_stride, KeyRows<V> values, int64_t count, float* acc,
                        int64_t head_dim, int64_t d, KeyRows<V> ahead) {
  constexpr int kWidth = sizeof(W) / sizeof(float);
  constexpr int64_t line = kLineBytes / sizeof(V);
  const bool prefetches = ahead.first && d % line < N * kWidth;  // else an earlier strip has
  W sum[R * N];
#pragma GCC unroll 32
  for (int i = 0; i < R * N; ++i) sum[i] = load_bits<W>(acc + i / N * head_dim + d + i % N * kWidth);
  for (int64_t j = 0; j < count; ++j) {
    W w[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) w[r] = weights[r * weight_stride + j] - W{};
    const V* value = values[j] + d;
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      W v = load_lanes<W>(value + n * kWidth);
      if constexpr (kWidth > kLanes) keep_in_register(v);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) sum[r * N + n] = fma(w[r], v, sum[r * N + n]);
    }
    if (prefetches)
      for (int64_t i = 0; i < N * kWidth; i += line) prefetch_line(ahead[j] + d + i);
  }
#pragma GCC unroll 32
  for (int i = 0; i < R * N; ++i) store_bits(acc + i / N * head_dim + d + i % N * kWidth, sum[i]);
}

template <class V, int R>
[[gnu::noinline]] void value_tile(const float* weights, int64_t weight_stride, KeyRows<V> values, int64_t count,
                                  float* acc, int64_t head_dim, KeyRows<V> ahead) {
  constexpr int N = kTileWidth<R>;
  int64_t d = 0;
  for (; d + N * kLanes <= head_dim; d += N * kLanes)
    value_strip<F32x8, V, R, N>(weights, weight_stride, values, count, acc, head_dim, d, ahead);
  for (; d < head_dim; d += kLanes)
    value_strip<F32x8, V, R, 1>(weights, weight_stride, values, count, acc, head_dim, d, ahead);
}

// Rows of the next tile when `left` rows are left: threes are the fastest shape, a group of four heads is one tile.
inline int64_t tile_rows(int64_t left) {
  return left >= kMaxTileRows && left % 3 != 0 ? kMaxTileRows : min<int64_t>(left, 3);
}

template <class K>
inline void score_rows(const float* query, int64_t num_rows, int64_t head_dim, KeyRows<K> keys, int64_t count,
                       float* scores, int64_t score_stride, KeyRows<K> ahead) {
  static constexpr decltype(&score_tile<K, 1>) kTiles[] = {score_tile<K, 1>, score_tile<K, 2>, score_tile<K, 3>,
                                                           score_tile<K, 4>};
  for (int64_t r = 0; r < num_rows;) {
    const int64_t rows = tile_rows(num_rows - r);
    kTiles[rows - 1](query + r * head_dim, head_dim, keys, count, scores + r * score_stride, score_stride, ahead);
    ahead = {};  // prefetched
    r += rows;
  }
}

struct KeyRange {
  int32_t begin, end;
};

template <class V>
struct ValueTiles {
  static constexpr int64_t kKeys = 16;  // at a time: they stay in L1 while the rows pass by
  static constexpr decltype(&value_tile<V, 1>) kTiles[] = {value_tile<V, 1>, value_tile<V, 2>, value_tile<V, 3>,
                                                           value_tile<V, 4>};
  static int64_t rows(int64_t left) { return tile_rows(left); }
};

// Adds the weighted values of keys [first, last) to all rows, each taking only the keys in its own range: a key that a
// row must not see may hold anything, and is skipped rather than multiplied by zero.
template <class Tiles, class V>
inline void value_rows(const float* weights, int64_t weight_stride, const KeyRange* ranges, int64_t num_rows,
                       KeyRows<V> values, int32_t first, int32_t last, float* acc, int64_t head_dim, KeyRows<V> ahead) {
  const auto run = [&](int64_t rows, int64_t r, int32_t begin, int32_t end) {
    if (begin < end)
      Tiles::kTiles[rows - 1](weights + r * weight_stride + begin, weight_stride, values.from(begin), end - begin,
                              acc + r * head_dim, head_dim, r == 0 ? ahead.from(begin) : KeyRows<V>{});
  };
  for (int64_t r = 0; r < num_rows;) {
    const int64_t rows = Tiles::rows(num_rows - r);
    int32_t begin = first, end = last;  // keys that all rows of the tile see
    for (int64_t i = r; i < r + rows; ++i) {
      begin = max(begin, ranges[i].begin);
      end = min(end, ranges[i].end);
    }
    const bool shared = begin < end;
    for (int64_t i = r; i < r + rows && (begin != first || end != last); ++i)
      run(1, i, max(first, ranges[i].begin), min(last, shared ? begin : ranges[i].end));
    if (shared) {
      run(rows, r, begin, end);
      for (int64_t i = r; i < r + rows && end != last; ++i) run(1, i, end, min(last, ranges[i].end));
    }
    r += rows;
  }
}

}  // namespace teco::cpu::TECO_ISA

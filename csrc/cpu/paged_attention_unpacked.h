// Attention for many query rows, over a block of keys and values that was unpacked to fp32: the two inner products of
// paged_attention_tiles.h, with the same bits. Bound by fma throughput.
//
// With 32 registers of 16 lanes (AVX-512), the eight chains of a score are eight sums whose lanes are keys: these are
// transposed as they are unpacked, so that nothing is left to be shuffled. A vector of keys serves 3 rows (24 sums),
// four vectors of values serve 6 (24 sums again). Elsewhere the tiles are those of few rows.
#pragma once

#include "cpu/paged_attention_tiles.h"

namespace teco::cpu::TECO_ISA {

constexpr int64_t kBlockKeys = 64;  // keys that share an update of the maximum; part of the order of operations
constexpr int64_t kGroupKeys = 16;  // keys and values of a group stay in L1 while the rows pass by

// Rows as fp32, padded with zeros; fills in where they lie.
template <class C>
void unpack_rows(KeyRows<C> rows, int32_t begin, int32_t end, int64_t head_dim, int64_t padded, float* out,
                 const float** out_rows) {
  for (int32_t j = begin; j < end; ++j) {
    float* target = out + j * padded;
    out_rows[j] = target;
    for (int64_t d = 0; d < head_dim; d += kLanes) store(target + d, load_up_to(rows[j] + d, head_dim - d));
  }
}

#if defined(TECO_ISA_AVX512)

constexpr int kWideScoreRows = 3, kWideValueRows = 6;

template <int... kLane>
struct Lanes {};
using AllLanes = Lanes<0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15>;

template <int kDistance, int... kLane>
inline void swap_blocks(WideF32& a, WideF32& b, Lanes<kLane...>) {
  const WideF32 low = __builtin_shufflevector(a, b, (kLane & kDistance ? kWideLanes + kLane - kDistance : kLane)...);
  b = __builtin_shufflevector(a, b, (kLane & kDistance ? kWideLanes + kLane : kLane + kDistance)...);
  a = low;
}
// Transposes as many vectors as they have lanes: blocks beside the diagonal change places, then those within them.
template <int kDistance = kWideLanes / 2>
inline void transpose(WideF32* v) {
  for (int i = 0; i < kWideLanes; ++i)
    if (!(i & kDistance)) swap_blocks<kDistance>(v[i], v[i + kDistance], AllLanes());
  if constexpr (kDistance > 1) transpose<kDistance / 2>(v);
}

template <class T>
inline WideF32 load_wide_up_to(const T* p, int64_t n) {
  if constexpr (sizeof(T) == sizeof(float)) {
    if (n >= kWideLanes) return load_bits<WideF32>(p);
  }
  const F32x8 low = load_up_to(p, n), high = load_up_to(p + kLanes, n - kLanes);
  return __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
}

// Keys of one group as fp32, out[d][key]; zeros behind head_dim.
template <class C>
void transpose_keys(KeyRows<C> keys, int64_t head_dim, float* out) {
  for (int64_t d = 0; d < head_dim; d += kWideLanes, out += kWideLanes * kWideLanes) {
    WideF32 v[kWideLanes];
    for (int j = 0; j < kWideLanes; ++j) v[j] = load_wide_up_to(keys[j] + d, head_dim - d);
    transpose(v);
    for (int j = 0; j < kWideLanes; ++j) store_bits(out + j * kWideLanes, v[j]);
  }
}

// scores[r][j] = query[r] . keys[j] for R rows and the keys of a group; head_dim a multiple of 8.
template <int R>
[[gnu::noinline]] void wide_score_tile(const float* query, int64_t head_dim, const float* keys, float* scores) {
  WideF32 sum[R][kLanes];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int i = 0; i < kLanes; ++i) sum[r][i] = wide_splat(0.f);
  for (int64_t d = 0; d < head_dim; d += kLanes) {
#pragma GCC unroll 8
    for (int i = 0; i < kLanes; ++i) {
      WideF32 k = load_bits<WideF32>(keys + (d + i) * kWideLanes);
      keep_in_register(k);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) sum[r][i] = fma(wide_splat(query[r * head_dim + d + i]), k, sum[r][i]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {  // the tree of reduce_add()
    const WideF32* s = sum[r];
    store_bits(scores + r * kBlockKeys, ((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7])));
  }
}

class UnpackedKeys {
 public:
  template <class C>
  void unpack(KeyRows<C> keys, int32_t begin, int32_t end, int64_t head_dim, int64_t /*padded*/, float* memory) {
    keys_ = memory;
    group_size_ = ceil_div<int64_t>(head_dim, kWideLanes) * kWideLanes * kGroupKeys;
    for (int32_t j = begin / kGroupKeys * kGroupKeys; j < end; j += kGroupKeys)
      transpose_keys(keys.from(j), head_dim, memory + j / kGroupKeys * group_size_);
  }

  // Scores of the keys of a group, for rows that lie one after the other; j is the group's first key.
  void score(const float* query, int64_t num_rows, int64_t size, int32_t j, float* scores) const {
    static constexpr decltype(&wide_score_tile<1>) kTiles[] = {wide_score_tile<1>, wide_score_tile<2>,
                                                               wide_score_tile<3>};
    const float* keys = keys_ + j / kGroupKeys * group_size_;
    for (int64_t r = 0; r < num_rows; r += kWideScoreRows)
      kTiles[min<int64_t>(num_rows - r, kWideScoreRows) - 1](query + r * size, size, keys, scores + r * kBlockKeys + j);
  }

 private:
  const float* keys_;
  int64_t group_size_;
};

// As value_tile(), for up to 6 rows.
template <int R>
[[gnu::noinline]] void wide_value_tile(const float* weights, int64_t weight_stride, KeyRows<float> values,
                                       int64_t count, float* acc, int64_t head_dim, KeyRows<float> ahead) {
  constexpr int N = 4;
  int64_t d = 0;
  for (; d + N * kWideLanes <= head_dim; d += N * kWideLanes)
    value_strip<WideF32, float, R, N>(weights, weight_stride, values, count, acc, head_dim, d, ahead);
  for (; d + kWideLanes <= head_dim; d += kWideLanes)
    value_strip<WideF32, float, R, 1>(weights, weight_stride, values, count, acc, head_dim, d, ahead);
  for (; d < head_dim; d += kLanes)
    value_strip<F32x8, float, R, 1>(weights, weight_stride, values, count, acc, head_dim, d, ahead);
}

struct UnpackedValueTiles {
  static constexpr int64_t kKeys = 64;  // at a time: few enough for L1, and enough to make up for moving 24 sums
  static constexpr decltype(&wide_value_tile<1>) kTiles[] = {wide_value_tile<1>, wide_value_tile<2>,
                                                             wide_value_tile<3>, wide_value_tile<4>,
                                                             wide_value_tile<5>, wide_value_tile<6>};
  static int64_t rows(int64_t left) { return min<int64_t>(left, kWideValueRows); }
};

#else

class UnpackedKeys {
 public:
  template <class C>
  void unpack(KeyRows<C> keys, int32_t begin, int32_t end, int64_t head_dim, int64_t padded, float* memory) {
    begin_ = begin;
    end_ = end;
    unpack_rows(keys, begin, end, head_dim, padded, memory, rows_);
  }

  // Scores of the keys of a group, for rows that lie one after the other; j is the group's first key.
  void score(const float* query, int64_t num_rows, int64_t size, int32_t j, float* scores) const {
    const int32_t begin = max(j, begin_), end = min<int32_t>(j + kGroupKeys, end_);
    score_rows<float>(query, num_rows, size, {rows_ + begin, 0}, end - begin, scores + begin, kBlockKeys, {});
  }

 private:
  const float* rows_[kBlockKeys];
  int32_t begin_, end_;
};

using UnpackedValueTiles = ValueTiles<float>;

#endif

}  // namespace teco::cpu::TECO_ISA

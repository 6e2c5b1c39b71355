// Floating-point matmul over weights in panels of 16 columns; dense_matmul and the exact mode of gptq_matmul are this
// with two ways to unpack a panel, sparse24_matmul with a tile of its own.
//
// Every output element is one fma chain over the inputs in packed order, whatever the number of rows, the blocking or
// the thread: acc = fma(weight[k, n], input[r, k], acc) for k = 0, 1, 2, ... Partial chains rest in fp32, which costs
// no bits.
//
// Few rows: bound by reading the weights, or by unpacking them where they are packed; several panels are walked at
// once, for independent chains (an fma has a latency of four or five cycles) and as separate streams from memory. Many
// rows: bound by fma throughput; a slice of a panel is unpacked into L1 once and used by all rows of a block.
#pragma once

#include "cpu/matmul.h"

namespace teco::cpu::TECO_ISA {

constexpr int64_t kSlice = 256;     // inputs unpacked at a time: 16 KB of L1
constexpr int64_t kRowBlock = 192;  // rows whose slice of inputs stays in L2

// Rows of fp32 activations; `first` is the first one's number among the rows of the matmul.
struct FloatRows {
  const float* data;
  int64_t first, count, stride;
};

// R rows by P panels over `count` inputs; continues the chains in acc[panel][row][16].
template <int R, int P>
[[gnu::noinline]] void fma_tile(const float* const* weights, const float* input, int64_t input_stride, int64_t count,
                                float* acc, int64_t acc_stride) {
  F32x8 sum[R][P * kPanelVectors];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < P * kPanelVectors; ++v)
      sum[r][v] = load(acc + v / 2 * acc_stride + r * kPanel + v % 2 * kLanes);
  for (int64_t k = 0; k < count; ++k) {
    F32x8 weight[P * kPanelVectors];
#pragma GCC unroll 8
    for (int v = 0; v < P * kPanelVectors; ++v) weight[v] = load(weights[v / 2] + k * kPanel + v % 2 * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const F32x8 x = splat(input[r * input_stride + k]);
#pragma GCC unroll 8
      for (int v = 0; v < P * kPanelVectors; ++v) sum[r][v] = fma(weight[v], x, sum[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < P * kPanelVectors; ++v)
      store(acc + v / 2 * acc_stride + r * kPanel + v % 2 * kLanes, sum[r][v]);
}

// What is read of a panel at a time, and the tile that multiplies by it: for weights that are unpacked to fp32.
struct DenseTiles {
  static constexpr int kTileRows = 6;  // 6 rows x 2 vectors of sums, 2 weights, 1 input: 15 of 16 registers
  using Slice = const float*;          // [count][16]
  template <int R, int P>
  static constexpr auto kTile = fma_tile<R, P>;
};

template <class Slice>
using FmaTile = void (*)(const Slice*, const float*, int64_t, int64_t, float*, int64_t);

// All rows by panels [begin, end), P panels at a time, of which that is a multiple. `unpack(panel, k, count, scratch)`
// returns the slice of the panel's inputs k, k + 1, ..., k + count - 1: in `scratch` ([count][16] fp32), or where it
// lies already. k is a multiple of 32.
template <int P, class Unpack>
void multiply_panels(const FloatRows& input, int64_t in_features, const PanelSink& sink, const Unpack& unpack,
                     int64_t begin, int64_t end) {
  using Slice = typename Unpack::Slice;
  constexpr int tile_rows = P == 1 ? Unpack::kTileRows : 8 / (2 * P);
  static constexpr FmaTile<Slice> kTiles[] = {Unpack::template kTile<1, P>,
                                              Unpack::template kTile<min(2, tile_rows), P>,
                                              Unpack::template kTile<min(3, tile_rows), P>,
                                              Unpack::template kTile<min(4, tile_rows), P>,
                                              Unpack::template kTile<min(5, tile_rows), P>,
                                              Unpack::template kTile<min(6, tile_rows), P>};
  constexpr int64_t slice = kSlice / P;
  auto* scratch =
      static_cast<float*>(thread_scratch(Scratch::kTask, (kSlice + P * kRowBlock) * kPanel * sizeof(float)));
  float* acc = scratch + kSlice * kPanel;

  const int64_t step = (end - begin) / P;  // each of the P streams walks panels of its own
  for (int64_t row0 = 0; row0 < input.count; row0 += kRowBlock) {
    const int64_t rows = min(input.count - row0, kRowBlock);
    for (int64_t i = 0; i < step; ++i) {
      int64_t panel[P];
      for (int s = 0; s < P; ++s) panel[s] = begin + i + s * step;
      __builtin_memset(acc, 0, P * rows * kPanel * sizeof(float));
      for (int64_t k = 0; k < in_features; k += slice) {
        const int64_t count = min(in_features - k, slice);
        Slice weights[P];
        for (int s = 0; s < P; ++s) weights[s] = unpack(panel[s], k, count, scratch + s * slice * kPanel);
        for (int64_t r = 0; r < rows; r += tile_rows)
          kTiles[min<int64_t>(rows - r, tile_rows) - 1](weights, input.data + (row0 + r) * input.stride + k,
                                                        input.stride, count, acc + r * kPanel, rows * kPanel);
      }
      for (int s = 0; s < P; ++s) sink(input.first + row0, rows, acc + s * rows * kPanel, panel[s]);
    }
  }
}

// All rows by all panels, shared among threads in tasks of whole sets of P panels; what is left is walked one by one.
template <int P, class Unpack>
void multiply_sets(const FloatRows& input, int64_t in_features, int64_t num_panels, int64_t panel_bytes,
                   const PanelSink& sink, const Unpack& unpack, int num_threads) {
  parallel_for(ceil_div<int64_t>(num_panels, P), task_grain(P * panel_bytes * input.count), num_threads,
               [&](int64_t first, int64_t last) {
                 const int64_t begin = first * P, end = min(last * P, num_panels), left = (end - begin) % P;
                 multiply_panels<P>(input, in_features, sink, unpack, begin, end - left);
                 multiply_panels<1>(input, in_features, sink, unpack, end - left, end);
               });
}

// `num_rows` rows of `input` from the first on, as fp32 in packed order: where they lie when they already are that,
// else in scratch memory. order: input at each packed place, -1 for padding; null for the identity.
template <class T>
FloatRows float_rows(const T* input, int64_t stride, int64_t first, int64_t num_rows, int64_t size,
                     const int32_t* order, int num_threads) {
  input += first * stride;
  if constexpr (sizeof(T) == sizeof(float)) {
    if (!order) return {input, first, num_rows, stride};
  }
  const int64_t padded = ceil_div<int64_t>(size, kLanes) * kLanes;
  auto* rows = static_cast<float*>(thread_scratch(Scratch::kShared, num_rows * padded * sizeof(float)));
  parallel_for(num_rows, task_grain(padded * sizeof(float)), num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const T* source = input + r * stride;
      float* row = rows + r * padded;
      if (order) {
        for (int64_t k = 0; k < size; ++k) row[k] = order[k] < 0 ? 0.f : load_one(source + order[k]);
      } else {
        for (int64_t k = 0; k < size; k += kLanes) store(row + k, load_up_to(source + k, size - k));
      }
    }
  });
  return {rows, first, num_rows, padded};
}

// The whole product. packed_size: inputs in packed order, padding included; panel_bytes: of packed weights.
template <class Params, class Unpack>
void panel_matmul(const Params& p, int64_t packed_size, const int32_t* order, int64_t panel_bytes, const Unpack& unpack,
                  const PanelSink& sink, int num_threads) {
  const int64_t num_panels = ceil_div<int64_t>(p.out_features, kPanel);
  for (int64_t row = 0; row < p.num_rows; row += kScratchRows) {
    const int64_t count = min(p.num_rows - row, kScratchRows);
    FloatRows rows{};
    with_float_type(p.dtype, [&]<class T>(Type<T>) {
      rows = float_rows(static_cast<const T*>(p.input), p.input_stride, row, count, packed_size, order, num_threads);
    });
    const auto has_sets = [&](int size) { return num_panels >= size * num_threads; };  // one for each thread
    const auto multiply = count == 1 && has_sets(4)   ? multiply_sets<4, Unpack>
                          : count <= 2 && has_sets(2) ? multiply_sets<2, Unpack>
                                                      : multiply_sets<1, Unpack>;
    multiply(rows, packed_size, num_panels, panel_bytes, sink, unpack, num_threads);
  }
}

}  // namespace teco::cpu::TECO_ISA

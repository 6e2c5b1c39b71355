// Activations quantised to 8 bits, in the order in which an int8 matmul walks them.
//
// One scale per row and block of 32 inputs: code = round(x * (127 / m)), scale = m / 127, m being the block's largest
// magnitude. Bound by instructions, a good part of which do not get fewer as vectors get wider: two reductions, two
// divisions, and the copy into the interleaved tile.
#pragma once

#include "cpu/gptq_layout.h"
#include "cpu/int8_dot.h"

namespace teco::cpu::TECO_ISA {

constexpr int kTileRows = kDotTakesBytes ? 8 : 4;  // with 32 registers, with 16
constexpr float kTiny = 1e-30f;                    // a block whose inputs are all below this counts as zero

// Rows in packed order. They come in tiles of kTileRows (the last tile has what is left); the R rows of a tile are
// interleaved, so that a kernel walks one stream and rows never compete for the same set of the L1 cache:
// codes [num_blocks * 8][R][4], scales [num_blocks][R], sums [num_groups][R].
struct QuantisedRows {
  int8_t* codes;
  float* scales;
  float* sums;    // scale * code, summed over a group
  int64_t first;  // the first one's number among the rows of the matmul
  int64_t count, num_blocks, num_groups;

  int64_t tile_rows(int64_t row) const { return min<int64_t>(count - row / kTileRows * kTileRows, kTileRows); }
  // Of the tile that begins with `row`.
  int8_t* tile_codes(int64_t row) const { return codes + row * num_blocks * kBlock; }
  float* tile_scales(int64_t row) const { return scales + row * num_blocks; }
  float* tile_sums(int64_t row) const { return sums + row * num_groups; }
};

// Quantises one block; returns its scale (NaN when an input is not finite) and sets `sum` to the sum of its codes.
inline float quantise_block(const float* x, int8_t* codes, int32_t& sum) {
  constexpr int kVectors = kBlock / kWideLanes;
  WideF32 values[kVectors];
  WideI32 magnitude = {};  // as bits, which order infinities above all numbers and NaN above infinities
  for (int v = 0; v < kVectors; ++v) {
    values[v] = load_bits<WideF32>(x + v * kWideLanes);
    const WideI32 bits = reinterpret_cast<WideI32>(values[v]) & 0x7fffffff;
    magnitude = bits > magnitude ? bits : magnitude;
  }
  const float largest = bit_cast<float>(reduce_max(magnitude));
  const bool finite = largest <= __FLT_MAX__;
  if (!finite || largest <= kTiny) {
    __builtin_memset(codes, 0, kBlock);
    sum = 0;
    return finite ? 0.f : __builtin_nanf("");
  }
  const WideF32 inverse = wide_splat(127.f / largest);
  WideI32 total = {};
  for (int v = 0; v < kVectors; ++v) {
    const WideI32 code = round_to_int(values[v] * inverse);
    total += code;
    store_low_bytes(codes + v * kWideLanes, code);
  }
  sum = reduce_add(total);
  return largest / 127.f;
}

// 32 inputs of a row in packed order: where they lie when they already are that, else in `x`.
template <class T>
inline const float* gather_block(const T* row, const int32_t* order, int64_t place, float* x) {
  if (order) {
    for (int64_t i = 0; i < kBlock; ++i) x[i] = order[place + i] < 0 ? 0.f : load_one(row + order[place + i]);
    return x;
  }
  if constexpr (sizeof(T) == sizeof(float)) {
    return row + place;
  } else {
    for (int i = 0; i < kBlock; i += kLanes) store(x + i, load(row + place + i));
    return x;
  }
}

// Row `row` of `rows`.
template <class T>
void quantise_row(const GptqMatmulParams& p, const T* input, const QuantisedRows& rows, int64_t row) {
  const int64_t r = row % kTileRows, R = rows.tile_rows(row);
  int8_t* tile_codes = rows.tile_codes(row - r) + r * 4;
  float *tile_scales = rows.tile_scales(row - r) + r, *tile_sums = rows.tile_sums(row - r) + r;
  for (int64_t g = 0, block = 0; g < p.num_groups; ++g) {
    float group_sum = 0.f;
    for (int64_t b = 0; b < p.blocks_per_group; ++b, ++block) {
      float x[kBlock];
      alignas(kBlock) int8_t codes[kBlock];
      int32_t sum;
      const float scale = quantise_block(gather_block(input, p.input_order, block * kBlock, x), codes, sum);
      for (int64_t i = 0; i < kBlock; i += 4) __builtin_memcpy(tile_codes + (block * kBlock + i) * R, codes + i, 4);
      tile_scales[block * R] = scale;
      group_sum = fma(scale, static_cast<float>(sum), group_sum);
    }
    tile_sums[g * R] = group_sum;
  }
}

// `num_rows` rows from the first on, in scratch memory of the calling thread.
inline QuantisedRows quantise_rows(const GptqMatmulParams& p, int64_t first, int64_t num_rows, int num_threads) {
  const GptqLayout layout(p);
  const int64_t num_blocks = layout.num_blocks(), size = layout.packed_size();
  const int64_t row_floats = num_blocks + p.num_groups;
  auto* memory = static_cast<float*>(thread_scratch(Scratch::kShared, num_rows * (row_floats * sizeof(float) + size)));
  float *scales = memory, *sums = scales + num_rows * num_blocks;
  const QuantisedRows rows{reinterpret_cast<int8_t*>(sums + num_rows * p.num_groups),
                           scales,
                           sums,
                           first,
                           num_rows,
                           num_blocks,
                           p.num_groups};
  with_float_type(p.dtype, [&]<class T>(Type<T>) {
    const T* input = static_cast<const T*>(p.input) + first * p.input_stride;
    parallel_for(num_rows, task_grain(size * sizeof(T)), num_threads, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) quantise_row(p, input + row * p.input_stride, rows, row);
    });
  });
  return rows;
}

}  // namespace teco::cpu::TECO_ISA

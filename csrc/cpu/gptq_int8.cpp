// gptq_matmul with 8-bit activations: integer products, exact integer sums, and one fixed order of the float operations
// per output element, whatever the number of rows, the path or the thread:
//
//   for each group:  g = 0;  for each block of 32 inputs:  g = fma(row_scale[block], float(integer dot), g)
//                    acc = fma(scale, fma(-zero, row_sum[group], g), acc)
//
// row_sum is the sum of the quantised activations of a group, so that zero points cost one fma per group.
//
// Up to 8 rows: bound by reading the packed weights once; four panels are walked at a time as four streams from memory
// (one stream leaves a third of the bandwidth unused). More rows: bound by the multiply units; a panel is read from
// memory once and from L1 or L2 for every further 8 rows. Per 32 inputs, a row and 8 columns cost 8 dot products of 32
// bytes (with AVX2 a multiplication and an addition each, and one widening) and one fma.
#include "cpu/gptq_int8.h"

#include "cpu/gptq_layout.h"
#include "cpu/int8_dot.h"
#include "cpu/panel_matmul.h"

namespace teco::cpu::TECO_ISA {
namespace {

constexpr int kBatchRows = 8;                      // rows that share one reading of a group
constexpr int kTileRows = kDotTakesBytes ? 8 : 4;  // with 32 registers, with 16
constexpr int kStreams = 4;
constexpr int64_t kVisitBytes = 512;  // of a stream before the next one has its turn
constexpr int64_t kPrefetch = 1024;   // bytes ahead
// Past all caches into L1; but into L2 where the loop outruns memory and its own loads fill up the miss buffers of L1.
constexpr int kPrefetchLocality = kDotTakesBytes ? 1 : 0;
constexpr float kTiny = 1e-30f;  // a block whose inputs are all below this counts as zero

// Quantised activations in packed order. Rows come in tiles of kTileRows (the last tile has what is left); the R rows
// of a tile are interleaved, so that a kernel walks one stream and rows never compete for the same set of the L1 cache:
// codes [num_blocks * 8][R][4], scales [num_blocks][R], sums [num_groups][R].
struct QuantisedRows {
  int8_t* codes;
  float* scales;
  float* sums;  // scale * code, summed over a group
  int64_t count, num_blocks, num_groups;

  int64_t tile_rows(int64_t row) const { return min<int64_t>(count - row / kTileRows * kTileRows, kTileRows); }
  // Of the tile that begins with `row`.
  int8_t* tile_codes(int64_t row) const { return codes + row * num_blocks * kBlock; }
  float* tile_scales(int64_t row) const { return scales + row * num_blocks; }
  float* tile_sums(int64_t row) const { return sums + row * num_groups; }
};

inline float max_magnitude(const float* x) {
  F32x8 largest = splat(0.f);
  for (int i = 0; i < kBlock; i += kLanes) {
    const F32x8 v = load(x + i);
    largest = max(largest, max(v, -v));
  }
  return reduce_max(largest);
}

// NaN where the block holds a NaN or an infinity, else 0.
inline float poison(const float* x) {
  F32x8 sum = splat(0.f);
  for (int i = 0; i < kBlock; i += kLanes) sum += load(x + i) * splat(0.f);
  return reduce_add(sum);
}

// Quantises one block; returns its scale (NaN when an input is not finite) and adds the sum of its codes to `sum`.
inline float quantise_block(const float* x, int8_t* codes, int32_t& sum) {
  const float largest = max_magnitude(x);
  const float bad = poison(x);
  const bool usable = bad == 0 && largest > kTiny;
  const F32x8 inverse = splat(usable ? 127.f / largest : 0.f);
  I32x8 total = {};
  for (int i = 0; i < kBlock; i += kLanes) {
    const I32x8 code = round_to_int(usable ? load(x + i) * inverse : splat(0.f));
    total += code;
    store_bits(codes + i, __builtin_convertvector(code, I8x8));
  }
  for (int lane = 0; lane < kLanes; ++lane) sum += total[lane];
  return usable ? largest / 127.f : bad;
}

// 32 inputs of a row in packed order.
template <class T>
inline void gather_block(const T* row, const int32_t* order, int64_t place, float* x) {
  for (int i = 0; i < kBlock; i += kLanes) {
    if (order) {
      for (int lane = 0; lane < kLanes; ++lane) {
        const int32_t source = order[place + i + lane];
        x[i + lane] = source < 0 ? 0.f : load_one(row + source);
      }
    } else {
      store(x + i, load(row + place + i));
    }
  }
}

template <class T>
QuantisedRows quantise_rows(const GptqMatmulParams& p, const T* input, int64_t num_rows, int num_threads) {
  const GptqLayout layout(p);
  const int64_t num_blocks = layout.num_blocks(), size = layout.packed_size();
  const int64_t row_floats = num_blocks + p.num_groups;
  auto* memory = static_cast<float*>(thread_scratch(Scratch::kShared, num_rows * (row_floats * sizeof(float) + size)));
  float *scales = memory, *sums = scales + num_rows * num_blocks;
  const QuantisedRows rows{
      reinterpret_cast<int8_t*>(sums + num_rows * p.num_groups), scales, sums, num_rows, num_blocks, p.num_groups};
  parallel_for(num_rows, task_grain(size * sizeof(T)), num_threads, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t r = row % kTileRows, R = rows.tile_rows(row);
      int8_t* tile_codes = rows.tile_codes(row - r) + r * 4;
      float *tile_scales = rows.tile_scales(row - r) + r, *tile_sums = rows.tile_sums(row - r) + r;
      for (int64_t g = 0, block = 0; g < p.num_groups; ++g) {
        float group_sum = 0.f;
        for (int64_t b = 0; b < p.blocks_per_group; ++b, ++block) {
          float x[kBlock];
          gather_block(input + row * p.input_stride, p.input_order, block * kBlock, x);
          int8_t codes[kBlock];
          int32_t sum = 0;
          const float scale = quantise_block(x, codes, sum);
          for (int64_t i = 0; i < kBlock; i += 4) __builtin_memcpy(tile_codes + (block * kBlock + i) * R, codes + i, 4);
          tile_scales[block * R] = scale;
          group_sum = fma(scale, static_cast<float>(sum), group_sum);
        }
        tile_sums[g * R] = group_sum;
      }
    }
  });
  return rows;
}

// One block of 32 inputs, R rows by V vectors of 8 columns: exact integer dot products. Where products of whole bytes
// have no room, both nibbles of 8-bit weights are summed apart.
template <int kBits, int R, int V>
inline void dot_block(const uint8_t* weights, const int8_t* rows, I32x8 (&dot)[R][V]) {
  constexpr bool kNibbles = kBits == 8 && !kDotTakesBytes;
  DotSum low[R][V] = {}, high[R][V] = {};
#pragma GCC unroll 8
  for (int q = 0; q < 8; ++q) {  // flat: GCC keeps the tile of a nested unrolled loop in memory
    U8x32 low_codes[V], high_codes[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      const U32x8 quad = quad_codes<kBits>(weights, q, v);
      low_codes[v] = reinterpret_cast<U8x32>(kNibbles ? quad & 0x0f0f0f0fu : quad);
      keep_in_register(low_codes[v]);
      if constexpr (kNibbles) {
        high_codes[v] = reinterpret_cast<U8x32>((quad >> 4) & 0x0f0f0f0fu);
        keep_in_register(high_codes[v]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const int8_t* x = rows + (q * R + r) * 4;
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) {
        low[r][v] = dot_add(low[r][v], low_codes[v], x);
        keep_in_register(low[r][v]);
        if constexpr (kNibbles) {
          high[r][v] = dot_add(high[r][v], high_codes[v], x);
          keep_in_register(high[r][v]);
        }
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      dot[r][v] = dot_total(low[r][v]);
      if constexpr (kNibbles) dot[r][v] += dot_total(high[r][v]) << 4;
    }
}

// Consecutive groups of a panel by a tile of R rows, continuing acc[R][16].
struct GroupRun {
  const uint8_t* weights;  // of the first group
  int64_t begin, end;      // groups
};

// Never inlined: in a frame of its own GCC keeps the tile of sums in registers.
template <int kBits, int R>
[[gnu::noinline]] void accumulate_groups(const GroupRun& run, const GptqLayout& layout, const QuantisedRows& rows,
                                         int64_t row, float* acc) {
  // What fits into the registers: integer sums and fp32 sums of R x V, weights, an input.
  constexpr int V = R > 4 || (kBits == 8 && R > 2 && !kDotTakesBytes) ? 1 : kPanelVectors;
  const int64_t blocks = layout.blocks_per_group;
#pragma GCC unroll 1
  for (int half = 0; half < kPanelVectors; half += V) {
    const uint8_t* group = run.weights;
    const int8_t* codes = rows.tile_codes(row) + run.begin * blocks * kBlock * R;
    const float* scales = rows.tile_scales(row) + run.begin * blocks * R;
    const float* sums = rows.tile_sums(row) + run.begin * R;
    F32x8 total[R][V];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) total[r][v] = load(acc + r * kPanel + (half + v) * kLanes);
#pragma GCC unroll 1
    for (int64_t g = run.begin; g < run.end; ++g, sums += R) {
      const uint8_t* weights = group + kHeaderBytes + half * 32;
      F32x8 partial[R][V];
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) partial[r][v] = splat(0.f);
#pragma GCC unroll 1
      for (int64_t b = 0; b < blocks; ++b, weights += kBits * 64, codes += kBlock * R, scales += R) {
        I32x8 dot[R][V];
        if (half == 0)
          for (int line = 0; line < kBits; ++line)
            __builtin_prefetch(weights + kPrefetch + line * 64, 0, kPrefetchLocality);
        dot_block<kBits>(weights, codes, dot);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
          for (int v = 0; v < V; ++v) partial[r][v] = fma(splat(scales[r]), to_float(dot[r][v]), partial[r][v]);
      }
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) {
        const F32x8 scale = header_scale(group, half + v), zero = header_zero(group, half + v);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) total[r][v] = fma(scale, fma(-zero, splat(sums[r]), partial[r][v]), total[r][v]);
      }
      group += layout.group_bytes();
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) store(acc + r * kPanel + (half + v) * kLanes, total[r][v]);
  }
}

// The same for 1 to R rows.
template <int kBits, int R = kTileRows>
inline void accumulate_rows(int64_t num_rows, const GroupRun& run, const GptqLayout& layout, const QuantisedRows& rows,
                            int64_t row, float* acc) {
  if constexpr (R > 1) {
    if (num_rows < R) return accumulate_rows<kBits, R - 1>(num_rows, run, layout, rows, row, acc);
  }
  accumulate_groups<kBits, R>(run, layout, rows, row, acc);
}

// Up to 8 rows by panels [begin, end), S panels at a time; a stream is left after `visit` groups.
template <int S, int kBits, class T>
void multiply_rows(const GptqMatmulParams& p, const GptqLayout& layout, const QuantisedRows& rows, int64_t row0,
                   int64_t num_rows, T* out, int64_t begin, int64_t end) {
  const int64_t visit = S > 1 ? ceil_div<int64_t>(kVisitBytes, layout.group_bytes()) : layout.num_groups;
  const int64_t step = ceil_div<int64_t>(end - begin, S);  // each stream walks panels of its own
  for (int64_t i = begin; i < begin + step; ++i) {
    alignas(64) float acc[S][kBatchRows * kPanel];
    __builtin_memset(acc, 0, sizeof acc);
    for (int64_t g = 0; g < layout.num_groups; g += visit)
      for (int s = 0; s < S && i + s * step < end; ++s) {
        const GroupRun run{layout.group(i + s * step, g), g, min(g + visit, layout.num_groups)};
        for (int64_t r = 0; r < num_rows; r += kTileRows)
          accumulate_rows<kBits>(num_rows - r, run, layout, rows, row0 + r, acc[s] + r * kPanel);
      }
    for (int s = 0; s < S && i + s * step < end; ++s)
      for (int64_t r = 0; r < num_rows; ++r) {
        const int64_t column = (i + s * step) * kPanel;
        store_panel_row(out + (row0 + r) * p.out_stride + column, acc[s] + r * kPanel,
                        p.bias ? p.bias + column : nullptr, p.out_features - column);
      }
  }
}

template <int kBits, class T>
void multiply(const GptqMatmulParams& p, const QuantisedRows& rows, T* out, int num_threads) {
  const GptqLayout layout(p);
  const int64_t num_panels = ceil_div<int64_t>(p.out_features, kPanel);
  parallel_for(num_panels, task_grain(layout.panel_bytes() * rows.count), num_threads, [&](int64_t begin, int64_t end) {
    if (rows.count <= kBatchRows) {
      multiply_rows<kStreams, kBits>(p, layout, rows, 0, rows.count, out, begin, end);
      return;
    }
    for (int64_t panel = begin; panel < end; ++panel)
      for (int64_t row = 0; row < rows.count; row += kBatchRows)
        multiply_rows<1, kBits>(p, layout, rows, row, min<int64_t>(rows.count - row, kBatchRows), out, panel,
                                panel + 1);
  });
}

}  // namespace

void gptq_matmul_int8(const GptqMatmulParams& p, int num_threads) {
  with_float_type(p.dtype, [&]<class T>(Type<T>) {
    for (int64_t row = 0; row < p.num_rows; row += kScratchRows) {
      const int64_t count = min(p.num_rows - row, kScratchRows);
      const QuantisedRows rows =
          quantise_rows(p, static_cast<const T*>(p.input) + row * p.input_stride, count, num_threads);
      T* out = static_cast<T*>(p.out) + row * p.out_stride;
      with_bits(p.bits, [&]<int kBits>(Bits<kBits>) { multiply<kBits>(p, rows, out, num_threads); });
    }
  });
}

}  // namespace teco::cpu::TECO_ISA

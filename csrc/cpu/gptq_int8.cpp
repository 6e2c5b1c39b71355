// gptq_matmul with 8-bit activations: integer products, exact integer sums, and one fixed order of the float operations
// per output element, whatever the number of rows, the path or the thread:
//
//   for each group:  g = 0;  for each block of 32 inputs:  g = fma(row_scale[block], float(integer dot), g)
//                    acc = fma(scale, fma(-zero, row_sum[group], g), acc)
//                    or, with minima: fma(minimum, row_sum[group], fma(scale, g, acc))
//
// row_sum is the sum of the quantised activations of a group, so that zero points and minima cost one fma per group.
// With sections of groups, acc begins anew with each, and these sums are added exactly.
//
// Up to 4 rows: bound by reading the packed weights once; four panels (two, from 3 rows on) are walked at a time as
// streams from memory, as one stream leaves a third of the bandwidth unused. More rows: bound by the multiply units; a
// panel is read from memory once and from L1 or L2 for every further tile of rows. Per 32 inputs, a row and a vector of
// columns cost 8 dot products (with AVX2 a multiplication and an addition each, and one widening; of 8 bits twice as
// many, of halves) and one fma.
#include "cpu/exact_sums.h"
#include "cpu/int8_rows.h"
#include "cpu/matmul.h"

namespace teco::cpu::TECO_ISA {
namespace {

constexpr int kStreams = 4;          // panels at a time, where there are few rows; a task is a multiple of it
constexpr int64_t kPrefetch = 1024;  // bytes ahead
// Past all caches into L1; but into L2 where the loop outruns memory and its own loads fill up the miss buffers of L1.
constexpr int kPrefetchLocality = kDotTakesBytes ? 1 : 0;

// One block of 32 inputs, R rows by V vectors of columns: exact integer dot products. Where products of whole bytes
// have no room, both nibbles of 8-bit weights are summed apart.
template <int kBits, int R, int V>
inline void dot_block(const uint8_t* weights, int part, const int8_t* rows, WideI32 (&dot)[R][V]) {
  constexpr bool kNibbles = kBits == 8 && !kDotTakesBytes;
  // Few rows make few chains of dependent products, and a processor looks only so far ahead: cut them into shorter
  // ones.
  constexpr int kChains = max(1, 4 / (R * V));
  DotSum low[R][V][kChains] = {}, high[R][V] = {};
#pragma GCC unroll 8
  for (int q = 0; q < 8; ++q) {  // flat: GCC keeps the tile of a nested unrolled loop in memory
    WideU8 low_codes[V], high_codes[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      const WideU32 quad = quad_codes<kBits, WideU32>(weights, q, part + v);
      low_codes[v] = reinterpret_cast<WideU8>(kNibbles ? quad & 0x0f0f0f0fu : quad);
      keep_in_register(low_codes[v]);
      if constexpr (kNibbles) {
        high_codes[v] = reinterpret_cast<WideU8>((quad >> 4) & 0x0f0f0f0fu);
        keep_in_register(high_codes[v]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const int8_t* x = rows + (q * R + r) * 4;
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) {
        low[r][v][q % kChains] = dot_add(low[r][v][q % kChains], low_codes[v], x);
        keep_in_register(low[r][v][q % kChains]);
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
      for (int c = 1; c < kChains; ++c) low[r][v][0] += low[r][v][c];
      dot[r][v] = dot_total(low[r][v][0]);
      if constexpr (kNibbles) dot[r][v] += dot_total(high[r][v]) << 4;
    }
}

// Consecutive groups of a panel.
struct Groups {
  int64_t first, count;
};

// Groups of S panels, one after the other and in turns, by a tile of R rows; acc[S][R][16]. Never inlined: in a frame
// of its own GCC keeps the tile of sums in registers.
template <int kBits, bool kMinimum, int R, int S>
[[gnu::noinline]] void multiply_tile(const uint8_t* const* panels, const GptqLayout& layout, Groups groups,
                                     const QuantisedRows& rows, int64_t row, float* acc) {
  constexpr int kParts = kPanel / kWideLanes;
  // What fits into the registers, with AVX-512 at least: integer sums and fp32 sums of R x V, weights, an input.
  constexpr int V = R > 4 || (kBits == 8 && R > 2 && !kDotTakesBytes) ? 1 : kParts;
  const int64_t blocks = layout.blocks_per_group, group_bytes = layout.group_bytes();
  const bool first_visit = row == 0;
  for (int part = 0; part < kParts; part += V) {
    const int8_t* codes = rows.tile_codes(row) + groups.first * blocks * kBlock * R;
    const float* scales = rows.tile_scales(row) + groups.first * blocks * R;
    const float* sums = rows.tile_sums(row) + groups.first * R;
    WideF32 total[S][R][V];
#pragma GCC unroll 4
    for (int s = 0; s < S; ++s)
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) total[s][r][v] = wide_splat(0.f);
    const int64_t end = (groups.first + groups.count) * group_bytes;
    for (int64_t offset = groups.first * group_bytes; offset < end; offset += group_bytes) {
#pragma GCC unroll 4
      for (int s = 0; s < S; ++s) {
        const uint8_t *group = panels[s] + offset, *weights = group + kHeaderBytes;
        WideF32 partial[R][V];
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
          for (int v = 0; v < V; ++v) partial[r][v] = wide_splat(0.f);
#pragma GCC unroll 1
        for (int64_t b = 0; b < blocks; ++b, weights += kBits * 64) {
          if (part == 0 && first_visit)
            for (int line = 0; line < kBits; ++line)
              __builtin_prefetch(weights + kPrefetch + line * 64, 0, kPrefetchLocality);
          WideI32 dot[R][V];
          dot_block<kBits>(weights, part, codes + b * kBlock * R, dot);
#pragma GCC unroll 8
          for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
            for (int v = 0; v < V; ++v)
              partial[r][v] = fma(wide_splat(scales[b * R + r]), to_float(dot[r][v]), partial[r][v]);
        }
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) {
          const WideF32 scale = header_scale<WideU16>(group, part + v), shift = header_offset<WideU16>(group, part + v);
#pragma GCC unroll 8
          for (int r = 0; r < R; ++r)
            total[s][r][v] = kMinimum ? fma(shift, wide_splat(sums[r]), fma(scale, partial[r][v], total[s][r][v]))
                                      : fma(scale, fma(-shift, wide_splat(sums[r]), partial[r][v]), total[s][r][v]);
        }
      }
      codes += blocks * kBlock * R;
      scales += blocks * R;
      sums += R;
    }
#pragma GCC unroll 4
    for (int s = 0; s < S; ++s)
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) store_bits(acc + (s * R + r) * kPanel + (part + v) * kWideLanes, total[s][r][v]);
  }
}

// The same for 1 to R rows.
template <int kBits, bool kMinimum, int S, int R>
inline void multiply_tile_of(int64_t num_rows, const uint8_t* const* panels, const GptqLayout& layout, Groups groups,
                             const QuantisedRows& rows, int64_t row, float* acc) {
  if constexpr (R > 1) {
    if (num_rows < R)
      return multiply_tile_of<kBits, kMinimum, S, R - 1>(num_rows, panels, layout, groups, rows, row, acc);
  }
  multiply_tile<kBits, kMinimum, R, S>(panels, layout, groups, rows, row, acc);
}

// S whole panels by the tile that begins with `row`, of up to R rows, to the sink.
template <int kBits, bool kMinimum, int S, int R>
void multiply_whole(const GptqMatmulParams& p, const GptqLayout& layout, const QuantisedRows& rows, int64_t row,
                    const int64_t* panels, const PanelSink& sink) {
  const int64_t num_rows = rows.tile_rows(row), panel_sums = num_rows * kPanel;
  const uint8_t* weights[S];
  for (int s = 0; s < S; ++s) weights[s] = layout.group(panels[s], 0);
  alignas(64) float acc[S * R * kPanel];
  if (p.groups_per_section == 0) {
    multiply_tile_of<kBits, kMinimum, S, R>(num_rows, weights, layout, {0, layout.num_groups}, rows, row, acc);
  } else {
    alignas(64) double sums[S * R * kPanel];
    for (int s = 0; s < S; ++s) begin_exact(p, panels[s], num_rows, sums + s * panel_sums);
    for (Groups section{0, 0}; section.first < layout.num_groups; section.first += section.count) {
      section.count = min(p.groups_per_section, layout.num_groups - section.first);
      multiply_tile_of<kBits, kMinimum, S, R>(num_rows, weights, layout, section, rows, row, acc);
      add_exact(acc, sums, S * panel_sums);
    }
    if (p.exact_out) {
      for (int s = 0; s < S; ++s) store_exact(p, rows.first + row, num_rows, sums + s * panel_sums, panels[s]);
      return;
    }
    round_exact(sums, acc, S * panel_sums);
  }
  for (int s = 0; s < S; ++s) sink(rows.first + row, num_rows, acc + s * panel_sums, panels[s]);
}

// All rows, which are one tile, by panels [begin, end), in S streams: each walks panels of its own.
template <int kBits, bool kMinimum, int S, int R>
void multiply_streams(const GptqMatmulParams& p, const GptqLayout& layout, const QuantisedRows& rows,
                      const PanelSink& sink, int64_t begin, int64_t end) {
  const int64_t step = ceil_div<int64_t>(end - begin, S);
  for (int64_t first = begin; first < begin + step; ++first) {
    int64_t panels[S];
    int active = 0;
    for (int64_t panel = first; panel < end && active < S; panel += step) panels[active++] = panel;
    if (active == S) {
      multiply_whole<kBits, kMinimum, S, R>(p, layout, rows, 0, panels, sink);
    } else {
      for (int s = 0; s < active; ++s) multiply_whole<kBits, kMinimum, 1, R>(p, layout, rows, 0, panels + s, sink);
    }
  }
}

template <int kBits, bool kMinimum>
void multiply(const GptqMatmulParams& p, const QuantisedRows& rows, const PanelSink& sink, int num_threads) {
  const GptqLayout layout(p);
  const int64_t num_panels = ceil_div<int64_t>(p.out_features, kPanel);
  const int64_t task_bytes = kStreams * layout.panel_bytes() * rows.count;
  parallel_for(ceil_div<int64_t>(num_panels, kStreams), task_grain(task_bytes), num_threads,
               [&](int64_t first, int64_t last) {
                 const int64_t begin = first * kStreams, end = min(last * kStreams, num_panels);
                 if (rows.count <= 2)
                   return multiply_streams<kBits, kMinimum, kStreams, 2>(p, layout, rows, sink, begin, end);
                 if (rows.count <= 4)
                   return multiply_streams<kBits, kMinimum, kStreams / 2, 4>(p, layout, rows, sink, begin, end);
                 for (int64_t panel = begin; panel < end; ++panel)
                   for (int64_t row = 0; row < rows.count; row += kTileRows)
                     multiply_whole<kBits, kMinimum, 1, kTileRows>(p, layout, rows, row, &panel, sink);
               });
}

}  // namespace

void multiply_gptq_int8(const GptqMatmulParams& p, const PanelSink& sink, int num_threads) {
  for (int64_t row = 0; row < p.num_rows; row += kScratchRows) {
    const QuantisedRows rows = quantise_rows(p, row, min(p.num_rows - row, kScratchRows), num_threads);
    with_format(p, [&]<int kBits, bool kMinimum>(Format<kBits, kMinimum>) {
      multiply<kBits, kMinimum>(p, rows, sink, num_threads);
    });
  }
}

}  // namespace teco::cpu::TECO_ISA

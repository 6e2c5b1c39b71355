// Sums that do not depend on the order of their summands: multiples of 2^-32, added in fp64. See GptqMatmulParams.
//
// Per section, a row and the 16 columns of a panel cost two conversions and six additions of vectors of 8, besides what
// it takes to begin a tile anew; with 256 inputs to a section, their products cost 64 and more.
#pragma once

#include "cpu/matmul.h"
#include "cpu/wide.h"

namespace teco::cpu::TECO_ISA {

// The nearest multiple of 2^-32, or of more where the sum is so large that fp64 does not tell these apart: kGrid is a
// number whose neighbours are 2^-32 away, and so are those of all that is within 2^19 of it.
constexpr double kGrid = 1.5 * (1 << 20);

inline double snap(float sum) {
  return (static_cast<double>(sum) + kGrid) - kGrid;
}

// sums[num_rows][16] of a panel, before the first section.
inline void begin_exact(const GptqMatmulParams& p, int64_t panel, int64_t num_rows, double* sums) {
  __builtin_memset(sums, 0, num_rows * kPanel * sizeof(double));
  if (!p.bias) return;
  const int64_t column = panel * kPanel, columns = min<int64_t>(kPanel, p.out_features - column);
  for (int64_t r = 0; r < num_rows; ++r)
    for (int64_t i = 0; i < columns; ++i) sums[r * kPanel + i] = snap(p.bias[column + i]);
}

// count: a multiple of 16.
inline void add_exact(const float* section, double* sums, int64_t count) {
  for (int64_t i = 0; i < count; i += kWideLanes / 2) {
    const WideF64 sum = to_double(load_bits<HalfF32>(section + i));
    store_bits(sums + i, load_bits<WideF64>(sums + i) + ((sum + kGrid) - kGrid));
  }
}

inline void round_exact(const double* sums, float* rounded, int64_t count) {
  for (int64_t i = 0; i < count; i += kWideLanes / 2) store_bits(rounded + i, to_single(load_bits<WideF64>(sums + i)));
}

// To p.exact_out.
inline void store_exact(const GptqMatmulParams& p, int64_t row, int64_t num_rows, const double* sums, int64_t panel) {
  const int64_t column = panel * kPanel, columns = min<int64_t>(kPanel, p.out_features - column);
  for (int64_t r = 0; r < num_rows; ++r)
    for (int64_t i = 0; i < columns; ++i) p.exact_out[(row + r) * p.out_stride + column + i] = sums[r * kPanel + i];
}

}  // namespace teco::cpu::TECO_ISA

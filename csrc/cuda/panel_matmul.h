// Matmul for few rows by a weight of floating-point numbers: bound by reading the weight, once per tile of 8 rows.
//
// A block makes one panel of 16 columns for a tile of rows. Its warps deal out the blocks of 32 inputs among them; a
// warp reads its part of the weight by 16 bytes to a lane, and its inputs lie in shared memory as fp32. What a lane's
// 16 bytes are is told by the weight, see below. The sum of an output element: over a lane's inputs in order, then the
// lanes, then the warps one after the other. It is the same for any number of rows that come here.
#pragma once

#include "cuda/matmul.h"

namespace teco::cuda {

constexpr int kPanelWarps = 8;  // part of the order of the sum
constexpr int kPanelThreads = kPanelWarps * kWarpSize;
constexpr int kPanelRows = 8;

template <int kRows>
struct Rows {};

// Inputs of a block, as fp32.
template <int kRows>
using InputBlock = float[kRows][kBlock];

template <int kRows>
struct PanelShared {
  alignas(16) InputBlock<kRows> input[kPanelWarps];
  float sum[kPanelWarps][kRows][kPanel];
};

// The body of a kernel. A Weight has
//   Fragment             a lane's weights of a block, and load(panel, block) that fetches them;
//   kColumns             columns that a lane has sums of, in every row;
//   multiply(fragment, input, rows, sums)  adds the products to sums[rows][kColumns];
//   collect(sums, out)   adds up over the lanes: out[rows][16].
template <int kRows, class Weight, class Params>
__device__ __forceinline__ void multiply_panel(const Params& p, const Weight& weight, const PanelBest& best) {
  PanelShared<kRows>& memory = shared<PanelShared<kRows>>();
  const int64_t panel = blockIdx.y, first_row = static_cast<int64_t>(blockIdx.x) * kRows;
  const auto rows = static_cast<int>(smaller<int64_t>(p.num_rows - first_row, kRows));
  InputBlock<kRows>& input = memory.input[warp_id()];

  float sums[kRows][Weight::kColumns] = {};
  for (int64_t k = warp_id() * kBlock; k < p.in_features; k += kPanelWarps * kBlock) {
    const typename Weight::Fragment fragment = weight.load(panel, k);
    const bool is_there = k + lane_id() < p.in_features;
    __syncwarp();  // the inputs of the last block are done with
    for (int r = 0; r < rows; ++r)
      input[r][lane_id()] =
          is_there ? load_as_float(p.input, (first_row + r) * p.input_stride + k + lane_id(), p.dtype) : 0.f;
    __syncwarp();
    weight.multiply(fragment, input, rows, sums);
  }
  weight.collect(sums, memory.sum[warp_id()]);
  __syncthreads();
  // Whole warps, so that the lanes of a row can be added up.
  for (int i = thread_id(); i < larger(kRows * kPanel, kWarpSize); i += kPanelThreads) {
    float sum[1] = {};
    if (i < rows * kPanel)
#pragma unroll
      for (int w = 0; w < kPanelWarps; ++w) sum[0] += memory.sum[w][i / kPanel][i % kPanel];
    take_panel<kPanel>(p, best, i < rows * kPanel ? first_row + i / kPanel : p.num_rows, panel, sum,
                       [&](int) { return i % kPanel; });
  }
}

// A weight whose lines are the 16 columns of a panel: a lane has kVector<W> neighbouring columns of several lines.
template <class W>
struct Lines {
  static constexpr int kColumns = kVector<W>;
  static constexpr int kParts = kPanel / kColumns;
  static constexpr int kAtATime = kWarpSize / kParts;

  __device__ static int part() { return lane_id() % kParts; }
  // Of those that the warp reads at a time.
  __device__ static int line() { return lane_id() / kParts; }

  template <int kRows>
  __device__ static void collect(const float (&sums)[kRows][kColumns], float (&out)[kRows][kPanel]) {
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        const float sum = warp_sum<kWarpSize / 2, kParts>(sums[r][c]);
        if (line() == 0) out[r][part() * kColumns + c] = sum;
      }
  }
};

// Launches run(Rows<n>{}, grid), n rows being a block's.
template <class Params, class Run>
Status launch_panels(const Params& p, Run run) {
  const auto grid = [&](int rows) {
    return dim3{static_cast<unsigned>(ceil_div<int64_t>(p.num_rows, rows)),
                static_cast<unsigned>(ceil_div<int64_t>(p.out_features, kPanel))};
  };
  return p.num_rows == 1 ? run(Rows<1>{}, grid(1)) : run(Rows<kPanelRows>{}, grid(kPanelRows));
}

}  // namespace teco::cuda

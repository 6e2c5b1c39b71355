// Matmul for many rows of fp16 or bf16, by tensor cores: bound by them, and by the unpacking of weights, for some
// hundred rows; by latency for fewer, as inputs are not split among blocks.
//
// A block makes 64 rows x 64 columns, four panels, in steps of 32 inputs. In a step the inputs arrive by cp.async in
// one of two buffers while the last step is multiplied, and the weights in registers, as they lie in memory; they are
// unpacked to the inputs' dtype in shared memory. Each of four warps multiplies 32 x 32. Rows in shared memory are 80
// bytes apart, so that the eight rows of an ldmatrix lie in different banks.
//
// Sums are fp32 and follow the inputs in steps of 16, in the same order for every row.
#pragma once

#include "cuda/matmul.h"

namespace teco::cuda {

constexpr int kTile = 64;  // rows, and columns
constexpr int kTileThreads = 128;
constexpr int kTileStride = kBlock + 8;
constexpr int kWarpTile = 32;
constexpr int kCopy = 8;  // elements of 16 bytes

// A step's inputs by row, or weights by column.
template <class T>
using Tile = T[kTile][kTileStride];

template <class T>
struct TileShared {
  alignas(16) Tile<T> input[2];
  alignas(16) Tile<T> weight;
};

// The inputs that a weight counts on, in its order.
struct PackedInputs {
  const int32_t* order;  // input at each place, -1 for padding; null when that is 0, 1, 2, ...
  int64_t size;          // inputs that there are
  bool vectors;          // 16 bytes at a time
};
template <class T, class Params>
PackedInputs packed_inputs(const Params& p, const int32_t* order) {
  return {order, p.in_features,
          !order && p.in_features % kCopy == 0 && is_aligned(static_cast<const T*>(p.input), p.input_stride, 16)};
}

// The inputs of block b into a buffer; zeros for what is not there.
template <class T, class Params>
__device__ __forceinline__ void fetch_input(const Params& p, const PackedInputs& inputs, int64_t first_row, int b,
                                            Tile<T>& buffer) {
  const T* input = static_cast<const T*>(p.input);
  if (inputs.vectors) {
    for (int i = thread_id(); i < kTile * kBlock / kCopy; i += kTileThreads) {
      const int r = i / (kBlock / kCopy), k = i % (kBlock / kCopy) * kCopy;
      const int64_t place = static_cast<int64_t>(b) * kBlock + k;
      const bool is_there = first_row + r < p.num_rows && place < inputs.size;
      ptx::copy_16_async(&buffer[r][k], is_there ? input + (first_row + r) * p.input_stride + place : input, is_there);
    }
  } else {
    for (int i = thread_id(); i < kTile * kBlock; i += kTileThreads) {
      const int r = i / kBlock, k = i % kBlock;
      const int64_t place = static_cast<int64_t>(b) * kBlock + k;
      const int64_t column = inputs.order ? inputs.order[place] : place < inputs.size ? place : -1;
      const bool is_there = first_row + r < p.num_rows && column >= 0;
      buffer[r][k] = is_there ? input[(first_row + r) * p.input_stride + column] : T{0};
    }
  }
  ptx::commit_copies();
}

// The warp's 32 x 32 products of a block: sums[row tile of 16][column tile of 8][fragment].
template <class T>
__device__ __forceinline__ void multiply_tile(const Tile<T>& input, const Tile<T>& weight, float (&sums)[2][4][4]) {
  const int row = warp_id() / 2 * kWarpTile, column = warp_id() % 2 * kWarpTile, lane = lane_id();
#pragma unroll
  for (int k = 0; k < kBlock; k += 16) {
    ptx::Words<4> a[2], b[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      a[i] = ptx::load_matrices(&input[row + i * 16 + lane % 16][k + lane / 16 * 8]);
      b[i] = ptx::load_matrices(&weight[column + i * 16 + lane % 8 + lane / 16 * 8][k + lane / 8 % 2 * 8]);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const uint32_t low = b[j / 2].at[j % 2 * 2], high = b[j / 2].at[j % 2 * 2 + 1];
        if constexpr (std::is_same_v<T, Half>) {
          ptx::multiply_half(sums[i][j], a[i], low, high);
        } else {
          ptx::multiply_bfloat16(sums[i][j], a[i], low, high);
        }
      }
  }
}

// The body of a kernel. A Weight has
//   Fragment                     a thread's weights of a block, and fetch(first_column, b) that loads them;
//   unpack(fragment, Tile<T>&)   writes all threads' weights by column, zeros for inputs that are not there.
template <class T, class Weight, class Params>
__device__ __forceinline__ void multiply_tiles(const Params& p, const Weight& weight, const PackedInputs& inputs,
                                               int num_blocks, const PanelBest& best) {
  TileShared<T>& memory = shared<TileShared<T>, sizeof(T)>();
  const int64_t first_column = static_cast<int64_t>(blockIdx.y) * kTile;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * kTile;

  float sums[2][4][4] = {};
  typename Weight::Fragment fragment = {};
  if (num_blocks > 0) {
    fetch_input<T>(p, inputs, first_row, 0, memory.input[0]);
    fragment = weight.fetch(first_column, 0);
  }
  for (int b = 0; b < num_blocks; ++b) {
    weight.unpack(fragment, memory.weight);
    ptx::wait_for_copies<0>();
    __syncthreads();
    if (b + 1 < num_blocks) {
      fetch_input<T>(p, inputs, first_row, b + 1, memory.input[(b + 1) % 2]);
      fragment = weight.fetch(first_column, b + 1);
    }
    multiply_tile<T>(memory.input[b % 2], memory.weight, sums);
    __syncthreads();  // the weights are done with, and so is the other buffer
  }

  // A row of a panel lies in four lanes, four sums to each.
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int panel = 0; panel < kWarpTile / kPanel; ++panel) {
      const int64_t row = first_row + warp_id() / 2 * kWarpTile + i / 2 * 16 + lane_id() / 4 + i % 2 * 8;
      const int64_t first = first_column + warp_id() % 2 * kWarpTile + panel * kPanel;
      const float (&low)[4] = sums[i / 2][2 * panel], (&high)[4] = sums[i / 2][2 * panel + 1];
      const float of_row[4] = {low[i % 2 * 2], low[i % 2 * 2 + 1], high[i % 2 * 2], high[i % 2 * 2 + 1]};
      take_panel<4>(p, best, row, first / kPanel, of_row, [](int j) { return j / 2 * 8 + lane_id() % 4 * 2 + j % 2; });
    }
}

template <class Params>
dim3 tile_grid(const Params& p) {
  return {static_cast<unsigned>(ceil_div<int64_t>(p.num_rows, kTile)),
          static_cast<unsigned>(ceil_div<int64_t>(p.out_features, kTile))};
}

}  // namespace teco::cuda

// Matmul with a GPTQ weight for many rows of fp16 or bf16, by tensor cores: bound by them for some hundred rows, by
// reading the weight for fewer.
//
// A block makes 64 rows x 64 columns, four panels, in steps of one block of 32 inputs. In a step the inputs arrive by
// cp.async in one of two buffers while the last step is multiplied, and the codes in registers; they are unpacked to
// the inputs' dtype in shared memory. Each of four warps multiplies 32 x 32. Rows in shared memory are 80 bytes apart,
// so that the eight rows of an ldmatrix lie in different banks.
//
// Sums are fp32 and follow the inputs in steps of 16, in the same order for every row. A weight is rounded once to the
// inputs' dtype, as in a dequantised checkpoint.
#include "cuda/gptq_matmul.h"

namespace teco::cuda {
namespace {

constexpr int kTile = 64;  // rows, and columns
constexpr int kThreads = 128;
constexpr int kStride = kBlock + 8;
constexpr int kWarpTile = 32;
constexpr int kQuads = kBlock / 4;
constexpr int kCopy = 8;  // elements of 16 bytes

template <class T>
struct Shared {
  alignas(16) T input[2][kTile][kStride];
  alignas(16) T weight[kTile][kStride];  // by column
};

// The inputs of block b into a buffer; rows that are not there are zeros, padding of the packed order too.
template <class T>
__device__ __forceinline__ void fetch_input(const GptqMatmulParams& p, int64_t first_row, int b, bool vectors,
                                            T (&buffer)[kTile][kStride]) {
  const T* input = static_cast<const T*>(p.input);
  if (vectors && !p.input_order) {
    for (int i = thread_id(); i < kTile * kBlock / kCopy; i += kThreads) {
      const int r = i / (kBlock / kCopy), k = i % (kBlock / kCopy) * kCopy;
      const bool is_there = first_row + r < p.num_rows;
      const T* source = input + (is_there ? first_row + r : 0) * p.input_stride + static_cast<int64_t>(b) * kBlock + k;
      ptx::copy_16_async(&buffer[r][k], source, is_there);
    }
  } else {
    for (int i = thread_id(); i < kTile * kBlock; i += kThreads) {
      const int r = i / kBlock, k = i % kBlock;
      const int64_t place = static_cast<int64_t>(b) * kBlock + k, column = p.input_order ? p.input_order[place] : place;
      const bool is_there = first_row + r < p.num_rows && column >= 0;
      buffer[r][k] = is_there ? input[(first_row + r) * p.input_stride + column] : T{0};
    }
  }
  ptx::commit_copies();
}

// A thread's share of the codes of a block: half of the quads of a column.
struct Codes {
  uint32_t quads[kQuads / 2];
  Header header;
};
template <int kBits>
__device__ __forceinline__ Codes fetch_codes(const GptqLayout& layout, int64_t first_column, int64_t num_panels,
                                             int b) {
  Codes codes = {};
  const int64_t column = first_column + thread_id() % kTile;
  if (column / kPanel >= num_panels) return codes;
  const uint8_t* group = layout.group(column / kPanel, b / layout.blocks_per_group);
  const uint8_t* block = layout.block(group, b);
  codes.header = load_header(group, static_cast<int>(column % kPanel));
#pragma unroll
  for (int i = 0; i < kQuads / 2; ++i)
    codes.quads[i] = quad_codes<kBits>(block, 2 * i + thread_id() / kTile, static_cast<int>(column % kPanel));
  return codes;
}

template <bool kMinimum, class T>
__device__ __forceinline__ void unpack(const Codes& codes, T (&weight)[kTile][kStride]) {
#pragma unroll
  for (int i = 0; i < kQuads / 2; ++i) {
    Pack<T, 4> values;
#pragma unroll
    for (int j = 0; j < 4; ++j) set(values.at[j], dequantize<kMinimum>(codes.quads[i] >> (8 * j) & 255u, codes.header));
    store<4>(&weight[thread_id() % kTile][4 * (2 * i + thread_id() / kTile)], values);
  }
}

// The warp's 32 x 32 products of a block: sums[row tile of 16][column tile of 8][fragment].
template <class T>
__device__ __forceinline__ void multiply(const T (&input)[kTile][kStride], const T (&weight)[kTile][kStride],
                                         float (&sums)[2][4][4]) {
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

template <int kBits, bool kMinimum, class T>
__global__ void __launch_bounds__(kThreads, 3) gptq_tensor_cores_kernel(GptqMatmulParams p, bool vectors) {
  Shared<T>& memory = shared<Shared<T>, sizeof(T)>();
  const GptqLayout layout(p);
  const int64_t first_column = static_cast<int64_t>(blockIdx.x) * kTile;
  const int64_t first_row = static_cast<int64_t>(blockIdx.y) * kTile;
  const int64_t num_panels = ceil_div<int64_t>(p.out_features, kPanel);
  const int num_blocks = layout.num_blocks();

  float sums[2][4][4] = {};
  fetch_input(p, first_row, 0, vectors, memory.input[0]);
  Codes codes = fetch_codes<kBits>(layout, first_column, num_panels, 0);
  for (int b = 0; b < num_blocks; ++b) {
    unpack<kMinimum>(codes, memory.weight);
    ptx::wait_for_copies<0>();
    __syncthreads();
    if (b + 1 < num_blocks) {
      fetch_input(p, first_row, b + 1, vectors, memory.input[(b + 1) % 2]);
      codes = fetch_codes<kBits>(layout, first_column, num_panels, b + 1);
    }
    multiply(memory.input[b % 2], memory.weight, sums);
    __syncthreads();  // the weights are done with, and so is the other buffer
  }

#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int f = 0; f < 4; ++f) {
        const int64_t row = first_row + warp_id() / 2 * kWarpTile + i * 16 + lane_id() / 4 + f / 2 * 8;
        const int64_t column = first_column + warp_id() % 2 * kWarpTile + j * 8 + lane_id() % 4 * 2 + f % 2;
        if (row >= p.num_rows || column >= p.out_features) continue;
        const float sum = p.bias ? sums[i][j][f] + p.bias[column] : sums[i][j][f];
        set(static_cast<T*>(p.out)[row * p.out_stride + column], sum);
      }
}

}  // namespace

Status gptq_matmul_tensor_cores(const GptqMatmulParams& p, void* stream) {
  const dim3 grid = {static_cast<unsigned>(ceil_div<int64_t>(p.out_features, kTile)),
                     static_cast<unsigned>(ceil_div<int64_t>(p.num_rows, kTile))};
  return with_format(p, [&]<int kBits, bool kMinimum>(Format<kBits, kMinimum>) {
    const auto run = [&]<class T>(Type<T>) {
      return launch("gptq_matmul", grid, dim3{kThreads}, {}, stream, gptq_tensor_cores_kernel<kBits, kMinimum, T>, p,
                    is_aligned(static_cast<const T*>(p.input), p.input_stride, 16));
    };
    return p.dtype == DType::kFloat16 ? run(Type<Half>{}) : run(Type<BFloat16>{});
  });
}

}  // namespace teco::cuda

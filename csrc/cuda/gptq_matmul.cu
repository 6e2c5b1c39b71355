// Matmul with a GPTQ weight for few rows: bound by reading the weight, once per tile of 8 rows.
//
// A block makes one panel of 16 columns for a tile of rows. Its warps deal out the blocks of 32 inputs among them; in a
// warp, lanes are columns, twice: one half takes the even quads of a block, the other the odd ones. A weight is read in
// words of four bytes, 64 bytes of neighbouring columns at a time, and unpacked in registers; inputs lie in shared
// memory, a slice per warp. The sum of an output element: over a lane's inputs in order, then the halves, then the
// warps one after the other. It is the same for any number of rows (but see kMaxRows).
//
// Exact mode: fp32 arithmetic on scale * (code - zero). Int8 mode: inputs are quantised per row and block, products and
// their sums are integers. With sections (see GptqMatmulParams) a warp takes whole ones, whose sums are its lanes'
// alone: the same bits wherever a section stands. They are added in fp64, in any order.
#include "cuda/gptq_matmul.h"

namespace teco::cuda {
namespace {

constexpr int kWarps = 8;  // part of the order of the sum
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kTileRows = 8;
constexpr int kMaxRows = 16;  // beyond it, 16-bit dtypes go to the tensor cores: another order of sums, other bits
constexpr int kQuads = kBlock / 4;
constexpr float kTiny = 1e-30f;  // a block whose inputs are all below this counts as zero

template <int kRows>
struct Rows {};

enum class Mode { kExact, kInt8, kInt8Sections };

// The nearest multiple of 2^-32, or of more where the sum is so large that fp64 does not tell these apart: kGrid is a
// number whose neighbours are 2^-32 away, and so are those of all that is within 2^19 of it.
constexpr double kGrid = 1.5 * (1 << 20);
__device__ __forceinline__ double snap(float sum) {
  return (static_cast<double>(sum) + kGrid) - kGrid;
}

template <int kRows>
struct alignas(16) Slice {
  float input[kRows][kBlock];     // exact mode
  uint32_t codes[kRows][kQuads];  // int8 mode: four inputs to a word
  float scale[kRows];
};

template <int kRows, class Sum>
struct Shared {
  Slice<kRows> slice[kWarps];
  Sum sum[kWarps][kRows][kPanel];
};

// This lane's input of a block, for one row.
__device__ __forceinline__ float load_input(const GptqMatmulParams& p, int64_t row, int64_t input) {
  return input < 0 ? 0.f : load_as_float(p.input, row * p.input_stride + input, p.dtype);
}

// The block's inputs of all rows into the warp's slice, as codes with a scale: x = scale * code.
template <int kRows>
__device__ void quantise_inputs(const GptqMatmulParams& p, int64_t first_row, int rows, int64_t input,
                                Slice<kRows>& slice) {
  for (int r = 0; r < rows; ++r) {
    const float x = load_input(p, first_row + r, input), largest = warp_max(fabsf(x));
    const float inverse = largest > kTiny ? 127.f / largest : 0.f;
    // NaN and infinities make the row's outputs NaN: fmaxf passes over NaN, the sum of all does not.
    const bool bad = __any_sync(kAllLanes, !(fabsf(x) <= 3.402823466e38f));
    const uint32_t code = static_cast<uint32_t>(ptx::float_to_int(x * inverse)) & 255u;
    uint32_t word = code << (lane_id() % 4 * 8);
    word |= __shfl_xor_sync(kAllLanes, word, 1);
    word |= __shfl_xor_sync(kAllLanes, word, 2);
    if (lane_id() % 4 == 0) slice.codes[r][lane_id() / 4] = word;
    if (lane_id() == 0) slice.scale[r] = bad ? ptx::as_float(0x7fc00000u) : largest / 127.f;
  }
}

// One quad of weights against the rows' inputs, in fp32. The bits of a code, as the lowest of the mantissa of 2^23,
// make the float 2^23 + code without a conversion. Zero points are small integers, so 2^23 + zero is exact, and so is
// the difference of the two.
template <int kRows, bool kMinimum>
__device__ __forceinline__ void multiply_exact(uint32_t codes, int q, const Header& header, int rows,
                                               const Slice<kRows>& slice, float (&sums)[kRows]) {
  const float zero = kMinimum ? 0x1p23f : 0x1p23f + header.offset;
  Pack<float, 4> weight;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float code = ptx::as_float(ptx::and_or(codes >> (8 * i), 255u, 0x4b000000u)) - zero;
    weight.at[i] = kMinimum ? header.scale * code + header.offset : code;
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (r >= rows) break;
    const Pack<float, 4> x = load<4>(&slice.input[r][4 * q]);
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[r] = fmaf(weight.at[i], x.at[i], sums[r]);
  }
}

// Of sections, in any order, before the bias.
__device__ __forceinline__ void store_exact(const GptqMatmulParams& p, int64_t row, int64_t column, double sum) {
  if (row >= p.num_rows || column >= p.out_features) return;
  const int64_t place = row * p.out_stride + column;
  if (p.bias) sum += snap(p.bias[column]);
  if (p.exact_out) {
    p.exact_out[place] = sum;
  } else {
    store_float(p.out, place, static_cast<float>(sum), p.dtype);
  }
}

template <int kBits, bool kMinimum, Mode kMode, int kRows>
__global__ void __launch_bounds__(kThreads, 3) gptq_matmul_kernel(GptqMatmulParams p, PanelBest best) {
  constexpr bool kInt8 = kMode != Mode::kExact, kSections = kMode == Mode::kInt8Sections;
  using Sum = std::conditional_t<kSections, double, float>;
  Shared<kRows, Sum>& memory = shared<Shared<kRows, Sum>>();
  const GptqLayout layout(p);
  const int64_t panel = blockIdx.y, first_row = static_cast<int64_t>(blockIdx.x) * kRows;
  const auto rows = static_cast<int>(smaller<int64_t>(p.num_rows - first_row, kRows));
  const int column = lane_id() % kPanel, half = lane_id() / kPanel;
  const int section = static_cast<int>(p.groups_per_section) * layout.blocks_per_group;
  Slice<kRows>& slice = memory.slice[warp_id()];

  float sums[kRows] = {};
  [[maybe_unused]] double exact[kRows] = {};
  for (int b = kSections ? warp_id() * section : warp_id(); b < layout.num_blocks(); b += kSections ? 1 : kWarps) {
    const int64_t place = static_cast<int64_t>(b) * kBlock + lane_id();
    const int64_t input = p.input_order ? p.input_order[place] : place;
    const uint8_t* group = layout.group(panel, b / layout.blocks_per_group);
    const uint8_t* block = layout.block(group, b);
    uint32_t codes[kQuads / 2];
#pragma unroll
    for (int i = 0; i < kQuads / 2; ++i) codes[i] = quad_codes<kBits>(block, 2 * i + half, column);
    const Header header = load_header(group, column);
    __syncwarp();  // the inputs of the last block are done with
    if constexpr (kInt8) {
      quantise_inputs<kRows>(p, first_row, rows, input, slice);
    } else {
      for (int r = 0; r < rows; ++r) slice.input[r][lane_id()] = load_input(p, first_row + r, input);
    }
    __syncwarp();
    if constexpr (kInt8) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (r >= rows) break;
        int32_t products = 0, inputs = 0;
#pragma unroll
        for (int i = 0; i < kQuads / 2; ++i) {
          const uint32_t x = slice.codes[r][2 * i + half];
          products = ptx::dot_unsigned_signed(codes[i], x, products);
          inputs = ptx::dot_unsigned_signed(0x01010101u, x, inputs);
        }
        const auto dot = static_cast<float>(products), total = static_cast<float>(inputs);
        const float value =
            kMinimum ? header.scale * dot + header.offset * total : header.scale * (dot - header.offset * total);
        sums[r] = fmaf(slice.scale[r], value, sums[r]);
      }
    } else {
      float of_block[kRows] = {};
#pragma unroll
      for (int i = 0; i < kQuads / 2; ++i)
        multiply_exact<kRows, kMinimum>(codes[i], 2 * i + half, header, rows, slice, of_block);
#pragma unroll
      for (int r = 0; r < kRows; ++r)
        sums[r] = kMinimum ? sums[r] + of_block[r] : fmaf(header.scale, of_block[r], sums[r]);
    }
    if constexpr (kSections) {
      if ((b + 1) % section != 0 && b + 1 < layout.num_blocks()) continue;
      b += (kWarps - 1) * section;  // those of the other warps
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        exact[r] += snap(sums[r] + __shfl_xor_sync(kAllLanes, sums[r], kPanel));
        sums[r] = 0.f;
      }
    }
  }

#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    Sum sum;
    if constexpr (kSections) {
      sum = exact[r];
    } else {
      sum = sums[r] + __shfl_xor_sync(kAllLanes, sums[r], kPanel);
    }
    if (half == 0) memory.sum[warp_id()][r][column] = sum;
  }
  __syncthreads();
  // Whole warps, so that the lanes of a row can be added up.
  for (int i = thread_id(); i < larger(kRows * kPanel, kWarpSize); i += kThreads) {
    Sum sum[1] = {};
    if (i < rows * kPanel)
#pragma unroll
      for (int w = 0; w < kWarps; ++w) sum[0] += memory.sum[w][i / kPanel][i % kPanel];
    const int64_t row = i < rows * kPanel ? first_row + i / kPanel : p.num_rows;
    if constexpr (kSections) {
      store_exact(p, row, panel * kPanel + i % kPanel, sum[0]);
    } else {
      take_panel<kPanel>(p, best, row, panel, sum, [&](int) { return i % kPanel; });
    }
  }
}

}  // namespace

Status multiply_gptq(const GptqMatmulParams& p, const PanelBest& best, void* stream) {
  const auto panels = static_cast<unsigned>(ceil_div<int64_t>(p.out_features, kPanel));
  if (p.num_rows == 0 || panels == 0) return nullptr;
  if (p.num_rows > kMaxRows && p.dtype != DType::kFloat32 && !p.int8_activation)
    return multiply_gptq_tensor_cores(p, best, stream);
  return with_format(p, [&]<int kBits, bool kMinimum>(Format<kBits, kMinimum>) {
    const auto run = [&]<int kRows>(Rows<kRows>) {
      const dim3 grid = {static_cast<unsigned>(ceil_div<int64_t>(p.num_rows, kRows)), panels};
      const auto kernel = p.groups_per_section ? gptq_matmul_kernel<kBits, kMinimum, Mode::kInt8Sections, kRows>
                          : p.int8_activation  ? gptq_matmul_kernel<kBits, kMinimum, Mode::kInt8, kRows>
                                               : gptq_matmul_kernel<kBits, kMinimum, Mode::kExact, kRows>;
      return launch("gptq_matmul", grid, dim3{kThreads}, {}, stream, kernel, p, best);
    };
    return p.num_rows == 1 ? run(Rows<1>{}) : run(Rows<kTileRows>{});
  });
}

Status gptq_matmul(const GptqMatmulParams& p, void* stream) {
  return multiply_gptq(p, {}, stream);
}

}  // namespace teco::cuda

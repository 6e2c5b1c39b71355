// Matmul with a floating-point weight: for few rows, and for any number of them whose dtype is not that of the weight
// or is fp32, panel by panel (panel_matmul.h); else by tensor cores.
//
// One row reads the weight once: in_features * out_features * element size bytes.
#include "cuda/dense_matmul.h"

#include "cuda/panel_matmul.h"

namespace teco::cuda {
namespace {

constexpr int kMaxRows = 16;  // beyond it, 16-bit dtypes go to the tensor cores: another order of sums, other bits

// [panels, in_features, 16]
template <class W>
struct PackedPanels : Lines<W> {
  using Lines<W>::kColumns, Lines<W>::kAtATime, Lines<W>::line, Lines<W>::part;
  static constexpr int kLoads = kBlock / kAtATime;
  struct Fragment {
    Pack<W, kColumns> at[kLoads];
  };

  const W* weight;
  int64_t in_features;
  bool vectors;

  __device__ Fragment load(int64_t panel, int64_t k) const {
    Fragment fragment;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int64_t input = k + i * kAtATime + line();
      const W* address = weight + (panel * in_features + input) * kPanel + part() * kColumns;
      fragment.at[i] = load_up_to<kColumns>(address, input < in_features ? kColumns : 0, vectors);
    }
    return fragment;
  }

  template <int kRows>
  __device__ static void multiply(const Fragment& fragment, const InputBlock<kRows>& input, int rows,
                                  float (&sums)[kRows][kColumns]) {
#pragma unroll
    for (int i = 0; i < kLoads; ++i)
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (r >= rows) break;
        const float x = input[r][i * kAtATime + line()];
#pragma unroll
        for (int c = 0; c < kColumns; ++c) sums[r][c] = fmaf(to_float(fragment.at[i].at[c]), x, sums[r][c]);
      }
  }
};

// [out_features, in_features]: four lanes to a column, and two columns to a lane.
template <class W>
struct RowMajorPanels {
  static constexpr int kColumns = 2;
  static constexpr int kLanes = 4;
  static constexpr int kInputs = kVector<W>;
  static constexpr int kLoads = kBlock / (kLanes * kInputs);
  static constexpr int kApart = kPanel / kColumns;  // a lane's two columns
  struct Fragment {
    Pack<W, kInputs> at[kColumns][kLoads];
  };

  const W* weight;
  int64_t stride, in_features, out_features;
  bool vectors;

  __device__ static int input_of(int load) { return (load * kLanes + lane_id() % kLanes) * kInputs; }

  __device__ Fragment load(int64_t panel, int64_t k) const {
    Fragment fragment;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const int64_t column = panel * kPanel + c * kApart + lane_id() / kLanes;
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        const int64_t input = k + input_of(i);
        fragment.at[c][i] = load_up_to<kInputs>(weight + column * stride + input,
                                                column < out_features ? in_features - input : 0, vectors);
      }
    }
    return fragment;
  }

  template <int kRows>
  __device__ static void multiply(const Fragment& fragment, const InputBlock<kRows>& input, int rows,
                                  float (&sums)[kRows][kColumns]) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (r >= rows) break;
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        const Pack<float, kInputs> x = cuda::load<kInputs>(&input[r][input_of(i)]);
#pragma unroll
        for (int c = 0; c < kColumns; ++c)
#pragma unroll
          for (int j = 0; j < kInputs; ++j) sums[r][c] = fmaf(to_float(fragment.at[c][i].at[j]), x.at[j], sums[r][c]);
      }
    }
  }

  template <int kRows>
  __device__ static void collect(const float (&sums)[kRows][kColumns], float (&out)[kRows][kPanel]) {
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        const float sum = warp_sum<kLanes / 2>(sums[r][c]);
        if (lane_id() % kLanes == 0) out[r][c * kApart + lane_id() / kLanes] = sum;
      }
  }
};

template <class Weight, int kRows>
__global__ void __launch_bounds__(kPanelThreads, 2)
    dense_matmul_kernel(DenseMatmulParams p, Weight weight, PanelBest best) {
  multiply_panel<kRows>(p, weight, best);
}

template <class Weight>
Status multiply(const DenseMatmulParams& p, const Weight& weight, const PanelBest& best, void* stream) {
  return launch_panels(p, [&]<int kRows>(Rows<kRows>, dim3 grid) {
    return launch("dense_matmul", grid, dim3{kPanelThreads}, {}, stream, dense_matmul_kernel<Weight, kRows>, p, weight,
                  best);
  });
}

}  // namespace

Status multiply_dense(const DenseMatmulParams& p, const PanelBest& best, void* stream) {
  if (p.num_rows == 0 || p.out_features == 0) return nullptr;
  if (p.num_rows > kMaxRows && p.dtype != DType::kFloat32 && p.dtype == p.weight_dtype)
    return multiply_dense_tensor_cores(p, best, stream);
  return with_float_type(p.weight_dtype, [&]<class W>(Type<W>) {
    const auto* weight = static_cast<const W*>(p.weight);
    const bool vectors = is_aligned(weight, p.weight_stride, 16);
    if (p.weight_stride == 0) return multiply(p, PackedPanels<W>{{}, weight, p.in_features, vectors}, best, stream);
    return multiply(p, RowMajorPanels<W>{weight, p.weight_stride, p.in_features, p.out_features, vectors}, best,
                    stream);
  });
}

Status dense_matmul(const DenseMatmulParams& p, void* stream) {
  return multiply_dense(p, {}, stream);
}

}  // namespace teco::cuda

// A dense weight of fp16 or bf16 as the tensor cores take it (tensor_core_matmul.h): its very bits, by column.
#include "cuda/dense_matmul.h"
#include "cuda/tensor_core_matmul.h"

namespace teco::cuda {
namespace {

// [panels, in_features, 16]: a thread has two inputs of eight columns, a warp a panel.
template <class T>
struct PackedColumns {
  static constexpr int kColumns = kCopy;
  struct Fragment {
    Pack<T, kColumns> at[2];
  };

  const T* weight;
  int64_t in_features, num_panels;
  bool vectors;

  __device__ static int input() { return lane_id() % (kBlock / 2) * 2; }
  __device__ static int column() { return warp_id() * kPanel + lane_id() / (kBlock / 2) * kColumns; }

  __device__ __forceinline__ Fragment fetch(int64_t first_column, int b) const {
    Fragment fragment;
    const int64_t panel = (first_column + column()) / kPanel;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t k = static_cast<int64_t>(b) * kBlock + input() + i;
      const bool is_there = panel < num_panels && k < in_features;
      fragment.at[i] = load_up_to<kColumns>(weight + (panel * in_features + k) * kPanel + column() % kPanel,
                                            is_there ? kColumns : 0, vectors);
    }
    return fragment;
  }

  __device__ __forceinline__ void unpack(const Fragment& fragment, Tile<T>& columns) const {
#pragma unroll
    for (int c = 0; c < kColumns; ++c)
      store<2>(&columns[column() + c][input()], Pack<T, 2>{{fragment.at[0].at[c], fragment.at[1].at[c]}});
  }
};

// [out_features, in_features]: a thread has eight inputs of two columns, four threads a column.
template <class T>
struct RowMajorColumns {
  static constexpr int kLoads = kTile * kBlock / kCopy / kTileThreads;
  static constexpr int kLanes = kBlock / kCopy;
  struct Fragment {
    Pack<T, kCopy> at[kLoads];
  };

  const T* weight;
  int64_t stride, in_features, out_features;
  bool vectors;

  __device__ static int input() { return thread_id() % kLanes * kCopy; }
  __device__ static int column(int load) { return (load * kTileThreads + thread_id()) / kLanes; }

  __device__ __forceinline__ Fragment fetch(int64_t first_column, int b) const {
    Fragment fragment;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int64_t n = first_column + column(i), k = static_cast<int64_t>(b) * kBlock + input();
      fragment.at[i] = load_up_to<kCopy>(weight + n * stride + k, n < out_features ? in_features - k : 0, vectors);
    }
    return fragment;
  }

  __device__ __forceinline__ void unpack(const Fragment& fragment, Tile<T>& columns) const {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) store<kCopy>(&columns[column(i)][input()], fragment.at[i]);
  }
};

template <class T, class Weight>
__global__ void __launch_bounds__(kTileThreads, 3)
    dense_tensor_cores_kernel(DenseMatmulParams p, Weight weight, PackedInputs inputs, PanelBest best) {
  multiply_tiles<T>(p, weight, inputs, static_cast<int>(ceil_div<int64_t>(p.in_features, kBlock)), best);
}

}  // namespace

Status multiply_dense_tensor_cores(const DenseMatmulParams& p, const PanelBest& best, void* stream) {
  const auto run = [&]<class T>(Type<T>) {
    const auto* weight = static_cast<const T*>(p.weight);
    const bool vectors = is_aligned(weight, p.weight_stride, 16);
    const auto multiply = [&]<class Weight>(const Weight& columns) {
      return launch("dense_matmul", tile_grid(p), dim3{kTileThreads}, {}, stream, dense_tensor_cores_kernel<T, Weight>,
                    p, columns, packed_inputs<T>(p, nullptr), best);
    };
    if (p.weight_stride == 0)
      return multiply(PackedColumns<T>{weight, p.in_features, ceil_div<int64_t>(p.out_features, kPanel), vectors});
    return multiply(RowMajorColumns<T>{weight, p.weight_stride, p.in_features, p.out_features, vectors});
  };
  return p.dtype == DType::kFloat16 ? run(Type<Half>{}) : run(Type<BFloat16>{});
}

}  // namespace teco::cuda

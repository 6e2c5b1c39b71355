// Matmul with a floating-point weight whose bits do not depend on the number of rows; see panel_matmul.h.
// One row reads the whole weight once: in_features * out_features * element size bytes.
#include "cpu/panel_matmul.h"

namespace teco::cpu::TECO_ISA {
namespace {

template <class W>
struct DensePanels : DenseTiles {
  const W* weight;
  int64_t in_features;

  const float* operator()(int64_t panel, int64_t k, int64_t count, float* scratch) const {
    const W* slice = weight + (panel * in_features + k) * kPanel;
    if constexpr (sizeof(W) == sizeof(float)) {
      return slice;
    } else {
      for (int64_t i = 0; i < count * kPanel; i += kLanes) store(scratch + i, load(slice + i));
      return scratch;
    }
  }
};

// A weight that is not packed: 16 of its rows are turned into columns.
template <class W>
struct RowMajorPanels : DenseTiles {
  const W* weight;  // [out_features, in_features]
  int64_t stride, out_features;

  const float* operator()(int64_t panel, int64_t k, int64_t count, float* scratch) const {
    for (int64_t column = 0; column < kPanel; ++column) {
      const int64_t n = min(panel * kPanel + column, out_features - 1);  // those that fill up are never looked at
      const W* row = weight + n * stride + k;
      for (int64_t i = 0; i < count; i += kLanes) {
        const F32x8 values = load_up_to(row + i, count - i);
        for (int64_t lane = 0; lane < min<int64_t>(count - i, kLanes); ++lane)
          scratch[(i + lane) * kPanel + column] = values[lane];
      }
    }
    return scratch;
  }
};

}  // namespace

void multiply_dense(const DenseMatmulParams& p, const PanelSink& sink, int num_threads) {
  with_float_type(p.weight_dtype, [&]<class W>(Type<W>) {
    const auto* weight = static_cast<const W*>(p.weight);
    const int64_t panel_bytes = p.in_features * kPanel * static_cast<int64_t>(sizeof(W));
    if (p.weight_stride) {
      const RowMajorPanels<W> unpack{{}, weight, p.weight_stride, p.out_features};
      panel_matmul(p, p.in_features, nullptr, panel_bytes, unpack, sink, num_threads);
    } else {
      const DensePanels<W> unpack{{}, weight, p.in_features};
      panel_matmul(p, p.in_features, nullptr, panel_bytes, unpack, sink, num_threads);
    }
  });
}

void dense_matmul(const DenseMatmulParams& p, int num_threads) {
  multiply_dense(p, store_sink(p), num_threads);
}

}  // namespace teco::cpu::TECO_ISA

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

}  // namespace

void dense_matmul(const DenseMatmulParams& p, int num_threads) {
  with_float_type(p.dtype, [&]<class T>(Type<T>) {
    with_float_type(p.weight_dtype, [&]<class W>(Type<W>) {
      const DensePanels<W> unpack{{}, static_cast<const W*>(p.weight), p.in_features};
      panel_matmul(static_cast<const T*>(p.input), p.input_stride, p.num_rows, p.in_features, nullptr,
                   static_cast<T*>(p.out), p.out_stride, p.bias, p.out_features,
                   p.in_features * kPanel * static_cast<int64_t>(sizeof(W)), unpack, num_threads);
    });
  });
}

}  // namespace teco::cpu::TECO_ISA

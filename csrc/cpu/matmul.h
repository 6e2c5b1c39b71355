// What all matmuls share: a product leaves them panel by panel, and a sink takes it. Kernels that want something else
// of the products than to store them give a sink of their own.
#pragma once

#include "cpu/vec.h"

namespace teco::cpu::TECO_ISA {

constexpr int kPanel = 16;             // columns
constexpr int kPanelVectors = 2;       // vectors of 8 lanes that make up a panel
constexpr int64_t kScratchRows = 512;  // rows converted at a time, so that scratch memory is bounded

// Takes finished rows of one panel: `count` rows from `row` on, sums[count][16] before the bias. Called from several
// threads at once, once for each row and panel. A call through a pointer is nothing beside the panel's products, and
// the matmuls are compiled once for all sinks.
struct PanelSink {
  void (*take)(const void* context, int64_t row, int64_t count, const float* sums, int64_t panel);
  const void* context;

  void operator()(int64_t row, int64_t count, const float* sums, int64_t panel) const {
    take(context, row, count, sums, panel);
  }
};

// As dense_matmul and gptq_matmul do; `out` is left to the sink.
void multiply_dense(const DenseMatmulParams& p, const PanelSink& sink, int num_threads);
void multiply_gptq(const GptqMatmulParams& p, const PanelSink& sink, int num_threads);
void multiply_gptq_int8(const GptqMatmulParams& p, const PanelSink& sink, int num_threads);

// Eight sums of a row, the bias added, of which the first `columns` are not just there to fill up the panel.
inline F32x8 add_bias(const float* sums, const float* bias, int64_t columns) {
  const F32x8 sum = load(sums);
  return bias ? sum + load_up_to(bias, columns) : sum;
}

// The sink of the matmuls themselves: adds the bias, converts, leaves out the columns that only fill up the panel.
template <class T, class Params>
void store_panel(const void* params, int64_t row, int64_t count, const float* sums, int64_t panel) {
  const Params& p = *static_cast<const Params*>(params);
  const int64_t column = panel * kPanel, columns = p.out_features - column, stride = p.out_stride;
  const float* bias = p.bias ? p.bias + column : nullptr;
  T* out = static_cast<T*>(p.out) + row * stride + column;
  for (int64_t r = 0; r < count; ++r, out += stride, sums += kPanel)
    for (int v = 0; v < kPanelVectors; ++v) {
      const int64_t first = v * kLanes, left = columns - first;
      if (left <= 0) break;
      const F32x8 sum = add_bias(sums + first, bias ? bias + first : nullptr, left);
      if (left >= kLanes) {
        store(out + first, sum);
      } else {
        store_partial(out + first, sum, left);
      }
    }
}
template <class Params>
PanelSink store_sink(const Params& p) {
  PanelSink sink{nullptr, &p};
  with_float_type(p.dtype, [&]<class T>(Type<T>) { sink.take = store_panel<T, Params>; });
  return sink;
}

}  // namespace teco::cpu::TECO_ISA

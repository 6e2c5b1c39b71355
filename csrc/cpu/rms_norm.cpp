// RMS norm, with or without a residual added first.
//
// Reads input (and residual) once from memory, then once more from L1 for the scaling; writes out (and the new
// residual). Bound by bandwidth. A row is summed in eight lanes, left to right, so its bits depend on the row alone.
#include "cpu/vec.h"

namespace teco::cpu::TECO_ISA {
namespace {

template <class T>
void norm_row(const RmsNormParams& p, int64_t row) {
  const int64_t size = p.hidden_size, tail = size % kLanes, body = size - tail;
  const int64_t outer = row / p.inner_rows, inner = row % p.inner_rows;
  const T* input = static_cast<const T*>(p.input) + outer * p.input_outer_stride + inner * p.input_stride;
  const T* weight = static_cast<const T*>(p.weight);
  T* out = static_cast<T*>(p.out) + outer * p.out_outer_stride + inner * p.out_stride;

  const T* summand = input;
  if (p.residual) {
    const T* residual = static_cast<const T*>(p.residual) + row * p.residual_stride;
    T* sum = static_cast<T*>(p.residual_out) + row * p.residual_out_stride;
    for (int64_t i = 0; i < body; i += kLanes) store(sum + i, load(input + i) + load(residual + i));
    if (tail) store_partial(sum + body, load_partial(input + body, tail) + load_partial(residual + body, tail), tail);
    summand = sum;
  }

  F32x8 squares = splat(0.f);
  for (int64_t i = 0; i < body; i += kLanes) {
    const F32x8 x = load(summand + i);
    squares = fma(x, x, squares);
  }
  if (tail) {
    const F32x8 x = load_partial(summand + body, tail);
    squares = fma(x, x, squares);
  }
  const float mean = reduce_add(squares) / static_cast<float>(size);
  const F32x8 scale = splat(1.f / __builtin_sqrtf(mean + p.eps));

  for (int64_t i = 0; i < body; i += kLanes) store(out + i, load(summand + i) * scale * load(weight + i));
  if (tail)
    store_partial(out + body, load_partial(summand + body, tail) * scale * load_partial(weight + body, tail), tail);
}

}  // namespace

void rms_norm(const RmsNormParams& p, int num_threads) {
  with_float_type(p.dtype, [&]<class T>(Type<T>) {
    const int64_t row_bytes = p.hidden_size * static_cast<int64_t>(sizeof(T)) * (p.residual ? 4 : 2);
    parallel_for(p.num_rows, task_grain(row_bytes), num_threads, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) norm_row<T>(p, row);
    });
  });
}

}  // namespace teco::cpu::TECO_ISA

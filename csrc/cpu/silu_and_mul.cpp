// out = silu(gate) * up, gate and up being the two halves of a row. Three streams, one pass; bound by bandwidth.
#include "cpu/vec.h"

namespace teco::cpu::TECO_ISA {
namespace {

inline F32x8 silu(F32x8 x) {
  return x / (splat(1.f) + exp(-x));
}

template <class T>
void activate_row(const SiluAndMulParams& p, int64_t row) {
  const T* gate = static_cast<const T*>(p.input) + row * p.input_stride;
  const T* up = gate + p.size;
  T* out = static_cast<T*>(p.out) + row * p.out_stride;
  const int64_t tail = p.size % kLanes, body = p.size - tail;
  for (int64_t i = 0; i < body; i += kLanes) store(out + i, silu(load(gate + i)) * load(up + i));
  if (tail) store_partial(out + body, silu(load_partial(gate + body, tail)) * load_partial(up + body, tail), tail);
}

}  // namespace

void silu_and_mul(const SiluAndMulParams& p, int num_threads) {
  with_float_type(p.dtype, [&]<class T>(Type<T>) {
    const int64_t row_bytes = 3 * p.size * static_cast<int64_t>(sizeof(T));
    parallel_for(p.num_rows, task_grain(row_bytes), num_threads, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) activate_row<T>(p, row);
    });
  });
}

}  // namespace teco::cpu::TECO_ISA

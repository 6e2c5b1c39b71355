// out = silu(gate) * up, gate and up being the two halves of a row. Three streams, one pass; bound by bandwidth.
#include "cuda/device.h"

namespace teco::cuda {
namespace {

constexpr int kThreads = 256;

template <class T>
__global__ void __launch_bounds__(kThreads) silu_and_mul_kernel(SiluAndMulParams p, bool vectors) {
  constexpr int N = kVector<T>;
  // Of 32 bits up to the last factor: else nvcc takes the stores of 16 bytes apart.
  const int part = static_cast<int>(blockIdx.y) * kThreads + thread_id();
  const int64_t row = blockIdx.x, i = int64_t{part} * N;
  if (i >= p.size) return;
  const T* gate = static_cast<const T*>(p.input) + row * p.input_stride;
  Pack<T, N> x = load_up_to<N>(gate + i, p.size - i, vectors);
  const Pack<T, N> up = load_up_to<N>(gate + p.size + i, p.size - i, vectors);
#pragma unroll
  for (int j = 0; j < N; ++j) {
    const float g = to_float(x.at[j]);
    set(x.at[j], g / (1.f + expf(-g)) * to_float(up.at[j]));
  }
  store_up_to<N>(static_cast<T*>(p.out) + row * p.out_stride + i, x, p.size - i, vectors);
}

}  // namespace

Status silu_and_mul(const SiluAndMulParams& p, void* stream) {
  if (p.num_rows == 0) return nullptr;
  return with_float_type(p.dtype, [&]<class T>(Type<T>) {
    const T* input = static_cast<const T*>(p.input);
    const bool vectors = is_aligned(input, p.input_stride, 16) && is_aligned(input + p.size, 0, 16) &&
                         is_aligned(static_cast<const T*>(p.out), p.out_stride, 16);
    const auto parts = static_cast<unsigned>(ceil_div<int64_t>(p.size, kThreads * kVector<T>));
    return launch("silu_and_mul", dim3{static_cast<unsigned>(p.num_rows), parts}, dim3{kThreads}, {}, stream,
                  silu_and_mul_kernel<T>, p, vectors);
  });
}

}  // namespace teco::cuda

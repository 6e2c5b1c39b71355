// A kernel for each function of csrc/cuda/ptx.h: what nvcc makes of it is held against its twin in csrc/simt/ptx.h.
//
// A thread has kInputs words of input and kOutputs words of output.
#include <cstring>

#include "cuda/device.h"

namespace tried {

namespace ptx = teco::cuda::ptx;

constexpr int kThreads = 32, kInputs = 12, kOutputs = 4;

struct Data {
  const uint32_t* input;
  uint32_t* output;
};

__device__ __forceinline__ int element() {
  return static_cast<int>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x);
}
__device__ __forceinline__ const uint32_t* input(Data data) {
  return data.input + element() * kInputs;
}
__device__ __forceinline__ uint32_t* output(Data data) {
  return data.output + element() * kOutputs;
}
template <int N>
__device__ __forceinline__ void put(Data data, const ptx::Words<N>& words) {
  for (int i = 0; i < N; ++i) output(data)[i] = words.at[i];
}

__global__ void load_16(Data data) {
  put(data, ptx::load_16(input(data)));
}
__global__ void load_8(Data data) {
  put(data, ptx::load_8(input(data) + 2));
}
__global__ void store_16(Data data) {
  const uint32_t* in = input(data);
  ptx::store_16(output(data), ptx::Words<4>{{in[0], in[1], in[2], in[3]}});
}
__global__ void store_8(Data data) {
  ptx::store_8(output(data) + 2, ptx::Words<2>{{input(data)[0], input(data)[1]}});
}
__global__ void as_float(Data data) {
  output(data)[0] = ptx::as_bits(-ptx::as_float(input(data)[0]));
}
__global__ void as_bits(Data data) {
  output(data)[0] = ptx::as_bits(ptx::as_float(input(data)[0]));
}
__global__ void lowest_bit(Data data) {
  output(data)[0] = static_cast<uint32_t>(ptx::lowest_bit(input(data)[0] | 0x80000000u));
}
__global__ void and_or(Data data) {
  output(data)[0] = ptx::and_or(input(data)[0], input(data)[1], input(data)[2]);
}
__global__ void dot_unsigned_signed(Data data) {
  const uint32_t* in = input(data);
  // Little to begin with: a sum that overflows is none that kernels make.
  output(data)[0] =
      static_cast<uint32_t>(ptx::dot_unsigned_signed(in[0], in[1], static_cast<int32_t>(in[2] >> 8) - 8388608));
}
__global__ void half_to_float(Data data) {
  output(data)[0] = ptx::as_bits(ptx::half_to_float(static_cast<uint16_t>(input(data)[0])));
}
__global__ void float_to_half(Data data) {
  output(data)[0] = ptx::float_to_half(ptx::as_float(input(data)[0]));
}
__global__ void float_to_bfloat16(Data data) {
  output(data)[0] = ptx::float_to_bfloat16(ptx::as_float(input(data)[0]));
}
__global__ void float_to_int(Data data) {
  output(data)[0] = static_cast<uint32_t>(ptx::float_to_int(ptx::as_float(input(data)[0])));
}

struct Copied {
  alignas(16) uint32_t words[3][kThreads][4];
};

// Two groups: the first is read while the second may still be under way. Every third thread copies zeros.
__global__ void copy_16_async(Data data) {
  Copied& memory = teco::cuda::shared<Copied>();
  const int lane = static_cast<int>(threadIdx.x);
  ptx::copy_16_async(memory.words[0][lane], input(data), lane % 3 != 0);
  ptx::commit_copies();
  ptx::copy_16_async(memory.words[1][lane], input(data) + 4, true);
  ptx::commit_copies();
  ptx::wait_for_copies<1>();
  const ptx::Words<4> first = ptx::load_16(memory.words[0][lane]);
  ptx::wait_for_copies<0>();
  const ptx::Words<4> second = ptx::load_16(memory.words[1][lane]);
  put(data, ptx::Words<4>{{first.at[0], first.at[3], second.at[0], second.at[3]}});
}

__global__ void load_matrices(Data data) {
  Copied& memory = teco::cuda::shared<Copied>();
  const int lane = static_cast<int>(threadIdx.x);
  ptx::store_16(memory.words[0][lane], ptx::load_16(input(data)));
  __syncthreads();
  put(data, ptx::load_matrices(memory.words[0][lane ^ 5]));
}

template <class Multiply>
__device__ __forceinline__ void multiply(Data data, Multiply multiply) {
  const uint32_t* in = input(data);
  float sums[4];
  for (int i = 0; i < 4; ++i) sums[i] = ptx::as_float(in[6 + i]);
  multiply(sums, ptx::load_16(in), in[4], in[5]);
  for (int i = 0; i < 4; ++i) output(data)[i] = ptx::as_bits(sums[i]);
}
__global__ void multiply_half(Data data) {
  multiply(data, [](float (&sums)[4], const ptx::Words<4>& a, uint32_t low, uint32_t high) {
    ptx::multiply_half(sums, a, low, high);
  });
}
__global__ void multiply_bfloat16(Data data) {
  multiply(data, [](float (&sums)[4], const ptx::Words<4>& a, uint32_t low, uint32_t high) {
    ptx::multiply_bfloat16(sums, a, low, high);
  });
}

struct Kernel {
  const char* name;
  void (*kernel)(Data);
};

constexpr Kernel kKernels[] = {
    {"load_16", load_16},
    {"load_8", load_8},
    {"store_16", store_16},
    {"store_8", store_8},
    {"as_float", as_float},
    {"as_bits", as_bits},
    {"lowest_bit", lowest_bit},
    {"and_or", and_or},
    {"dot_unsigned_signed", dot_unsigned_signed},
    {"half_to_float", half_to_float},
    {"float_to_half", float_to_half},
    {"float_to_bfloat16", float_to_bfloat16},
    {"float_to_int", float_to_int},
    {"copy_16_async", copy_16_async},
    {"load_matrices", load_matrices},
    {"multiply_half", multiply_half},
    {"multiply_bfloat16", multiply_bfloat16},
};

}  // namespace tried

// Runs the kernel of this name over so many blocks; what went wrong, or null.
extern "C" __attribute__((visibility("default"))) const char* run_function(const char* name, const uint32_t* input,
                                                                           uint32_t* output, unsigned blocks) {
  for (const tried::Kernel& kernel : tried::kKernels)
    if (std::strcmp(kernel.name, name) == 0)
      return teco::cuda::launch(name, dim3{blocks}, dim3{tried::kThreads}, {}, nullptr, kernel.kernel,
                                tried::Data{input, output});
  return "no such kernel";
}

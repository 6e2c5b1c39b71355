// What a kernel's source is written in: CUDA, or its emulation on the CPU (csrc/simt) when no CUDA compiler reads it.
// Vector loads and stores, reductions in a fixed order, and the launch.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <type_traits>

#include "params.h"

#ifdef __CUDACC__
#include "cuda/ptx.h"
#else
#include "simt/ptx.h"
#include "simt/simt.h"
#endif

namespace teco::cuda {

// Null, or what went wrong.
using Status = const char*;

// Bytes of shared memory that a launch asks for.
struct DynamicShared {
  size_t bytes;
};

#ifdef __CUDACC__

// Memory that the threads of a block share: one object per type and kernel. kElement: bytes of its smallest elements.
template <class T, int kElement = 4>
__device__ __forceinline__ T& shared() {
  __shared__ T memory;
  return memory;
}

// The same, of a size that only the launch tells.
template <class T>
__device__ __forceinline__ T& dynamic_shared() {
  extern __shared__ __align__(16) unsigned char memory[];
  return *reinterpret_cast<T*>(memory);
}

// Until this thread's next failure.
inline Status failure(const char* name, cudaError_t error) {
  thread_local char text[200];
  cudaGetLastError();  // or the next launch would be told of it
  snprintf(text, sizeof(text), "%s: %s", name, cudaGetErrorString(error));
  return text;
}

template <class... Parameters>
Status launch(const char* name, dim3 blocks, dim3 threads, DynamicShared dynamic, void* stream,
              void (*kernel)(Parameters...), const std::type_identity_t<Parameters>&... arguments) {
  constexpr size_t kWithoutAsking = 48 * 1024;
  cudaError_t error = cudaSuccess;
  if (dynamic.bytes > kWithoutAsking)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(dynamic.bytes));
  if (error == cudaSuccess) {
    kernel<<<blocks, threads, dynamic.bytes, static_cast<cudaStream_t>(stream)>>>(arguments...);
    error = cudaGetLastError();
  }
  return error == cudaSuccess ? nullptr : failure(name, error);
}

inline void use_workspace(void*, int64_t, int64_t = 4) {}

#else

template <class T, int kElement = 4>
__device__ __forceinline__ T& shared() {
  static const char tag = 0;
  return *static_cast<T*>(simt::shared_memory(&tag, sizeof(T), alignof(T), kElement));
}

template <class T>
__device__ __forceinline__ T& dynamic_shared() {
  return *static_cast<T*>(simt::dynamic_shared_memory());
}

template <class... Parameters>
Status launch(const char* name, dim3 blocks, dim3 threads, DynamicShared dynamic, void*, void (*kernel)(Parameters...),
              const std::type_identity_t<Parameters>&... arguments) {
  return simt::launch<Parameters...>({name, blocks, threads, dynamic.bytes}, kernel, arguments...);
}

// Memory of this call that is none of its tensors', of elements of so many bytes or more. Reading it before it is
// written gives NaN.
inline void use_workspace(void* begin, int64_t bytes, int64_t element_bytes = 4) {
  if (bytes == 0) return;
  __builtin_memset(begin, 0xff, static_cast<size_t>(bytes));
  simt::allow_workspace(begin, static_cast<size_t>(bytes), static_cast<size_t>(element_bytes));
}

#endif

constexpr int kWarpSize = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

template <class T>
__host__ __device__ constexpr T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}
template <class T>
__host__ __device__ constexpr T smaller(T a, T b) {
  return b < a ? b : a;
}
template <class T>
__host__ __device__ constexpr T larger(T a, T b) {
  return a < b ? b : a;
}

__device__ __forceinline__ int thread_id() {
  return static_cast<int>(threadIdx.x);
}
__device__ __forceinline__ int lane_id() {
  return thread_id() % kWarpSize;
}
__device__ __forceinline__ int warp_id() {
  return thread_id() / kWarpSize;
}

// Elements as they lie in memory.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

__device__ __forceinline__ float to_float(float x) {
  return x;
}
__device__ __forceinline__ float to_float(Half x) {
  return ptx::half_to_float(x.bits);
}
__device__ __forceinline__ float to_float(BFloat16 x) {
  return ptx::as_float(static_cast<uint32_t>(x.bits) << 16);
}

__device__ __forceinline__ void set(float& out, float x) {
  out = x;
}
__device__ __forceinline__ void set(Half& out, float x) {
  out.bits = ptx::float_to_half(x);
}
__device__ __forceinline__ void set(BFloat16& out, float x) {
  out.bits = ptx::float_to_bfloat16(x);
}

// One element of any floating dtype, for data that are so few beside others that their dtype need not be a template
// argument.
__device__ __forceinline__ float load_as_float(const void* data, int64_t index, DType dtype) {
  if (dtype == DType::kFloat32) return static_cast<const float*>(data)[index];
  if (dtype == DType::kFloat16) return to_float(static_cast<const Half*>(data)[index]);
  return to_float(static_cast<const BFloat16*>(data)[index]);
}
__device__ __forceinline__ void store_float(void* data, int64_t index, float x, DType dtype) {
  if (dtype == DType::kFloat32) return set(static_cast<float*>(data)[index], x);
  if (dtype == DType::kFloat16) return set(static_cast<Half*>(data)[index], x);
  set(static_cast<BFloat16*>(data)[index], x);
}

// So many elements that one access moves 16 bytes.
template <class T>
constexpr int kVector = 16 / static_cast<int>(sizeof(T));

// Neighbouring elements, moved by as few accesses of up to 16 bytes as there can be.
template <class T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Pack {
  T at[N];
};

// Whether rows of this stride, from this address on, can be moved by accesses of `bytes` bytes.
template <class T>
inline bool is_aligned(const T* rows, int64_t stride, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(rows) % bytes == 0 && stride * static_cast<int64_t>(sizeof(T)) % bytes == 0;
}

template <int N, class T>
__device__ __forceinline__ Pack<T, N> load(const T* address) {
  constexpr int kBytes = static_cast<int>(sizeof(T)) * N;
  Pack<T, N> result;
  if constexpr (kBytes >= 16) {
    static_assert(kBytes % 16 == 0);
    for (int i = 0; i < kBytes / 16; ++i) {
      const ptx::Words<4> words = ptx::load_16(reinterpret_cast<const char*>(address) + 16 * i);
      __builtin_memcpy(reinterpret_cast<char*>(result.at) + 16 * i, &words, 16);
    }
  } else if constexpr (kBytes == 8) {
    const ptx::Words<2> words = ptx::load_8(address);
    __builtin_memcpy(result.at, &words, 8);
  } else {
    result = *reinterpret_cast<const Pack<T, N>*>(address);
  }
  return result;
}
template <int N, class T>
__device__ __forceinline__ void store(T* address, const Pack<T, N>& pack) {
  constexpr int kBytes = static_cast<int>(sizeof(T)) * N;
  if constexpr (kBytes >= 16) {
    static_assert(kBytes % 16 == 0);
    for (int i = 0; i < kBytes / 16; ++i) {
      ptx::Words<4> words;
      __builtin_memcpy(&words, reinterpret_cast<const char*>(pack.at) + 16 * i, 16);
      ptx::store_16(reinterpret_cast<char*>(address) + 16 * i, words);
    }
  } else if constexpr (kBytes == 8) {
    ptx::Words<2> words;
    __builtin_memcpy(&words, pack.at, 8);
    ptx::store_8(address, words);
  } else {
    *reinterpret_cast<Pack<T, N>*>(address) = pack;
  }
}

// As far as there are elements: `count` of them from the address on; zeros for the rest. `vectors`: the address is
// aligned to the whole pack. Which elements a thread holds does not depend on it, so neither do any bits.
template <int N, class T>
__device__ __forceinline__ Pack<T, N> load_up_to(const T* address, int64_t count, bool vectors) {
  if (vectors && count >= N) return load<N>(address);
  Pack<T, N> result = {};
#pragma unroll
  for (int i = 0; i < N; ++i)
    if (i < count) result.at[i] = address[i];
  return result;
}
template <int N, class T>
__device__ __forceinline__ void store_up_to(T* address, const Pack<T, N>& pack, int64_t count, bool vectors) {
  if (vectors && count >= N) return store<N>(address, pack);
#pragma unroll
  for (int i = 0; i < N; ++i)
    if (i < count) address[i] = pack.at[i];
}

// Sum over the lanes of a warp, or over those at distances of kFirst, kFirst / 2, ..., kLast: a butterfly, so that all
// of them get the same bits.
template <int kFirst = kWarpSize / 2, int kLast = 1, class T>
__device__ __forceinline__ T warp_sum(T x) {
#pragma unroll
  for (int distance = kFirst; distance >= kLast; distance /= 2) x += __shfl_xor_sync(kAllLanes, x, distance);
  return x;
}
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, distance));
  return x;
}

// Sum over the threads of a block: within the warps, then warp after warp. Once per kernel: the memory that the warps
// exchange their sums in is not used again.
template <int kThreads>
__device__ __forceinline__ float block_sum(float x) {
  constexpr int kWarps = kThreads / kWarpSize;
  struct Sums {
    float of_warp[kWarps];
  };
  Sums& sums = shared<Sums>();
  x = warp_sum(x);
  if (lane_id() == 0) sums.of_warp[warp_id()] = x;
  __syncthreads();
  float total = 0.f;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) total += sums.of_warp[w];
  return total;
}

// Folds an integer over the threads of a block, all of which get the result; `fold` must be associative and
// commutative.
template <int kThreads, class Fold>
__device__ __forceinline__ uint64_t block_fold(uint64_t x, Fold fold) {
  constexpr int kWarps = kThreads / kWarpSize;
  struct Parts {
    uint64_t of_warp[kWarps];
  };
  Parts& parts = shared<Parts>();
#pragma unroll
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) x = fold(x, __shfl_xor_sync(kAllLanes, x, distance));
  __syncthreads();  // those of the last call have been read
  if (lane_id() == 0) parts.of_warp[warp_id()] = x;
  __syncthreads();
  x = parts.of_warp[0];
#pragma unroll
  for (int w = 1; w < kWarps; ++w) x = fold(x, parts.of_warp[w]);
  return x;
}

template <class T>
struct Type {};

// Calls body(Type<T>{}), T being the element type that dtype names: `[&]<class T>(Type<T>) { ... }`.
template <class Body>
inline Status with_float_type(DType dtype, Body body) {
  switch (dtype) {
    case DType::kFloat32:
      return body(Type<float>{});
    case DType::kFloat16:
      return body(Type<Half>{});
    case DType::kBFloat16:
      return body(Type<BFloat16>{});
    default:
      return "the operator layer admits floating dtypes only";
  }
}

}  // namespace teco::cuda

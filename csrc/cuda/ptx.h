// Every instruction that C++ has no word for, each a function of its own. csrc/simt/ptx.h has their twins on the CPU.
#pragma once

#include <cstdint>

namespace teco::cuda::ptx {

template <int N>
struct Words {
  uint32_t at[N];
};

__device__ __forceinline__ Words<4> load_16(const void* address) {
  const uint4 v = *static_cast<const uint4*>(address);
  return {{v.x, v.y, v.z, v.w}};
}
__device__ __forceinline__ Words<2> load_8(const void* address) {
  const uint2 v = *static_cast<const uint2*>(address);
  return {{v.x, v.y}};
}
__device__ __forceinline__ void store_16(void* address, Words<4> words) {
  *static_cast<uint4*>(address) = make_uint4(words.at[0], words.at[1], words.at[2], words.at[3]);
}
__device__ __forceinline__ void store_8(void* address, Words<2> words) {
  *static_cast<uint2*>(address) = make_uint2(words.at[0], words.at[1]);
}

__device__ __forceinline__ float as_float(uint32_t bits) {
  return __uint_as_float(bits);
}
__device__ __forceinline__ uint32_t as_bits(float x) {
  return __float_as_uint(x);
}

// Number of the lowest bit that is set.
__device__ __forceinline__ int lowest_bit(uint32_t bits) {
  return __ffs(static_cast<int>(bits)) - 1;
}

// (a & b) | c
__device__ __forceinline__ uint32_t and_or(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
  return result;
}
// Sum of the products of four bytes each, unsigned and signed ones, and of c.
__device__ __forceinline__ int32_t dot_unsigned_signed(uint32_t a, uint32_t b, int32_t c) {
  int32_t result;
  asm("dp4a.u32.s32 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
  return result;
}

__device__ __forceinline__ float half_to_float(uint16_t bits) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
  return x;
}
// These two round to the nearest, ties to even.
__device__ __forceinline__ uint16_t float_to_half(float x) {
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}
__device__ __forceinline__ uint16_t float_to_bfloat16(float x) {
  uint16_t bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}
// The same to an integer; 0 for NaN.
__device__ __forceinline__ int32_t float_to_int(float x) {
  int32_t i;
  asm("cvt.rni.s32.f32 %0, %1;" : "=r"(i) : "f"(x));
  return i;
}

// Words in global memory that other GPUs read and write meanwhile. Who acquires what was released also sees all that
// its thread, and before the last barrier its block, had written.
__device__ __forceinline__ void store_release(uint64_t* address, uint64_t value) {
  asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(address), "l"(value) : "memory");
}
__device__ __forceinline__ uint64_t load_acquire(const uint64_t* address) {
  uint64_t value;
  asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(address) : "memory");
  return value;
}
// The same of words that stand for themselves.
__device__ __forceinline__ void store_relaxed(uint32_t* address, uint32_t value) {
  asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
}
__device__ __forceinline__ uint32_t load_relaxed(const uint32_t* address) {
  uint32_t value;
  asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
  return value;
}
// A clock of the device.
__device__ __forceinline__ uint64_t nanoseconds() {
  uint64_t time;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(time));
  return time;
}

// 16 bytes from global to shared memory, or as many zeros; they are there when the thread has waited for their group,
// which are the copies since the last commit. wait_for_copies<N>: all groups but the last N.
__device__ __forceinline__ void copy_16_async(void* target, const void* source, bool is_there) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(target));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(source), "r"(is_there ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int N>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// Four 8 x 8 matrices of 16-bit elements from shared memory: lane i gives the address of row i % 8 of matrix i / 8, and
// gets elements 2 * (lane % 4) and the next of row lane / 4 of each.
__device__ __forceinline__ Words<4> load_matrices(const void* row) {
  Words<4> r;
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r.at[0]), "=r"(r.at[1]), "=r"(r.at[2]), "=r"(r.at[3])
               : "r"(address)
               : "memory");
  return r;
}

// sums += a * b, 16 x 16 by 16 x 8; fragments as load_matrices gives them, b by columns.
__device__ __forceinline__ void multiply_half(float (&sums)[4], const Words<4>& a, uint32_t b_low, uint32_t b_high) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a.at[0]), "r"(a.at[1]), "r"(a.at[2]), "r"(a.at[3]), "r"(b_low), "r"(b_high));
}
__device__ __forceinline__ void multiply_bfloat16(float (&sums)[4], const Words<4>& a, uint32_t b_low,
                                                  uint32_t b_high) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a.at[0]), "r"(a.at[1]), "r"(a.at[2]), "r"(a.at[3]), "r"(b_low), "r"(b_high));
}

}  // namespace teco::cuda::ptx

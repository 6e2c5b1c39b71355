// The twins, on the CPU, of the instructions in csrc/cuda/ptx.h.
#pragma once

#include <cmath>
#include <cstdint>

#include "simt/simt.h"

namespace teco::cuda::ptx {

template <int N>
struct Words {
  uint32_t at[N];
};

// Defined in ptx.cpp: their accesses are checked as a whole, alignment included.
Words<4> load_16(const void* address);
Words<2> load_8(const void* address);
void store_16(void* address, Words<4> words);
void store_8(void* address, Words<2> words);

inline float as_float(uint32_t bits) {
  return __builtin_bit_cast(float, bits);
}
inline uint32_t as_bits(float x) {
  return __builtin_bit_cast(uint32_t, x);
}

inline int lowest_bit(uint32_t bits) {
  return __builtin_ctz(bits);
}

inline uint32_t and_or(uint32_t a, uint32_t b, uint32_t c) {
  return (a & b) | c;
}
int32_t dot_unsigned_signed(uint32_t a, uint32_t b, int32_t c);

float half_to_float(uint16_t bits);
uint16_t float_to_half(float x);
uint16_t float_to_bfloat16(float x);
int32_t float_to_int(float x);

void store_release(uint64_t* address, uint64_t value);
uint64_t load_acquire(const uint64_t* address, simt::Site site = simt::Site::here());
void store_relaxed(uint32_t* address, uint32_t value);
uint32_t load_relaxed(const uint32_t* address, simt::Site site = simt::Site::here());
inline uint64_t nanoseconds() {
  return simt::nanoseconds();
}

void copy_16_async(void* target, const void* source, bool is_there);
inline void commit_copies() {
  simt::commit_copies();
}
template <int N>
void wait_for_copies() {
  simt::wait_for_copies(N);
}
Words<4> load_matrices(const void* row, simt::Site site = simt::Site::here());
void multiply_half(float (&sums)[4], const Words<4>& a, uint32_t b_low, uint32_t b_high,
                   simt::Site site = simt::Site::here());
void multiply_bfloat16(float (&sums)[4], const Words<4>& a, uint32_t b_low, uint32_t b_high,
                       simt::Site site = simt::Site::here());

}  // namespace teco::cuda::ptx

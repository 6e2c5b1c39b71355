#include "simt/ptx.h"

#include <cstring>

namespace teco::cuda::ptx {
namespace {

template <class T>
T load(const void* address, const void* code) {
  simt::check_aligned_access(address, sizeof(T), simt::Access::kRead, code);
  T value;
  std::memcpy(&value, address, sizeof(T));
  return value;
}

template <class T>
void store(void* address, const T& value, const void* code) {
  simt::check_aligned_access(address, sizeof(T), simt::Access::kWrite, code);
  std::memcpy(address, &value, sizeof(T));
}

}  // namespace

Words<4> load_16(const void* address) {
  return load<Words<4>>(address, __builtin_return_address(0));
}
Words<2> load_8(const void* address) {
  return load<Words<2>>(address, __builtin_return_address(0));
}
void store_16(void* address, Words<4> words) {
  store(address, words, __builtin_return_address(0));
}
void store_8(void* address, Words<2> words) {
  store(address, words, __builtin_return_address(0));
}

int32_t dot_unsigned_signed(uint32_t a, uint32_t b, int32_t c) {
  for (int i = 0; i < 4; ++i) c += static_cast<int32_t>(a >> 8 * i & 255u) * static_cast<int8_t>(b >> 8 * i & 255u);
  return c;
}

float half_to_float(uint16_t bits) {
  const uint32_t sign = (bits & 0x8000u) << 16, magnitude = bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return as_float(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  // Exact also where the half is subnormal: 2^112 brings the exponent from one bias to the other.
  return as_float(sign | as_bits(as_float(magnitude << 13) * 0x1p112f));
}

uint16_t float_to_half(float x) {
  const uint32_t sign = as_bits(x) >> 16 & 0x8000u;
  const float magnitude = std::fabs(x);
  if (magnitude != magnitude) return 0x7fffu;
  if (magnitude >= 65520.f) return static_cast<uint16_t>(sign | 0x7c00u);
  if (magnitude < 0x1p-14f)  // subnormal: adding 2^-1 rounds to multiples of 2^-24
    return static_cast<uint16_t>(sign | (as_bits(magnitude + 0.5f) - as_bits(0.5f)));
  const uint32_t bits = as_bits(magnitude) - (112u << 23);
  return static_cast<uint16_t>(sign | (bits + 0xfffu + (bits >> 13 & 1u)) >> 13);
}

uint16_t float_to_bfloat16(float x) {
  const uint32_t bits = as_bits(x);
  if (x != x) return 0x7fffu;
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

int32_t float_to_int(float x) {
  if (x != x) return 0;
  if (x >= 0x1p31f) return INT32_MAX;
  if (x <= -0x1p31f) return INT32_MIN;
  return static_cast<int32_t>(std::nearbyintf(x));
}

void store_release(uint64_t* address, uint64_t value) {
  simt::store_strong(address, 8, value, simt::Order::kRelease, __builtin_return_address(0));
}
uint64_t load_acquire(const uint64_t* address, simt::Site site) {
  return simt::load_strong(address, 8, simt::Order::kAcquire, site, __builtin_return_address(0));
}
void store_relaxed(uint32_t* address, uint32_t value) {
  simt::store_strong(address, 4, value, simt::Order::kRelaxed, __builtin_return_address(0));
}
uint32_t load_relaxed(const uint32_t* address, simt::Site site) {
  return static_cast<uint32_t>(simt::load_strong(address, 4, simt::Order::kRelaxed, site, __builtin_return_address(0)));
}

void copy_16_async(void* target, const void* source, bool is_there) {
  simt::copy_async(target, source, 16, is_there ? 16 : 0, __builtin_return_address(0));
}

Words<4> load_matrices(const void* row, simt::Site site) {
  simt::check_aligned_access(row, 16, simt::Access::kRead, __builtin_return_address(0));
  const char* rows[32];
  simt::gather("ldmatrix", 0xffffffffu, &row, sizeof(row), rows, false, site);
  Words<4> words;
  for (int matrix = 0; matrix < 4; ++matrix)
    std::memcpy(&words.at[matrix], rows[matrix * 8 + simt::lane() / 4] + simt::lane() % 4 * 4, 4);
  return words;
}

namespace {

// A lane's elements of both factors, two to a word.
struct Fragments {
  uint32_t a[4], b[2];
};

template <class ToFloat>
void multiply(float (&sums)[4], const Words<4>& a, uint32_t b_low, uint32_t b_high, const char* name, simt::Site site,
              ToFloat to_float) {
  const Fragments mine = {{a.at[0], a.at[1], a.at[2], a.at[3]}, {b_low, b_high}};
  Fragments all[32];
  simt::gather(name, 0xffffffffu, &mine, sizeof(mine), all, false, site);
  const auto element = [&](uint32_t word, int i) { return to_float(static_cast<uint16_t>(word >> 16 * i)); };
  for (int i = 0; i < 4; ++i) {
    const int row = simt::lane() / 4 + i / 2 * 8, column = simt::lane() % 4 * 2 + i % 2;
    float sum = 0.f;
    for (int k = 0; k < 16; ++k) {
      const Fragments& of_row = all[row % 8 * 4 + k % 8 / 2];
      const Fragments& of_column = all[column * 4 + k % 8 / 2];
      sum += element(of_row.a[row / 8 + k / 8 * 2], k % 2) * element(of_column.b[k / 8], k % 2);
    }
    sums[i] += sum;
  }
}

}  // namespace

void multiply_half(float (&sums)[4], const Words<4>& a, uint32_t b_low, uint32_t b_high, simt::Site site) {
  multiply(sums, a, b_low, b_high, "mma", site, half_to_float);
}

void multiply_bfloat16(float (&sums)[4], const Words<4>& a, uint32_t b_low, uint32_t b_high, simt::Site site) {
  multiply(sums, a, b_low, b_high, "mma", site, [](uint16_t bits) { return as_float(uint32_t{bits} << 16); });
}

}  // namespace teco::cuda::ptx

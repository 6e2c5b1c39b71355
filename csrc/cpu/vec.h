// The thin vector layer: eight fp32 lanes in every instruction set, so that lane order, and with it the order of every
// sum, is written down once. The compiler splits a vector where registers are narrower. Free-standing: this header and
// the kernels above it use no standard-library code, since an inline function compiled for a wide instruction set could
// be the copy that the linker keeps for everybody.
#pragma once

#include <cstdint>

#include "cpu/thread_pool.h"
#include "params.h"

#if defined(TECO_ISA_AVX2)
#include <immintrin.h>
#endif

namespace teco::cpu::TECO_ISA {

typedef float F32x8 __attribute__((vector_size(32)));
typedef int32_t I32x8 __attribute__((vector_size(32)));
typedef uint32_t U32x8 __attribute__((vector_size(32)));
typedef uint16_t U16x8 __attribute__((vector_size(16)));
typedef int8_t I8x8 __attribute__((vector_size(8)));
typedef int8_t I8x32 __attribute__((vector_size(32)));
typedef float F32x4 __attribute__((vector_size(16)));

constexpr int kLanes = 8;
constexpr float kInfinity = __builtin_inff();

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

template <class To, class From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  return __builtin_bit_cast(To, from);
}

template <class T>
constexpr inline T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
constexpr inline T max(T a, T b) {
  return a < b ? b : a;
}
template <class T>
inline T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}

inline F32x8 splat(float x) {
  return F32x8{x, x, x, x, x, x, x, x};
}
inline I32x8 splat_int(int32_t x) {
  return I32x8{x, x, x, x, x, x, x, x};
}

inline F32x8 fma(F32x8 a, F32x8 b, F32x8 c) {
#if defined(TECO_ISA_AVX2)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

// One lane of fma() above: the scalar tail of a loop rounds as its vector body does.
inline float fma(float a, float b, float c) {
#if defined(TECO_ISA_AVX2)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

// Lane i takes x[index[i] % 4].
inline F32x8 select4(const float* x, U32x8 index) {
#if defined(TECO_ISA_AVX2)  // which looks at no more than the lowest two bits
  const __m256 both_halves = _mm256_broadcast_ps(reinterpret_cast<const __m128*>(x));
  return _mm256_permutevar_ps(both_halves, reinterpret_cast<__m256i>(index));
#else
  F32x8 selected;
  for (int i = 0; i < kLanes; ++i) selected[i] = x[index[i] & 3];
  return selected;
#endif
}

// NaN in `a` survives only where `b` is NaN too, as with maxps: callers that must see NaN check for it themselves.
inline F32x8 max(F32x8 a, F32x8 b) {
  return a > b ? a : b;
}
inline F32x8 min(F32x8 a, F32x8 b) {
  return a < b ? a : b;
}

template <class V>
inline V load_bits(const void* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
template <class V>
inline void store_bits(void* p, V v) {
  __builtin_memcpy(p, &v, sizeof v);
}

inline F32x8 half_to_float(U16x8 h) {
#if defined(TECO_ISA_AVX2)
  return _mm256_cvtph_ps(reinterpret_cast<__m128i>(h));
#else
  // Move exponent and mantissa into place, then scale by 2^112 to rebias; inf and NaN get their exponent back by hand.
  const U32x8 wide = __builtin_convertvector(h, U32x8);
  const U32x8 sign = (wide & 0x8000u) << 16, magnitude = wide & 0x7fffu;
  const F32x8 scaled = reinterpret_cast<F32x8>(magnitude << 13) * splat(0x1p112f);
  const U32x8 special = reinterpret_cast<U32x8>(magnitude >= 0x7c00u) & 0x7f800000u;
  return reinterpret_cast<F32x8>(reinterpret_cast<U32x8>(scaled) | special | sign);
#endif
}

inline U16x8 float_to_half(F32x8 x) {
#if defined(TECO_ISA_AVX2)
  return reinterpret_cast<U16x8>(_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
#else
  const U32x8 bits = reinterpret_cast<U32x8>(x);
  const U32x8 sign = bits & 0x80000000u, magnitude = bits ^ sign;
  // Subnormal halves: adding 0.5 lets the float adder shift and round; the result's low bits are the half's.
  const U32x8 subnormal =
      reinterpret_cast<U32x8>(reinterpret_cast<F32x8>(magnitude) + splat(0.5f)) - bit_cast<uint32_t>(0.5f);
  const U32x8 rounded = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const U32x8 is_small = reinterpret_cast<U32x8>(magnitude < (113u << 23));
  const U32x8 is_large = reinterpret_cast<U32x8>(magnitude >= 0x477ff000u);  // 65520 and up round to infinity
  const U32x8 is_nan = reinterpret_cast<U32x8>(magnitude > 0x7f800000u);
  U32x8 half = (is_small & subnormal) | (~is_small & rounded);
  half = (is_large & 0x7c00u) | (~is_large & half);
  half = (is_nan & 0x7e00u) | (~is_nan & half);
  return __builtin_convertvector(half | (sign >> 16), U16x8);
#endif
}

inline F32x8 bfloat16_to_float(U16x8 b) {
#if defined(TECO_ISA_AVX2)  // the compiler would widen one half after the other
  return reinterpret_cast<F32x8>(_mm256_slli_epi32(_mm256_cvtepu16_epi32(reinterpret_cast<__m128i>(b)), 16));
#else
  return reinterpret_cast<F32x8>(__builtin_convertvector(b, U32x8) << 16);
#endif
}

inline U16x8 float_to_bfloat16(F32x8 x) {
  const U32x8 bits = reinterpret_cast<U32x8>(x);
  const U32x8 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const U32x8 is_nan = reinterpret_cast<U32x8>(x != x);
  return __builtin_convertvector((is_nan & ((bits >> 16) | 0x40u)) | (~is_nan & rounded), U16x8);
}

inline F32x8 load(const float* p) {
  return load_bits<F32x8>(p);
}
inline F32x8 load(const Half* p) {
  return half_to_float(load_bits<U16x8>(p));
}
inline F32x8 load(const BFloat16* p) {
  return bfloat16_to_float(load_bits<U16x8>(p));
}
inline void store(float* p, F32x8 v) {
  store_bits(p, v);
}
inline void store(Half* p, F32x8 v) {
  store_bits(p, float_to_half(v));
}
inline void store(BFloat16* p, F32x8 v) {
  store_bits(p, float_to_bfloat16(v));
}

// The first n < 8 lanes; the others are zero.
template <class T>
inline F32x8 load_partial(const T* p, int64_t n) {
  T lanes[kLanes] = {};
  for (int64_t i = 0; i < n; ++i) lanes[i] = p[i];
  return load(lanes);
}
// As many lanes as there are, up to eight.
template <class T>
inline F32x8 load_up_to(const T* p, int64_t n) {
  return n >= kLanes ? load(p) : load_partial(p, n);
}
inline float load_one(const float* p) {
  return *p;
}
template <class T>
inline float load_one(const T* p) {
  return load_partial(p, 1)[0];
}
template <class T>
inline void store_partial(T* p, F32x8 v, int64_t n) {
  T lanes[kLanes];
  store(lanes, v);
  for (int64_t i = 0; i < n; ++i) p[i] = lanes[i];
}

inline float reduce_add(F32x8 v) {
  const F32x4 s = F32x4{v[0], v[1], v[2], v[3]} + F32x4{v[4], v[5], v[6], v[7]};
  return (s[0] + s[2]) + (s[1] + s[3]);
}
inline float reduce_max(F32x8 v) {
  float m = v[0];
  for (int i = 1; i < kLanes; ++i) m = max(m, v[i]);
  return m;
}

// Bit i: whether the comparison `mask` holds in lane i.
inline int lane_bits(I32x8 mask) {
#if defined(TECO_ISA_AVX2)
  return _mm256_movemask_ps(reinterpret_cast<__m256>(mask));
#else
  int bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= (mask[i] & 1) << i;
  return bits;
#endif
}

// Numbers in the order of their keys, which are integers.
inline uint32_t ordered_key(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x + 0.f);  // -0 is +0
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// The number of a key.
inline float from_ordered_key(uint32_t key) {
  return bit_cast<float>(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

// Combines all lanes; `fold` must be associative and commutative.
template <class Fold>
inline int32_t reduce(I32x8 v, Fold fold) {
  v = fold(v, I32x8(__builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3)));
  v = fold(v, I32x8(__builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5)));
  return fold(v, I32x8(__builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6)))[0];
}
inline int32_t reduce_add(I32x8 v) {
  return reduce(v, [](I32x8 a, I32x8 b) { return a + b; });
}
inline int32_t reduce_max(I32x8 v) {
  return reduce(v, [](I32x8 a, I32x8 b) { return a > b ? a : b; });
}

// The lowest byte of every lane.
inline void store_low_bytes(int8_t* p, I32x8 v) {
  const I8x32 bytes = reinterpret_cast<I8x32>(v);
  store_bits(p, __builtin_shufflevector(bytes, bytes, 0, 4, 8, 12, 16, 20, 24, 28));
}

inline F32x8 to_float(I32x8 x) {
  return __builtin_convertvector(x, F32x8);
}

// To the nearest integer, ties to even; |x| below 2^22. Adding 1.5 * 2^23 leaves the integer in the low mantissa bits.
template <class I, class F>
inline I round_by_shift(F x) {
  return reinterpret_cast<I>(x + 0x1.8p23f) - bit_cast<int32_t>(0x1.8p23f);
}
inline I32x8 round_to_int(F32x8 x) {
  return round_by_shift<I32x8>(x);
}

// exp(x), relative error below 2e-7; 0 below -87.3 (also for -inf), +inf above 88.7, NaN for NaN.
// Cody-Waite reduction x = n ln2 + r, |r| <= ln2/2, then a degree-6 polynomial in r.
inline F32x8 exp(F32x8 x) {
  const F32x8 shift = splat(0x1.8p23f);  // adding it rounds to an integer kept in the low mantissa bits
  const F32x8 n_shifted = fma(min(max(x, splat(-88.f)), splat(89.f)), splat(0x1.715476p0f), shift);
  const F32x8 n = n_shifted - shift;
  F32x8 r = fma(n, splat(-0x1.62e4p-1f), x);
  r = fma(n, splat(-0x1.7f7d1cp-20f), r);
  F32x8 p = splat(0x1.6a2434p-10f);
  p = fma(p, r, splat(0x1.1239e2p-7f));
  p = fma(p, r, splat(0x1.5558f2p-5f));
  p = fma(p, r, splat(0x1.555492p-3f));
  p = fma(p, r, splat(0x1.fffffcp-2f));
  p = fma(p, r, splat(1.f));
  p = fma(p, r, splat(1.f));
  // 2^n in two factors, so that n = 128 and n = -126 both stay in range.
  const I32x8 exponent = reinterpret_cast<I32x8>(n_shifted) - splat_int(bit_cast<int32_t>(0x1.8p23f));
  const I32x8 first = exponent >> 1, second = exponent - first;
  p *= reinterpret_cast<F32x8>((first + 127) << 23);
  p *= reinterpret_cast<F32x8>((second + 127) << 23);
  p = x < splat(-87.3365f) ? splat(0.f) : p;
  p = x > splat(88.7228f) ? splat(__builtin_inff()) : p;
  return x != x ? x : p;
}

// exp(x) for x <= 0, relative error below 2e-7; exactly 1 at 0, 0 below -87.7 (also for -inf), NaN for NaN. As exp(),
// without what only positive arguments need.
inline F32x8 exp_nonpositive(F32x8 x) {
  const F32x8 shift = splat(0x1.8p23f);
  x = max(splat(-88.f), x);  // the order of operands keeps a NaN
  const F32x8 n_shifted = fma(x, splat(0x1.715476p0f), shift);
  const F32x8 n = n_shifted - shift;
  F32x8 r = fma(n, splat(-0x1.62e4p-1f), x);
  r = fma(n, splat(-0x1.7f7d1cp-20f), r);
  F32x8 p = splat(0x1.6a2434p-10f);
  p = fma(p, r, splat(0x1.1239e2p-7f));
  p = fma(p, r, splat(0x1.5558f2p-5f));
  p = fma(p, r, splat(0x1.555492p-3f));
  p = fma(p, r, splat(0x1.fffffcp-2f));
  p = fma(p, r, splat(1.f));
  p = fma(p, r, splat(1.f));
  // 2^n, n >= -127: the shift drops all of n_shifted but n. -127 gives 0.
  return p * reinterpret_cast<F32x8>((reinterpret_cast<I32x8>(n_shifted) << 23) + (127 << 23));
}
// Lane 0 of the vector function: one way to round everywhere.
inline float exp_one(float x) {
  return exp_nonpositive(splat(x))[0];
}
inline float log_one(float x) {
  return x == 0.f ? -kInfinity : __builtin_logf(x);
}

// What to subtract from scores of which this is the largest: with nothing but -inf there is no number to shift by.
inline float finite_or_zero(float max) {
  return max == -kInfinity ? 0.f : max;
}

// Calls body(begin, end) over [0, count) in parallel; see run_parallel.
template <class Body>
inline void parallel_for(int64_t count, int64_t grain, int num_threads, Body body) {
  run_parallel(
      count, grain, num_threads,
      [](void* context, int64_t begin, int64_t end) { (*static_cast<Body*>(context))(begin, end); }, &body);
}

// A parallel region costs a few microseconds: give a task no less than this many bytes of traffic.
constexpr int64_t kMinTaskBytes = 32 * 1024;

// Items of a task at the least, each moving so many bytes (none at all, when a tensor is empty).
inline int64_t task_grain(int64_t item_bytes) {
  return ceil_div(kMinTaskBytes, max<int64_t>(item_bytes, 1));
}

// Of a floating dtype.
inline int64_t element_bytes(DType dtype) {
  return dtype == DType::kFloat32 ? 4 : 2;
}

template <class T>
struct Type {};

// Calls body(Type<T>{}), T being the element type that dtype names: `[&]<class T>(Type<T>) { ... }`.
template <class Body>
inline void with_float_type(DType dtype, Body body) {
  switch (dtype) {
    case DType::kFloat32:
      return body(Type<float>{});
    case DType::kFloat16:
      return body(Type<Half>{});
    case DType::kBFloat16:
      return body(Type<BFloat16>{});
    default:
      return;  // the operator layer admits floating dtypes only
  }
}

}  // namespace teco::cpu::TECO_ISA

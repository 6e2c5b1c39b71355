// Probes of what the machine can do, for `bench` to hold the operators against: reading memory (loads of 32 bytes, and
// a prefetch for each line), and multiply-adds of fp32 and of 8 bits with the widest instructions of the set and
// nothing else in the loop.
#include "cpu/int8_dot.h"
#include "cpu/kernels.h"

namespace teco::cpu::TECO_ISA {
namespace {

constexpr int64_t kLineBytes = 64;
constexpr int64_t kPrefetchBytes = 1024;
constexpr int64_t kTasksPerThread = 4;

constexpr int kChains = 12;  // of 16 registers; two units with a latency of four or five cycles need ten at the most

// One register of floats and one of integers, and what the instruction set does best with them: a multiply-add, and
// sums of products of unsigned bytes of `sum` and signed bytes of x. (Wider vectors than registers, as in vec.h, will
// not do: an array of them would live on the stack.)
#if defined(TECO_ISA_AVX512)
typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Integers __attribute__((vector_size(64)));
inline Floats multiply_add(Floats a, Floats b, Floats c) {
  return _mm512_fmadd_ps(a, b, c);
}
inline Integers dot_add(Integers sum, Integers x) {
  const auto bytes = reinterpret_cast<__m512i>(sum);
  return reinterpret_cast<Integers>(_mm512_dpbusd_epi32(bytes, bytes, reinterpret_cast<__m512i>(x)));
}
#elif defined(TECO_ISA_AVX2)
typedef F32x8 Floats;
typedef I32x8 Integers;
inline Floats multiply_add(Floats a, Floats b, Floats c) {
  return _mm256_fmadd_ps(a, b, c);
}
inline Integers dot_add(Integers sum, Integers x) {
  const auto bytes = reinterpret_cast<__m256i>(sum);
  const __m256i products = _mm256_maddubs_epi16(bytes, reinterpret_cast<__m256i>(x));
  return reinterpret_cast<Integers>(_mm256_add_epi16(bytes, products));
}
#else
typedef F32x4 Floats;
typedef int16_t Integers __attribute__((vector_size(16)));
inline Floats multiply_add(Floats a, Floats b, Floats c) {
  return a * b + c;
}
inline Integers dot_add(Integers sum, Integers x) {
  return sum + (sum & 0xff) * ((x << 8) >> 8) + ((sum >> 8) & 0xff) * (x >> 8);
}
#endif

// Makes the compiler believe that the sum of the vectors is used.
template <class V, int N>
inline void use(const V (&vectors)[N]) {
  V sum = vectors[0];
  for (int i = 1; i < N; ++i) sum += vectors[i];
  asm volatile("" : : "m"(sum));
}

// Reads lines [begin, end), cut into S streams that advance together.
template <int S>
void read_lines(const uint8_t* data, int64_t begin, int64_t end) {
  const int64_t lines = (end - begin) / S;
  const uint8_t* stream[S];
  I32x8 low[S] = {}, high[S] = {};
  for (int s = 0; s < S; ++s) stream[s] = data + (begin + s * lines) * kLineBytes;
  for (int64_t i = 0; i < lines; ++i) {
#pragma GCC unroll 8
    for (int s = 0; s < S; ++s) {
      const uint8_t* line = stream[s] + i * kLineBytes;
      __builtin_prefetch(line + kPrefetchBytes, 0, 0);
      low[s] ^= load_bits<I32x8>(line);
      high[s] ^= load_bits<I32x8>(line + kLineBytes / 2);
    }
  }
  use(low);
  use(high);
}

}  // namespace

void read_probe(const ReadProbeParams& p, int num_threads) {
  const auto* data = static_cast<const uint8_t*>(p.data);
  parallel_for(p.num_bytes / kLineBytes, 1, num_threads, [&](int64_t begin, int64_t end) {
    switch (p.num_streams) {
      case 1:
        return read_lines<1>(data, begin, end);
      case 2:
        return read_lines<2>(data, begin, end);
      case 4:
        return read_lines<4>(data, begin, end);
      default:
        return read_lines<8>(data, begin, end);
    }
  });
}

// In both arithmetic probes every step takes what the one before it gave, else the compiler would take it out of the
// loop.

int64_t fma_probe(int64_t iterations, int num_threads) {
  const int64_t tasks = num_threads * kTasksPerThread;
  parallel_for(tasks, 1, num_threads, [&](int64_t begin, int64_t end) {
    const Floats zero = {}, half = zero + 0.5f, one = zero + 1.f;
    Floats chain[kChains];
    for (int c = 0; c < kChains; ++c) chain[c] = zero + static_cast<float>(c);
    for (int64_t i = 0; i < (end - begin) * iterations; ++i) {
#pragma GCC unroll 16
      for (int c = 0; c < kChains; ++c) chain[c] = multiply_add(chain[c], half, one);  // tends to 2
    }
    use(chain);
  });
  return tasks * iterations * kChains * static_cast<int64_t>(sizeof(Floats) / sizeof(float)) * 2;
}

int64_t int8_probe(int64_t iterations, int num_threads) {
  const int64_t tasks = num_threads * kTasksPerThread;
  parallel_for(tasks, 1, num_threads, [&](int64_t begin, int64_t end) {
    const Integers zero = {}, x = zero + static_cast<int16_t>(iterations >> 62);  // 0, which the compiler cannot know
    Integers chain[kChains];
    for (int c = 0; c < kChains; ++c) chain[c] = zero + static_cast<int16_t>(c);
    for (int64_t i = 0; i < (end - begin) * iterations; ++i) {
#pragma GCC unroll 16
      for (int c = 0; c < kChains; ++c) {
        Integers sum = dot_add(chain[c], x);
        keep_in_register(sum);
        chain[c] = sum;
      }
    }
    use(chain);
  });
  return tasks * iterations * kChains * static_cast<int64_t>(sizeof(Integers)) * 2;
}

}  // namespace teco::cpu::TECO_ISA

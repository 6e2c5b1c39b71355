// Probes of what the machine can do, for `bench` to hold the operators against: reading memory, fp32 multiply-adds, and
// 8-bit multiply-adds, each with nothing else in the loop and with the instructions that the kernels beside it use.
#include "cpu/int8_dot.h"

namespace teco::cpu::TECO_ISA {
namespace {

constexpr int64_t kLineBytes = 64;
constexpr int64_t kPrefetchBytes = 1024;
constexpr int64_t kTasksPerThread = 4;

constexpr int kChains = 12;  // of 16 registers; two units with a latency of four or five cycles need ten at the most

// One register: an array of vectors that the compiler must split would live on the stack.
#if defined(TECO_ISA_AVX2)
typedef F32x8 Register;
inline Register multiply_add(Register a, Register b, Register c) {
  return fma(a, b, c);
}
#else
typedef F32x4 Register;
inline Register multiply_add(Register a, Register b, Register c) {
  return a * b + c;
}
#endif

// Makes the compiler believe that the value is used.
template <class V>
inline void use(const V& value) {
  asm volatile("" : : "m"(value));
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

int64_t fma_probe(int64_t iterations, int num_threads) {
  const int64_t tasks = num_threads * kTasksPerThread;
  parallel_for(tasks, 1, num_threads, [&](int64_t begin, int64_t end) {
    const Register zero = {}, half = zero + 0.5f, one = zero + 1.f;
    Register chain[kChains];
    for (int c = 0; c < kChains; ++c) chain[c] = zero + static_cast<float>(c);
    for (int64_t i = 0; i < (end - begin) * iterations; ++i) {
#pragma GCC unroll 16
      for (int c = 0; c < kChains; ++c) chain[c] = multiply_add(chain[c], half, one);  // tends to 2
    }
    use(chain);
  });
  return tasks * iterations * kChains * static_cast<int64_t>(sizeof(Register) / sizeof(float)) * 2;
}

// Every product depends on the sum before it, else the compiler would take it out of the loop. The activations are
// zeros, which it cannot know: sums never leave their range.
int64_t int8_probe(int64_t iterations, int num_threads) {
  const int64_t tasks = num_threads * kTasksPerThread;
  parallel_for(tasks, 1, num_threads, [&](int64_t begin, int64_t end) {
    const I32x8 activation = splat_int(iterations < 0);
    DotSum chain[kChains];
    for (int c = 0; c < kChains; ++c) chain[c] = reinterpret_cast<DotSum>(splat_int(0x01020304 + c));
    for (int64_t i = 0; i < (end - begin) * iterations; ++i) {
#pragma GCC unroll 16
      for (int c = 0; c < kChains; ++c) chain[c] = dot_add(chain[c], reinterpret_cast<U8x32>(chain[c]), activation);
    }
    use(chain);
  });
  return tasks * iterations * kChains * 32 * 2;
}

}  // namespace teco::cpu::TECO_ISA

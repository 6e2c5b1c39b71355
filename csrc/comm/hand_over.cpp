#include "comm/hand_over.h"

#include <algorithm>
#include <bit>
#include <cstring>

#if defined(__x86_64__)
#include <emmintrin.h>
#endif

namespace teco::comm {
namespace {

// One call in so many goes the other way.
constexpr uint32_t kTryEvery = 64;

#if defined(__x86_64__)
void stream(char* to, const char* from, int64_t bytes) {
  constexpr int64_t kLine = 64;
  for (; bytes >= kLine; bytes -= kLine, to += kLine, from += kLine) {
    const auto* source = reinterpret_cast<const __m128i*>(from);
    auto* target = reinterpret_cast<__m128i*>(to);
    const __m128i a = _mm_loadu_si128(source), b = _mm_loadu_si128(source + 1);
    const __m128i c = _mm_loadu_si128(source + 2), d = _mm_loadu_si128(source + 3);
    _mm_stream_si128(target, a);
    _mm_stream_si128(target + 1, b);
    _mm_stream_si128(target + 2, c);
    _mm_stream_si128(target + 3, d);
  }
  if (bytes > 0) std::memcpy(to, from, static_cast<size_t>(bytes));
  _mm_sfence();  // streamed stores are not ordered by the release that follows
}
#endif

}  // namespace

void hand_over(void* to, const void* from, int64_t bytes, Way way) {
  if (bytes <= 0) return;
#if defined(__x86_64__)
  if (way == Way::kStreamed) return stream(static_cast<char*>(to), static_cast<const char*>(from), bytes);
#endif
  std::memcpy(to, from, static_cast<size_t>(bytes));
}

Way WayChoice::next() const {
  if (calls_ < 2) return static_cast<Way>(calls_);
  const Way way = best();
  return calls_ % kTryEvery != 0 ? way : way == Way::kCached ? Way::kStreamed : Way::kCached;
}

void WayChoice::took(Way way, std::chrono::nanoseconds time) {
  float& cost = cost_[static_cast<size_t>(way)];
  const auto spent = static_cast<float>(time.count());
  // A call in which a rank was late or lost its core says little: it counts as twice the usual at the most.
  cost = cost == 0 ? spent : cost + (std::min(spent, 2 * cost) - cost) / 4;
  ++calls_;
}

WayChoice& Ways::of(Collective collective, int64_t bytes) {
  return choices_[static_cast<size_t>(collective)][static_cast<size_t>(std::bit_width(static_cast<uint64_t>(bytes)))];
}

}  // namespace teco::comm

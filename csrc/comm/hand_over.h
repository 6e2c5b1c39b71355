// How data gets from a rank to the others: through its caches, or past them.
//
// A core that reads what another has just written takes it out of that one's cache. Where both share a last-level cache
// this is the fast way. Where they do not, lines come over one by one, and it is up to three times faster to write past
// the caches and have the reader stream from memory. Which it is no processor tells, least of all a virtual one; and it
// may change, when ranks are moved. So it is measured on the calls themselves. The bits are the same either way.
#pragma once

#include <array>
#include <chrono>
#include <cstdint>

#include "comm/layout.h"

namespace teco::comm {

enum class Way : uint8_t { kCached, kStreamed };

// `to` is aligned to 16 bytes.
void hand_over(void* to, const void* from, int64_t bytes, Way way);

// The better way for one kind of call: the other one is tried now and then.
class WayChoice {
 public:
  Way next() const;
  void took(Way way, std::chrono::nanoseconds time);

 private:
  Way best() const { return cost_[1] < cost_[0] ? Way::kStreamed : Way::kCached; }

  uint32_t calls_ = 0;  // counted alike by all ranks, so that they try together
  std::array<float, 2> cost_{};
};

// The choices of a communicator, by collective and size.
class Ways {
 public:
  // Smaller messages stay in the caches: they are not worth to be measured.
  static constexpr int64_t kLeastBytes = 4 * 1024;

  WayChoice& of(Collective collective, int64_t bytes);

 private:
  std::array<std::array<WayChoice, 64>, kNumCollectives> choices_;
};

}  // namespace teco::comm

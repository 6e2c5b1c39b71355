#include "simt/order.h"

#include <algorithm>

namespace simt {

void Knowledge::add_block(std::uint32_t block, std::uint32_t barriers) {
  std::uint32_t& known = blocks_[block];
  known = std::max(known, barriers);
}

void Knowledge::add_release(const Moment& release) {
  // Releases are counted over the whole run of a thread, so its barriers need not be kept.
  std::uint16_t& known = threads_[{release.block, release.thread}];
  known = std::max<std::uint16_t>(known, release.releases + 1);
}

void Knowledge::join(const Knowledge& other) {
  for (const auto& [block, barriers] : other.blocks_) add_block(block, barriers);
  for (const auto& [thread, releases] : other.threads_) {
    std::uint16_t& known = threads_[thread];
    known = std::max(known, releases);
  }
}

bool Knowledge::covers_block(const Moment& then) const {
  const auto found = blocks_.find(then.block);
  return found != blocks_.end() && then.barriers < found->second;
}

bool Knowledge::covers_thread(const Moment& then) const {
  const auto found = threads_.find({then.block, then.thread});
  return found != threads_.end() && then.releases < found->second;
}

}  // namespace simt

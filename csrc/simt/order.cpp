#include "simt/order.h"

#include <algorithm>

namespace simt {

void Knowledge::add_launches(std::uint8_t rank, std::uint32_t last_block) {
  if (rank >= launches_.size()) launches_.resize(rank + 1);
  if (last_block <= launches_[rank]) return;
  launches_[rank] = last_block;
  std::erase_if(blocks_, [&](const auto& part) { return covers_launch(part.second.rank, part.first); });
}

void Knowledge::add_release(const Moment& release) {
  Part& part = blocks_[release.block];
  part.rank = release.rank;
  part.barriers = std::max(part.barriers, release.barriers);
  std::uint16_t& releases = part.threads[release.thread];
  releases = std::max<std::uint16_t>(releases, release.releases + 1);
}

void Knowledge::join(const Knowledge& other) {
  for (std::size_t rank = 0; rank < other.launches_.size(); ++rank)
    add_launches(static_cast<std::uint8_t>(rank), other.launches_[rank]);
  for (const auto& [block, part] : other.blocks_) {
    if (covers_launch(part.rank, block)) continue;
    Part& own = blocks_[block];
    own.rank = part.rank;
    own.barriers = std::max(own.barriers, part.barriers);
    for (const auto& [thread, releases] : part.threads) {
      std::uint16_t& known = own.threads[thread];
      known = std::max(known, releases);
    }
  }
}

bool Knowledge::covers_block(const Moment& then) const {
  if (covers_launch(then.rank, then.block)) return true;
  const auto found = blocks_.find(then.block);
  return found != blocks_.end() && then.barriers < found->second.barriers;
}

bool Knowledge::covers_thread(const Moment& then) const {
  const auto found = blocks_.find(then.block);
  if (found == blocks_.end()) return false;
  const auto thread = found->second.threads.find(then.thread);
  return thread != found->second.threads.end() && then.releases < thread->second;
}

}  // namespace simt

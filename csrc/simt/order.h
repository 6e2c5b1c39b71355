// What happened before what, between blocks: through the end of a launch, and through a release and the acquire that
// reads what it wrote.
#pragma once

#include <cstdint>
#include <map>
#include <vector>

namespace simt {

// A point in a kernel's run, as far as the order of memory accesses goes.
struct Moment {
  std::uint32_t block = 0;  // counted over all launches, from 1
  std::uint32_t barriers = 0, warp_barriers = 0;
  std::uint16_t thread = 0;
  std::uint16_t releases = 0;  // of this thread
  std::uint8_t rank = 0;
};

// What is known to have happened in other blocks.
class Knowledge {
 public:
  // All that this rank's blocks up to this one did: its launches come one after the other.
  void add_launches(std::uint8_t rank, std::uint32_t last_block);
  // What the moment's thread did up to this release, and its block in front of the last barrier.
  void add_release(const Moment& release);
  void join(const Knowledge& other);
  bool empty() const { return launches_.empty() && blocks_.empty(); }
  void clear() { launches_.clear(), blocks_.clear(); }

  // By any thread of its block, at this moment's barriers; by its thread alone.
  bool covers_block(const Moment& then) const;
  bool covers_thread(const Moment& then) const;

 private:
  struct Part {
    std::uint8_t rank = 0;
    std::uint32_t barriers = 0;                        // all before this one
    std::map<std::uint16_t, std::uint16_t> threads{};  // of each, all before this many releases
  };
  bool covers_launch(std::uint8_t rank, std::uint32_t block) const {
    return rank < launches_.size() && block <= launches_[rank];
  }

  std::vector<std::uint32_t> launches_;   // of each rank, the last block of the launches that are known
  std::map<std::uint32_t, Part> blocks_;  // of other launches
};

}  // namespace simt

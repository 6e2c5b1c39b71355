// What happened before what, between blocks: through the end of a launch, and through a release and the acquire that
// reads what it wrote.
#pragma once

#include <cstdint>
#include <map>
#include <utility>

namespace simt {

// A point in a kernel's run, as far as the order of memory accesses goes.
struct Moment {
  std::uint32_t block = 0;  // counted over all launches, from 1
  std::uint32_t barriers = 0, warp_barriers = 0;
  std::uint16_t thread = 0;
  std::uint16_t releases = 0;  // of this thread
};

// What is known to have happened in other blocks.
class Knowledge {
 public:
  // What a block did before it had passed so many barriers; all of it.
  void add_block(std::uint32_t block, std::uint32_t barriers);
  void add_whole_block(std::uint32_t block) { add_block(block, UINT32_MAX); }
  // What the thread did up to this release, the first of which has number 0.
  void add_release(const Moment& release);
  void join(const Knowledge& other);
  bool empty() const { return blocks_.empty() && threads_.empty(); }
  void clear() { blocks_.clear(), threads_.clear(); }

  // By any thread of its block, at this moment's barriers; by its thread alone.
  bool covers_block(const Moment& then) const;
  bool covers_thread(const Moment& then) const;

 private:
  std::map<std::uint32_t, std::uint32_t> blocks_;
  std::map<std::pair<std::uint32_t, std::uint16_t>, std::uint16_t> threads_;
};

}  // namespace simt

#include "host/block_pool.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>

namespace teco::host {
namespace {

template <class... Parts>
void require(bool condition, const Parts&... parts) {
  if (condition) return;
  std::string message;
  const auto append = [&](const auto& part) {
    if constexpr (requires { std::to_string(part); }) {
      message += std::to_string(part);
    } else {
      message += part;
    }
  };
  (append(parts), ...);
  throw std::invalid_argument(message);
}

size_t checked_count(int64_t num_blocks, int64_t block_size) {
  require(num_blocks >= 0 && num_blocks <= std::numeric_limits<int32_t>::max(),
          "num_blocks: expected 0 to 2^31 - 1, got ", num_blocks);
  require(block_size >= 1 && block_size <= 1 << 20, "block_size: expected 1 to 2^20, got ", block_size);
  return static_cast<size_t>(num_blocks);
}

size_t checked_mask(int hash_bits) {
  require(hash_bits >= 0 && hash_bits <= 64, "hash_bits: expected 0 to 64, got ", hash_bits);
  return hash_bits == 64 ? ~size_t{0} : (size_t{1} << hash_bits) - 1;
}

// The finalizer of splitmix64: every input bit reaches every output bit.
uint64_t mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

}  // namespace

BlockPool::BlockPool(int64_t num_blocks, int64_t block_size, int hash_bits)
    : block_size_(block_size),
      hash_mask_(checked_mask(hash_bits)),
      blocks_(checked_count(num_blocks, block_size)),
      tokens_(blocks_.size() * static_cast<size_t>(block_size)),
      index_(blocks_.size(), Hash{this}, Equal{this}) {
  free_.reserve(blocks_.size());
  for (int64_t block = num_blocks - 1; block >= 0; --block) free_.push_back(static_cast<int32_t>(block));
}

std::optional<std::vector<int32_t>> BlockPool::allocate(int64_t n) {
  require(n >= 0, "n: expected a number of blocks >= 0, got ", n);
  if (n > num_available()) return std::nullopt;
  std::vector<int32_t> taken(static_cast<size_t>(n));
  for (int32_t& block : taken) {
    if (free_.empty()) {
      block = evict_oldest();
    } else {
      block = free_.back();
      free_.pop_back();
    }
    blocks_[block].ref_count = 1;
  }
  peak_used_ = std::max(peak_used_, num_used());
  return taken;
}

void BlockPool::ref(std::span<const int64_t> blocks) {
  check_used(blocks);
  for (const int64_t block : blocks) ++blocks_[block].ref_count;
}

void BlockPool::free(std::span<const int64_t> blocks) {
  for (const int64_t block : blocks) check_id(block, "block_ids");
  // A block may stand in the list several times, so holding it once is not enough: count down on trial.
  size_t held = 0;
  while (held < blocks.size() && blocks_[blocks[held]].ref_count > 0) --blocks_[blocks[held++]].ref_count;
  for (size_t i = 0; i < held; ++i) ++blocks_[blocks[i]].ref_count;
  if (held < blocks.size()) require(false, "block_ids: block ", blocks[held], " is freed more often than it is held");

  for (size_t i = blocks.size(); i-- > 0;) release(static_cast<int32_t>(blocks[i]));
}

std::vector<int32_t> BlockPool::find_prefix(std::span<const int32_t> tokens, uint64_t salt) {
  const auto num_tokens = static_cast<int64_t>(tokens.size());
  const std::vector<int32_t> found = longest_match({kNoEntry, salt, tokens.data()}, num_tokens / block_size_);
  for (const int32_t block : found) take(block);
  peak_used_ = std::max(peak_used_, num_used());
  queried_tokens_ += num_tokens;
  hit_tokens_ += static_cast<int64_t>(found.size()) * block_size_;
  return found;
}

std::vector<int32_t> BlockPool::cache_blocks(std::span<const int64_t> blocks, std::span<const int32_t> tokens,
                                             std::optional<int64_t> parent, uint64_t salt) {
  const auto count = static_cast<int64_t>(blocks.size());
  require(static_cast<int64_t>(tokens.size()) == count * block_size_, "token_ids: expected ", count, " blocks of ",
          block_size_, " tokens, got ", tokens.size(), " tokens");
  check_used(blocks);
  std::vector<int32_t> canonical(blocks.begin(), blocks.end());
  std::vector<int32_t> sorted = canonical;
  std::sort(sorted.begin(), sorted.end());
  require(std::adjacent_find(sorted.begin(), sorted.end()) == sorted.end(), "block_ids: a block stands there twice");

  Key key{kNoEntry, salt, tokens.data()};
  if (parent) {
    check_id(*parent, "parent");
    require(blocks_[*parent].ref_count > 0, "parent: block ", *parent, " is not in use");
    key = {blocks_[*parent].entry, 0, tokens.data()};
    if (key.parent_entry == kNoEntry) return canonical;
  }
  const std::vector<int32_t> known = longest_match(key, count);
  // No later block can be in the index under this prefix, since its parent is not; so it must not be there at all.
  for (size_t i = known.size(); i < canonical.size(); ++i)
    require(blocks_[canonical[i]].entry == kNoEntry, "block_ids: block ", canonical[i], " already holds other tokens");

  for (size_t i = 0; i < canonical.size(); ++i) {
    int32_t& block = canonical[i];
    if (i < known.size()) {
      take(known[i]);
      release(block);
      block = known[i];
    } else {
      insert(block, key);
    }
    key = {blocks_[block].entry, 0, key.tokens + block_size_};
  }
  return canonical;
}

void BlockPool::clear_prefix_cache() {
  index_.clear();
  for (Block& block : blocks_) block.entry = kNoEntry;
  while (oldest_ != kNone) {
    const int32_t block = oldest_;
    unlink(block);
    free_.push_back(block);
  }
}

int64_t BlockPool::ref_count(int64_t block) const {
  check_id(block, "block_id");
  return blocks_[block].ref_count;
}

bool BlockPool::is_shared(int64_t block) const {
  check_id(block, "block_id");
  return blocks_[block].ref_count > 1 || blocks_[block].entry != kNoEntry;
}

BlockPool::Key BlockPool::key_of(int32_t block) const {
  return {blocks_[block].parent_entry, blocks_[block].salt, tokens_.data() + block * block_size_};
}

size_t BlockPool::hash(const Key& key) const {
  uint64_t h = mix(key.parent_entry ^ mix(key.salt + 1));
  for (int64_t i = 0; i < block_size_; ++i) h = mix(h + static_cast<uint32_t>(key.tokens[i]) + 1);
  return h & hash_mask_;
}

bool BlockPool::equal(const Key& a, const Key& b) const {
  return a.parent_entry == b.parent_entry && a.salt == b.salt && std::equal(a.tokens, a.tokens + block_size_, b.tokens);
}

void BlockPool::check_id(int64_t block, const char* argument) const {
  require(block >= 0 && block < num_blocks(), argument, ": expected 0 to ", num_blocks() - 1, ", got ", block);
}

void BlockPool::check_used(std::span<const int64_t> blocks) const {
  for (const int64_t block : blocks) {
    check_id(block, "block_ids");
    require(blocks_[block].ref_count > 0, "block_ids: block ", block, " is not in use");
  }
}

std::vector<int32_t> BlockPool::longest_match(Key first, int64_t max_blocks) const {
  std::vector<int32_t> found;
  for (Key key = first; static_cast<int64_t>(found.size()) < max_blocks;) {
    const auto match = index_.find(key);
    if (match == index_.end()) break;
    found.push_back(*match);
    key = {blocks_[*match].entry, 0, key.tokens + block_size_};
  }
  return found;
}

void BlockPool::insert(int32_t block, const Key& key) {
  std::copy_n(key.tokens, block_size_, tokens_.begin() + block * block_size_);
  blocks_[block].entry = ++last_entry_;
  blocks_[block].parent_entry = key.parent_entry;
  blocks_[block].salt = key.salt;
  index_.insert(block);
}

void BlockPool::take(int32_t block) {
  if (blocks_[block].ref_count++ == 0) unlink(block);
}

void BlockPool::release(int32_t block) {
  Block& released = blocks_[block];
  if (--released.ref_count > 0) return;
  if (released.entry == kNoEntry) {
    free_.push_back(block);
    return;
  }
  released.older = newest_;
  released.newer = kNone;
  (newest_ == kNone ? oldest_ : blocks_[newest_].newer) = block;
  newest_ = block;
  ++num_cached_;
}

void BlockPool::unlink(int32_t block) {
  const auto [older, newer] = std::pair(blocks_[block].older, blocks_[block].newer);
  (older == kNone ? oldest_ : blocks_[older].newer) = newer;
  (newer == kNone ? newest_ : blocks_[newer].older) = older;
  --num_cached_;
}

int32_t BlockPool::evict_oldest() {
  const int32_t block = oldest_;
  unlink(block);
  index_.erase(block);
  blocks_[block].entry = kNoEntry;
  ++num_evictions_;
  return block;
}

}  // namespace teco::host

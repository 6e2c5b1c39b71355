// Who holds which block of the KV cache, and which blocks already hold a given prefix. Blocks are ids here; the memory
// behind them belongs to the caller. Not thread-safe: one scheduler owns a pool.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <unordered_set>
#include <vector>

namespace teco::host {

// A block is in one of three states:
//   used    somebody holds a reference (several holders: it is shared);
//   cached  nobody does, but the prefix index knows its content: kept until the room is needed;
//   free    nobody does, and its content means nothing.
//
// The prefix index is a tree. A full block of tokens is an entry; its key is (parent entry, salt, tokens). Entries are
// numbered and numbers are never reused, so equal keys mean equal prefixes down to the root: hashes only find
// candidates, they decide nothing. Once an entry is evicted its children can no longer be found, and leave in their
// turn; freeing a sequence releases its last block first, so children normally go before their parents.
//
// Errors are std::invalid_argument (ValueError in Python) and leave the pool as it was.
class BlockPool {
 public:
  // Only the low `hash_bits` bits of a hash are used: tests make collisions with it.
  BlockPool(int64_t num_blocks, int64_t block_size, int hash_bits);
  BlockPool(const BlockPool&) = delete;
  BlockPool& operator=(const BlockPool&) = delete;

  // n blocks with one reference each, cached ones evicted as needed; nothing when fewer are available.
  std::optional<std::vector<int32_t>> allocate(int64_t n);
  // One more reference to each block; all must be in use.
  void ref(std::span<const int64_t> blocks);
  // One reference less to each block. Those nobody holds any longer become cached or free, the last one first.
  void free(std::span<const int64_t> blocks);

  // The blocks of the longest indexed prefix, each with a reference taken.
  std::vector<int32_t> find_prefix(std::span<const int32_t> tokens, uint64_t salt);
  // Enters full blocks, which follow `parent`, into the index. Returns the blocks to use from now on: where another
  // block already held the same prefix, that one, the references having changed hands. A parent that is not in the
  // index (it was cleared meanwhile) makes this a no-op.
  std::vector<int32_t> cache_blocks(std::span<const int64_t> blocks, std::span<const int32_t> tokens,
                                    std::optional<int64_t> parent, uint64_t salt);
  // Forgets all prefixes. Blocks in use stay in use.
  void clear_prefix_cache();

  int64_t ref_count(int64_t block) const;
  // Whether writing into the block would be seen by another holder or by the prefix index.
  bool is_shared(int64_t block) const;

  int64_t num_blocks() const { return static_cast<int64_t>(blocks_.size()); }
  int64_t block_size() const { return block_size_; }
  int64_t num_free() const { return static_cast<int64_t>(free_.size()); }
  int64_t num_cached() const { return num_cached_; }
  int64_t num_available() const { return num_free() + num_cached_; }
  int64_t num_used() const { return num_blocks() - num_available(); }
  int64_t peak_used() const { return peak_used_; }
  int64_t num_evictions() const { return num_evictions_; }
  int64_t queried_tokens() const { return queried_tokens_; }
  int64_t hit_tokens() const { return hit_tokens_; }

 private:
  static constexpr int32_t kNone = -1;
  static constexpr uint64_t kNoEntry = 0;

  // What the index is searched by. A root entry has kNoEntry as its parent; only root entries carry the salt.
  struct Key {
    uint64_t parent_entry;
    uint64_t salt;
    const int32_t* tokens;  // [block_size]
  };

  struct Block {
    int64_t ref_count = 0;
    uint64_t entry = kNoEntry;  // number of the index entry, if it has one
    uint64_t parent_entry = kNoEntry;
    uint64_t salt = 0;
    int32_t older = kNone, newer = kNone;  // neighbours among the cached blocks
  };

  // The index holds block ids, hashed and compared by the key of the block.
  struct Hash {
    using is_transparent = void;
    const BlockPool* pool;
    size_t operator()(const Key& key) const { return pool->hash(key); }
    size_t operator()(int32_t block) const { return pool->hash(pool->key_of(block)); }
  };
  struct Equal {
    using is_transparent = void;
    const BlockPool* pool;
    bool operator()(int32_t a, int32_t b) const { return a == b || pool->equal(pool->key_of(a), pool->key_of(b)); }
    bool operator()(const Key& a, int32_t b) const { return pool->equal(a, pool->key_of(b)); }
    bool operator()(int32_t a, const Key& b) const { return pool->equal(pool->key_of(a), b); }
  };

  Key key_of(int32_t block) const;
  size_t hash(const Key& key) const;
  bool equal(const Key& a, const Key& b) const;

  void check_id(int64_t block, const char* argument) const;
  void check_used(std::span<const int64_t> blocks) const;
  std::vector<int32_t> longest_match(Key first, int64_t max_blocks) const;
  void insert(int32_t block, const Key& key);
  void take(int32_t block);     // one more reference to a used or cached block
  void release(int32_t block);  // one reference less
  void unlink(int32_t block);   // out of the list of cached blocks
  int32_t evict_oldest();

  int64_t block_size_;
  size_t hash_mask_;
  std::vector<Block> blocks_;
  std::vector<int32_t> tokens_;  // [num_blocks, block_size]; meaningful for blocks that have an entry
  std::vector<int32_t> free_;    // a stack: the block freed last is likeliest still in the processor's cache
  std::unordered_set<int32_t, Hash, Equal> index_;
  uint64_t last_entry_ = kNoEntry;
  int32_t oldest_ = kNone, newest_ = kNone;  // ends of the list of cached blocks
  int64_t num_cached_ = 0;
  int64_t peak_used_ = 0, num_evictions_ = 0, queried_tokens_ = 0, hit_tokens_ = 0;
};

}  // namespace teco::host

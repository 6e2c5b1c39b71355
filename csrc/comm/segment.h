// Memory without a name: it is gone with the last process that has mapped it, however that one ends.
#pragma once

#include <sys/types.h>

#include <cstdint>

#include "comm/layout.h"
#include "comm/visible.h"

namespace teco::comm {

class TECO_VISIBLE Segment {
 public:
  // A new one, of mode 0600, its size fixed for good; `registered_bytes` are those of a rank. Throws system_error where
  // the system has no such memory.
  static Segment create(int world_size, int64_t registered_bytes);
  // That of another process of the same user, by its descriptor there.
  static Segment open(pid_t pid, int descriptor, uint64_t token, int world_size, int64_t registered_bytes);

  Segment(Segment&& other) noexcept;
  ~Segment();
  Segment& operator=(Segment&&) = delete;

  // For others to open it by, until it is closed. The memory stays.
  int descriptor() const { return descriptor_; }
  void close_descriptor();

  uint64_t token() const { return layout_->header.token; }
  int world_size() const { return world_size_; }
  Layout& layout() const { return *layout_; }
  // Of each rank: whole pages.
  int64_t registered_bytes() const { return registered_bytes_; }
  char* registered(int rank) const {
    return reinterpret_cast<char*>(layout_) + Layout::slots_end(world_size_) + rank * registered_bytes_;
  }

 private:
  Segment(int descriptor, int world_size, int64_t registered_bytes);  // takes the descriptor over
  static size_t bytes(int world_size, int64_t registered_bytes);

  int descriptor_;
  int world_size_;
  int64_t registered_bytes_;
  Layout* layout_;
};

}  // namespace teco::comm

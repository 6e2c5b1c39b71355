// What is known about the memory that a kernel may use: who read and wrote each part of it since the last barrier.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "simt/order.h"
#include "simt/simt.h"

namespace simt {

enum class Spread : std::uint8_t { kOneThread, kOneWarp, kBlock };

// The last access of a kind to a part of memory, or the last few that no barrier separates.
struct Record {
  Moment moment;
  Spread by = Spread::kOneThread;
  bool pending = false;  // a cp.async that was not waited for
  const void* code = nullptr;
};

struct Cell {
  Record write, read, update;            // update: atomic
  std::vector<Record> other_reads = {};  // by blocks that run at the same time; what no acquire has ordered
};

// What an access has to do with a cp.async: nothing; it issues one that will write here; one arrives.
enum class Async : std::uint8_t { kNo, kIssued, kArrives };

// Who makes an access, and when.
struct Accessor {
  Moment now;
  std::uint32_t first_block;  // of this launch: before it all is in order
  const Knowledge* known_to_block = nullptr;
  const Knowledge* known_to_thread = nullptr;
  const void* code = nullptr;
};

// A piece of memory and what happened to it.
struct Region {
  std::uintptr_t begin = 0, end = 0;
  std::size_t granule = 1;
  bool writable = true;
  bool is_shared = false;  // must be written before it is read, in every block
  std::string name;
  std::vector<Cell> cells = {};  // one per granule; empty where nothing is written

  bool contains(std::uintptr_t address) const { return address >= begin && address < end; }
};

struct Conflict {
  enum class Kind { kNone, kRace, kUninitialised, kPending, kReadOnly } kind = Kind::kNone;
  Record other = {};
  const char* other_does = "";
  std::uintptr_t address = 0;
};

// Enters an access into the region, in which it lies whole, and tells what is wrong with it.
Conflict enter(Region& region, std::uintptr_t address, std::size_t bytes, Access access, Async async,
               const Accessor& accessor);

// Pieces of memory that do not overlap.
class Regions {
 public:
  void add(Region region);
  void remove_within(std::uintptr_t begin, std::uintptr_t end);
  void clear() { regions_.clear(), last_ = nullptr; }
  bool empty() const { return regions_.empty(); }
  const std::vector<Region>& all() const { return regions_; }
  Region* find(std::uintptr_t address);
  // The one that ends closest before the address, or begins closest behind it; null when there is none.
  const Region* nearest(std::uintptr_t address) const;

 private:
  std::vector<Region> regions_;  // in the order of their addresses
  Region* last_ = nullptr;
};

}  // namespace simt

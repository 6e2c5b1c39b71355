#include "simt/memory.h"

#include <algorithm>
#include <utility>

namespace simt {
namespace {

// Whether something stands between what the record tells of and the access: a barrier, the end of a launch, or a
// release and an acquire.
bool is_ordered(const Record& record, const Accessor& by) {
  const Moment& then = record.moment;
  if (then.block < by.first_block) return true;
  if (then.block != by.now.block) {
    const auto covered = [&](const Knowledge* known) {
      return known && (known->covers_block(then) || (record.by == Spread::kOneThread && known->covers_thread(then)));
    };
    return covered(by.known_to_block) || covered(by.known_to_thread);
  }
  if (then.barriers != by.now.barriers) return true;
  if (record.by == Spread::kBlock) return false;
  if (then.thread / 32 != by.now.thread / 32) return false;
  return then.warp_barriers != by.now.warp_barriers ||
         (record.by == Spread::kOneThread && then.thread == by.now.thread);
}

// Enters an access that may come from several threads at a time.
void note(Record& record, const Accessor& accessor) {
  const Moment& now = accessor.now;
  Spread by = Spread::kOneThread;
  if (!is_ordered(record, accessor)) {
    const bool same_warp = record.moment.block == now.block && record.moment.thread / 32 == now.thread / 32;
    by = same_warp && record.by != Spread::kBlock ? Spread::kOneWarp : Spread::kBlock;
  }
  record = {now, by, false, accessor.code};
}

// The same of a read, keeping those of other blocks.
void note_read(Cell& cell, const Accessor& accessor) {
  const std::uint32_t block = cell.read.moment.block;
  if (block != accessor.now.block && !is_ordered(cell.read, accessor)) {
    std::erase_if(cell.other_reads, [block](const Record& read) { return read.moment.block == block; });
    cell.other_reads.push_back(std::exchange(cell.read, {}));
  }
  note(cell.read, accessor);
}

}  // namespace

Conflict enter(Region& region, std::uintptr_t address, std::size_t bytes, Access access, Async async,
               const Accessor& accessor) {
  using Kind = Conflict::Kind;
  if (!region.writable) {
    if (access == Access::kRead) return {};
    return {Kind::kReadOnly, {}, "", address};
  }
  const Moment& now = accessor.now;
  const std::size_t first = (address - region.begin) / region.granule;
  const std::size_t last = (address + bytes - 1 - region.begin) / region.granule;
  for (std::size_t i = first; i <= last; ++i) {
    Cell& cell = region.cells[i];
    const std::uintptr_t at = region.begin + i * region.granule;
    const bool is_written = cell.write.moment.block == now.block;
    if (region.is_shared && access != Access::kWrite && !is_written && cell.update.moment.block != now.block)
      return {Kind::kUninitialised, {}, "", at};
    if (is_written && cell.write.pending && async != Async::kArrives) return {Kind::kPending, cell.write, "", at};
    if (!is_ordered(cell.write, accessor)) return {Kind::kRace, cell.write, "writes", at};
    if (access != Access::kAtomic && !is_ordered(cell.update, accessor))
      return {Kind::kRace, cell.update, "updates", at};
    if (access != Access::kRead) {
      if (!is_ordered(cell.read, accessor)) return {Kind::kRace, cell.read, "reads", at};
      for (const Record& read : cell.other_reads)
        if (!is_ordered(read, accessor)) return {Kind::kRace, read, "reads", at};
      cell.other_reads.clear();
    }
    switch (access) {
      case Access::kRead:
        note_read(cell, accessor);
        break;
      case Access::kWrite:
        cell.write = {now, Spread::kOneThread, async == Async::kIssued, accessor.code};
        break;
      case Access::kAtomic:
        note(cell.update, accessor);
        break;
    }
  }
  return {};
}

void Regions::add(Region region) {
  const auto place = std::upper_bound(regions_.begin(), regions_.end(), region.begin,
                                      [](std::uintptr_t begin, const Region& r) { return begin < r.begin; });
  if (region.writable) region.cells.resize((region.end - region.begin + region.granule - 1) / region.granule);
  regions_.insert(place, std::move(region));
  last_ = nullptr;
}

void Regions::remove_within(std::uintptr_t begin, std::uintptr_t end) {
  std::erase_if(regions_, [=](const Region& region) { return region.begin >= begin && region.end <= end; });
  last_ = nullptr;
}

Region* Regions::find(std::uintptr_t address) {
  if (last_ && last_->contains(address)) return last_;
  const auto behind = std::upper_bound(regions_.begin(), regions_.end(), address,
                                       [](std::uintptr_t a, const Region& r) { return a < r.begin; });
  if (behind == regions_.begin() || !std::prev(behind)->contains(address)) return nullptr;
  return last_ = &*std::prev(behind);
}

const Region* Regions::nearest(std::uintptr_t address) const {
  const Region* best = nullptr;
  std::uintptr_t distance = 0;
  for (const Region& region : regions_) {
    const std::uintptr_t away = region.contains(address) ? 0
                                : address < region.begin ? region.begin - address
                                                         : address - region.end;
    if (!best || away < distance) best = &region, distance = away;
  }
  return best;
}

}  // namespace simt

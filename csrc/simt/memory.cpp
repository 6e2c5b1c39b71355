#include "simt/memory.h"

#include <algorithm>
#include <utility>

namespace simt {
namespace {

// Whether a barrier stands between what the record tells of and `now`.
bool is_ordered(const Record& record, const Moment& now, std::uint32_t first_block) {
  const Moment& then = record.moment;
  if (then.block < first_block) return true;
  if (then.block != now.block) return false;
  if (then.barriers != now.barriers) return true;
  if (record.by == Spread::kBlock) return false;
  if (then.thread / 32 != now.thread / 32) return false;
  return then.warp_barriers != now.warp_barriers || (record.by == Spread::kOneThread && then.thread == now.thread);
}

// Enters an access that may come from several threads at a time.
void note(Record& record, const Moment& now, std::uint32_t first_block, const void* code) {
  Spread by = Spread::kOneThread;
  if (!is_ordered(record, now, first_block)) {
    const bool same_warp = record.moment.block == now.block && record.moment.thread / 32 == now.thread / 32;
    by = same_warp && record.by != Spread::kBlock ? Spread::kOneWarp : Spread::kBlock;
  }
  record = {now, by, false, code};
}

}  // namespace

Conflict enter(Region& region, std::uintptr_t address, std::size_t bytes, Access access, bool pending,
               const Moment& now, std::uint32_t first_block, const void* code) {
  using Kind = Conflict::Kind;
  if (!region.writable) {
    if (access == Access::kRead) return {};
    return {Kind::kReadOnly, {}, "", address};
  }
  const std::size_t first = (address - region.begin) / region.granule;
  const std::size_t last = (address + bytes - 1 - region.begin) / region.granule;
  for (std::size_t i = first; i <= last; ++i) {
    Cell& cell = region.cells[i];
    const std::uintptr_t at = region.begin + i * region.granule;
    if (access != Access::kWrite) {
      const bool is_written = cell.write.moment.block == now.block;
      if (region.is_shared && !is_written && cell.update.moment.block != now.block)
        return {Kind::kUninitialised, {}, "", at};
      if (is_written && cell.write.pending) return {Kind::kPending, cell.write, "", at};
    }
    if (!is_ordered(cell.write, now, first_block)) return {Kind::kRace, cell.write, "writes", at};
    if (access != Access::kAtomic && !is_ordered(cell.update, now, first_block))
      return {Kind::kRace, cell.update, "updates", at};
    if (access != Access::kRead && !is_ordered(cell.read, now, first_block))
      return {Kind::kRace, cell.read, "reads", at};
    if (access == Access::kWrite) {
      cell.write = {now, Spread::kOneThread, pending, code};
    } else {
      note(access == Access::kRead ? cell.read : cell.update, now, first_block, code);
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

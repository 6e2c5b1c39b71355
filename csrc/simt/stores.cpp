#include "simt/stores.h"

#include <algorithm>
#include <cstring>

namespace simt {
namespace {

void swap_with_memory(DelayedStores::Store& store) {
  std::array<std::byte, 16> there;
  void* address = reinterpret_cast<void*>(store.address);
  std::memcpy(there.data(), address, store.bytes);
  std::memcpy(address, store.value.data(), store.bytes);
  store.value = there;
}

}  // namespace

void DelayedStores::add(std::uintptr_t address, std::size_t bytes, const Moment& by,
                        std::shared_ptr<const Knowledge> released) {
  while (bytes > 0) {
    Store store = {address, std::min(bytes, sizeof(Store::value)), by, released, {}};
    std::memcpy(store.value.data(), reinterpret_cast<const void*>(address), store.bytes);
    stores_.push_back(store);
    address += store.bytes;
    bytes -= store.bytes;
  }
}

void DelayedStores::show() {
  std::for_each(stores_.begin(), stores_.end(), swap_with_memory);
}

void DelayedStores::hide() {
  std::for_each(stores_.rbegin(), stores_.rend(), swap_with_memory);
}

bool DelayedStores::may_arrive(std::size_t index) const {
  const Store& store = stores_[index];
  return std::none_of(stores_.begin(), stores_.begin() + index, [&](const Store& before) {
    const bool overlaps = before.address < store.address + store.bytes && store.address < before.address + before.bytes;
    const bool is_released = before.by.thread == store.by.thread || before.by.barriers < store.by.barriers;
    return overlaps || (store.released && is_released);
  });
}

void DelayedStores::deliver(const std::function<std::uint32_t(std::uint32_t)>& pick,
                            const std::function<void(const Store&)>& arrived) {
  for (std::size_t tries = (stores_.size() + 1) / 2; tries > 0; --tries) {
    const std::size_t index = pick(static_cast<std::uint32_t>(stores_.size()));
    if (!may_arrive(index)) continue;
    swap_with_memory(stores_[index]);
    arrived(stores_[index]);
    stores_.erase(stores_.begin() + index);
  }
}

}  // namespace simt

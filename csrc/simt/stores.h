// Stores on their way: what a block writes into memory that several ranks see reaches the others late, in any order.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "simt/order.h"

namespace simt {

// Of one block, which sees its own stores at once. Memory holds them while the block runs, and what all others see
// while it does not.
class DelayedStores {
 public:
  // A store that is about to be made by the thread of `by`. A release arrives behind all that came before it: the
  // thread's own stores, and those of its block in front of the last barrier. Those who acquire it know what `released`
  // tells; null for other stores.
  void add(std::uintptr_t address, std::size_t bytes, const Moment& by,
           std::shared_ptr<const Knowledge> released = nullptr);
  void show();
  void hide();
  bool empty() const { return stores_.empty(); }

  struct Store {
    std::uintptr_t address;
    std::size_t bytes;
    Moment by;
    std::shared_ptr<const Knowledge> released;
    std::array<std::byte, 16> value;  // of the store while it is hidden, of what it covers while it is shown
  };
  // While they are hidden: lets about half of those arrive that may, and tells of each. `pick(n)` chooses one of n.
  void deliver(const std::function<std::uint32_t(std::uint32_t)>& pick,
               const std::function<void(const Store&)>& arrived);

 private:
  bool may_arrive(std::size_t index) const;

  std::vector<Store> stores_;  // oldest first
};

}  // namespace simt

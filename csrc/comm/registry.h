// Communicators by their numbers, by which the operators of a framework, which take no classes, name them.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>

namespace teco::comm {

// No two communicators of a process have the same number, of whatever kind they are.
int64_t new_number();

template <class T>
class Registry {
 public:
  // Never destroyed: the last communicators may go after all statics have.
  static Registry& instance() {
    static auto* const registry = new Registry;
    return *registry;
  }

  int64_t add(const std::shared_ptr<T>& communicator) {
    const std::lock_guard lock(mutex_);
    const int64_t number = new_number();
    communicators_.emplace(number, communicator);
    return number;
  }
  // The one with this number, if it still lives.
  std::shared_ptr<T> find(int64_t number) {
    const std::lock_guard lock(mutex_);
    const auto found = communicators_.find(number);
    return found == communicators_.end() ? nullptr : found->second.lock();
  }
  void remove(int64_t number) {
    const std::lock_guard lock(mutex_);
    communicators_.erase(number);
  }

 private:
  std::mutex mutex_;
  std::map<int64_t, std::weak_ptr<T>> communicators_;
};

}  // namespace teco::comm

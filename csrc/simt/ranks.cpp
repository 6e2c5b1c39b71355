// Launches of several ranks at the same time, and what they tell each other with.
#include <algorithm>
#include <cstring>
#include <utility>

#include "simt/machine.h"

namespace simt {
namespace {

// So often may threads look at what they know already and not be waiting for it.
constexpr int kIdleRounds = 16;
constexpr std::uint64_t kSecond = 1'000'000'000, kEternity = 3600 * kSecond;

// A rank's launches in their order, of which the first one runs.
struct Rank {
  struct RunningBlock {
    Block block;
    std::uint32_t turns;  // of eight: some are slow
  };

  std::deque<Job> jobs;
  std::vector<std::unique_ptr<RunningBlock>> running;
  Knowledge known;  // from launches that have ended

  bool has_ended() const {
    return std::all_of(running.begin(), running.end(), [](const auto& running_block) {
      return running_block->block.live == 0 && running_block->block.stores.empty();
    });
  }
};

std::uint32_t some_turns() {
  constexpr std::uint32_t kTurns[] = {8, 8, 4, 1};
  return seed < 2 ? 8 : kTurns[random_below(4)];
}

}  // namespace

std::string Machine::run_ranks(const std::vector<std::deque<Job>>& jobs) {
  begin();
  finding_.clear();
  several_ranks_ = true;
  std::vector<Rank> ranks(jobs.size());
  for (std::size_t r = 0; r < ranks.size(); ++r) ranks[r].jobs = jobs[r];

  const auto start_launch = [&](Rank& rank) {
    const Job& job = rank.jobs.front();
    const dim3 blocks = job.launch.blocks;
    for (unsigned b = 0; b < blocks.x * blocks.y * blocks.z; ++b) {
      Block& block = rank.running.emplace_back(new Rank::RunningBlock{{}, some_turns()})->block;
      start(block, job, b);
      block.known = rank.known;
      names_[block.number] =
          "rank " + std::to_string(job.rank) + ", block " + to_string(block.index) + " of " + job.launch.kernel;
    }
  };
  const auto end_launch = [&](Rank& rank) {
    for (const auto& running : rank.running) {
      Block& block = running->block;
      rank.known.join(block.known);
      for (const Thread& thread : block.threads) rank.known.join(thread.known);
      rank.known.add_launches(static_cast<std::uint8_t>(block.job->rank), block.number);
      end(block);
    }
    rank.running.clear();
    rank.jobs.pop_front();
  };
  const auto has_arrived = [&](const DelayedStores::Store& store) {
    released_.erase(released_.lower_bound(store.address), released_.lower_bound(store.address + store.bytes));
    if (store.released) released_[store.address] = store.released;
  };
  // One after the other; false when nothing has happened.
  const auto run_some = [&](Rank& rank) {
    if (rank.running.empty()) {
      if (rank.jobs.empty()) return false;
      if (seed < 2 || random_below(4) == 0) start_launch(rank);
      return true;
    }
    bool any_progress = false;
    for (const unsigned b : arranged(static_cast<unsigned>(rank.running.size()))) {
      Rank::RunningBlock& running = *rank.running[b];
      Block& block = running.block;
      any_progress |= !block.stores.empty();
      if (idle_rounds_ == 0 && running.turns < 8 && random_below(8) >= running.turns) continue;
      any_progress |= turn(block, arranged(static_cast<unsigned>(block.threads.size())));
      if (!finding_.empty()) return true;
      block.stores.deliver(random_below, has_arrived);
    }
    if (!rank.has_ended()) return any_progress;
    end_launch(rank);
    return true;
  };

  const auto is_done = [](const Rank& rank) { return rank.jobs.empty(); };
  while (finding_.empty() && !std::all_of(ranks.begin(), ranks.end(), is_done)) {
    bool any_progress = false;
    for (const unsigned r : arranged(static_cast<unsigned>(ranks.size()))) {
      any_progress |= run_some(ranks[r]);
      if (!finding_.empty()) break;
    }
    if (go_on(any_progress)) continue;
    for (const Rank& rank : ranks)
      for (const auto& running : rank.running)
        if (const Block& block = running->block; block.live)
          fail(block, "ranks wait for each other for ever:" + stuck_threads(block));
  }
  for (Rank& rank : ranks)
    for (const auto& running : rank.running) end(running->block);
  machine = nullptr;
  return finding_;
}

std::uint64_t Machine::load(const void* address, std::size_t bytes, Order order, Site site, const void* code) {
  const auto place = reinterpret_cast<std::uintptr_t>(address);
  access(place, bytes, Access::kAtomic, Async::kNo, code);
  Thread& thread = current();
  std::uint64_t value = 0;
  std::memcpy(&value, address, bytes);
  if (const auto found = released_.find(place); order == Order::kAcquire && found != released_.end()) {
    if (thread.acquired != found->second) thread.known.join(*found->second);
    thread.acquired = found->second;
  }
  const auto [seen, is_new] = thread.seen.try_emplace(address, value);
  thread.polls_in_vain = !is_new && seen->second == value;
  seen->second = value;
  thread.site = site;
  suspend();  // who looks at what others write may have to wait for them
  return value;
}

void Machine::store(void* address, std::size_t bytes, std::uint64_t value, Order order, const void* code) {
  const auto place = reinterpret_cast<std::uintptr_t>(address);
  access(place, bytes, Access::kAtomic, Async::kNo, code);
  Thread& thread = current();
  Block& block = *thread.block;
  const Moment now = accessor(code).now;
  std::shared_ptr<Knowledge> released;
  if (order == Order::kRelease) {
    released = std::make_shared<Knowledge>(block.known);
    released->join(thread.known);
    released->add_release(now);
    ++thread.releases;
  }
  if (several_ranks_ && mapped.find(place)) {
    block.stores.add(place, bytes, now, released);
  } else if (released) {
    released_[place] = released;
  } else {
    released_.erase(place);
  }
  std::memcpy(address, &value, bytes);
}

std::uint64_t Machine::nanoseconds() {
  time_was_asked_ = true;
  return time_;
}

bool Machine::go_on(bool any_progress) {
  idle_rounds_ = any_progress ? 0 : idle_rounds_ + 1;
  if (idle_rounds_ < kIdleRounds) return true;
  idle_rounds_ = 0;
  if (!std::exchange(time_was_asked_, false)) return false;
  time_ += kSecond;
  return time_ < kEternity;
}

}  // namespace simt

#include "simt/machine.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <utility>

namespace simt {

thread_local Machine* machine = nullptr;
thread_local std::vector<Regions> allowed(1);
thread_local Regions mapped;
thread_local std::uint64_t seed = 0;

namespace {

// Of any device.
constexpr unsigned kMaxThreads = 1024, kMaxThreadsZ = 64, kMaxBlocksX = 0x7fffffff, kMaxBlocks = 0xffff;
constexpr std::uint32_t kInterruptEvery = 64;  // accesses, on average

thread_local std::uint64_t random_state = 1;
thread_local std::uint32_t last_block = 0;

// Kept for the next launch.
thread_local std::vector<std::unique_ptr<Stack>> stacks;
thread_local std::vector<std::unique_ptr<SharedMemory>> shared_memories;

template <class T>
std::unique_ptr<T> take(std::vector<std::unique_ptr<T>>& kept) {
  if (kept.empty()) return std::unique_ptr<T>(new T);
  std::unique_ptr<T> last = std::move(kept.back());
  kept.pop_back();
  return last;
}

std::string to_string(Site site) {
  return site.file ? std::string(site.file) + ":" + std::to_string(site.line) : "?";
}

bool same(Site a, Site b) {
  return a.line == b.line && std::strcmp(a.file, b.file) == 0;
}

std::uint64_t size(dim3 d) {
  return std::uint64_t{d.x} * d.y * d.z;
}

uint3 unflatten(unsigned i, dim3 d) {
  return {i % d.x, i / d.x % d.y, i / (d.x * d.y)};
}

void arrange(std::vector<unsigned>& order) {
  if (seed == 1) std::reverse(order.begin(), order.end());
  if (seed < 2) return;
  for (std::size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[random_below(i)]);
}

}  // namespace

std::string to_string(uint3 v) {
  return "(" + std::to_string(v.x) + ", " + std::to_string(v.y) + ", " + std::to_string(v.z) + ")";
}

std::string check(const Launch& launch) {
  const auto& [kernel, blocks, threads, shared_bytes] = launch;
  const auto reject = [&](const char* expected, const std::string& got) {
    return "simt: " + std::string(kernel) + ": expected " + expected + ", got " + got;
  };
  const auto shape = [](dim3 d) { return to_string(uint3{d.x, d.y, d.z}); };
  if (size(threads) == 0 || size(threads) > kMaxThreads || threads.z > kMaxThreadsZ)
    return reject("1 to 1024 threads, at most 64 in z", shape(threads));
  if (size(blocks) == 0 || blocks.x > kMaxBlocksX || blocks.y > kMaxBlocks || blocks.z > kMaxBlocks)
    return reject("at least one block, at most 65535 in y and z", shape(blocks));
  if (shared_bytes > kMaxSharedBytes)
    return reject("at most 99 KB of shared memory", std::to_string(shared_bytes) + " bytes");
  return "";
}

std::uint32_t random_below(std::uint32_t limit) {
  random_state = random_state * 6364136223846793005u + 1442695040888963407u;
  return static_cast<std::uint32_t>((random_state >> 33) * limit >> 31);
}

std::vector<unsigned> arranged(unsigned count) {
  std::vector<unsigned> order(count);
  std::iota(order.begin(), order.end(), 0u);
  arrange(order);
  return order;
}

Region* Block::shared_region(std::uintptr_t address) {
  for (SharedPiece& piece : shared)
    if (piece.region.contains(address)) return &piece.region;
  return nullptr;
}

void Machine::begin() {
  random_state = seed * 0x9e3779b97f4a7c15u + 1;
  first_block_ = last_block + 1;
  machine = this;
}

std::string Machine::run(const Job& job) {
  begin();
  for (const unsigned b : arranged(static_cast<unsigned>(size(job.launch.blocks)))) {
    Block block;
    start(block, job, b);
    std::vector<unsigned> order = arranged(static_cast<unsigned>(block.threads.size()));
    while (block.live && finding_.empty()) {
      if (!go_on(turn(block, order)) && finding_.empty())
        fail(block, "threads wait for each other for ever:" + stuck_threads(block));
      if (seed > 1) arrange(order);
    }
    end(block);
    if (!finding_.empty()) break;
  }
  machine = nullptr;
  return finding_;
}

void Machine::start(Block& block, const Job& job, unsigned index) {
  const auto num_threads = static_cast<unsigned>(size(job.launch.threads));
  block.job = &job;
  block.index = unflatten(index, job.launch.blocks);
  block.number = ++last_block;
  block.live = num_threads;
  block.memory = take(shared_memories);
  block.threads.resize(num_threads);
  block.warps.resize((num_threads + kWarpSize - 1) / kWarpSize);
  for (unsigned i = 0; i < num_threads; ++i) {
    Thread& thread = block.threads[i];
    thread.stack = take(stacks);
    thread.index = unflatten(i, job.launch.threads);
    thread.number = static_cast<std::uint16_t>(i);
    thread.block = &block;
    thread.warp = &block.warps[i / kWarpSize];
    thread.warp->live |= 1u << thread.lane();
    prepare(thread.context, *thread.stack, &Machine::enter_thread);
  }
}

void Machine::end(Block& block) {
  for (Thread& thread : block.threads) stacks.push_back(std::move(thread.stack));
  block.threads.clear();
  shared_memories.push_back(std::move(block.memory));
}

bool Machine::turn(Block& block, const std::vector<unsigned>& order) {
  bool any_progress = false;
  block.stores.show();
  for (const unsigned i : order) {
    Thread& thread = block.threads[i];
    if (thread.state != Thread::State::kReady) continue;
    run_thread(thread);
    any_progress |= thread.state != Thread::State::kReady || !thread.polls_in_vain;
    if (!finding_.empty()) break;
  }
  block.stores.hide();
  return any_progress;
}

void Machine::run_thread(Thread& thread) {
  current_ = &thread;
  thread.polls_in_vain = false;
  switch_to(scheduler_, thread.context);
  current_ = nullptr;
}

void Machine::suspend() {
  switch_to(current_->context, scheduler_);
}

void Machine::enter_thread() {
  Machine& m = *machine;
  Thread& thread = m.current();
  Block& block = *thread.block;
  block.job->body(block.job->arguments);
  thread.state = Thread::State::kDone;
  thread.warp->live &= ~(1u << thread.lane());
  --block.live;
  if (!thread.open_copies.empty() || !thread.copies.empty())
    m.fail("the thread ends while a cp.async of its own is under way, issued at " +
           source_of((thread.open_copies.empty() ? thread.copies.front() : thread.open_copies).front().code));
  if (block.at_barrier)
    m.fail("the thread ends while others wait at the barrier at " + to_string(block.barrier_site) +
           ", which all threads of a block must reach");
  for (const Meeting& meeting : thread.warp->meetings)
    if (meeting.arrived != meeting.mask && meeting.mask >> thread.lane() & 1)
      m.fail("the thread ends while others of its warp wait for it in " + std::string(meeting.name) + " at " +
             to_string(meeting.site));
  m.suspend();
  __builtin_unreachable();
}

bool Machine::sync_threads(bool vote, Site site) {
  Thread& thread = current();
  Block& block = *thread.block;
  if (block.at_barrier && !same(site, block.barrier_site))
    fail("divergent barrier: the thread is at " + to_string(site) + ", others wait at " +
         to_string(block.barrier_site));
  if (block.live != block.threads.size())
    fail("barrier at " + to_string(site) + " although " + std::to_string(block.threads.size() - block.live) +
         " threads of the block have ended");
  block.barrier_site = thread.site = site;
  block.any_vote |= vote;
  if (++block.at_barrier == block.live) {
    pass_barrier(block);
  } else {
    thread.state = Thread::State::kAtBarrier;
    suspend();
  }
  return block.last_vote;  // of this barrier: the next one waits for this thread
}

void Machine::pass_barrier(Block& block) {
  ++block.barriers;
  block.at_barrier = 0;
  block.last_vote = std::exchange(block.any_vote, false);
  for (Thread& thread : block.threads) {
    if (thread.state == Thread::State::kAtBarrier) thread.state = Thread::State::kReady;
    block.known.join(thread.known);
    thread.known.clear();
    thread.acquired.reset();
  }
}

void Machine::share_knowledge(Block& block, const Warp& warp, unsigned mask) {
  Knowledge all;
  const auto takes_part = [&](const Thread& thread) { return thread.warp == &warp && mask >> thread.lane() & 1; };
  for (const Thread& thread : block.threads)
    if (takes_part(thread)) all.join(thread.known);
  if (all.empty()) return;
  for (Thread& thread : block.threads)
    if (takes_part(thread)) thread.known = all;
}

void Machine::gather(const char* name, unsigned mask, const void* mine, std::size_t bytes, void* all, bool order_memory,
                     Site site) {
  Thread& thread = current();
  Warp& warp = *thread.warp;
  const unsigned self = 1u << thread.lane();
  const auto reject = [&](const std::string& what) {
    fail(std::string(name) + " at " + to_string(site) + ": " + what);
  };
  if (!(mask & self)) reject("the thread is not in its own mask");
  if (mask & ~warp.live) reject("the mask names lanes that do not exist or have ended");
  Meeting* meeting = nullptr;
  for (Meeting& other : warp.meetings) {
    if (other.arrived == other.mask || !(other.mask & mask)) continue;
    if (other.mask != mask || other.name != name || !same(other.site, site) || other.arrived & self)
      reject("lanes of its mask wait in " + std::string(other.name) + " at " + to_string(other.site));
    meeting = &other;
  }
  if (!meeting) meeting = &warp.meetings.emplace_back(Meeting{name, site, mask});
  std::memcpy(meeting->payloads[thread.lane()], mine, bytes);
  meeting->arrived |= self;
  if (meeting->arrived == mask) {
    if (order_memory && mask == warp.live) ++warp.barriers;
    if (order_memory) share_knowledge(*thread.block, warp, mask);
    for (Thread& other : thread.block->threads)
      if (other.warp == &warp && other.state == Thread::State::kInMeeting && mask >> other.lane() & 1)
        other.state = Thread::State::kReady;
  } else {
    thread.state = Thread::State::kInMeeting;
    thread.site = site;
    suspend();
  }
  for (int lane = 0; lane < kWarpSize; ++lane)
    std::memcpy(static_cast<std::byte*>(all) + lane * bytes, meeting->payloads[lane], bytes);
  meeting->taken |= self;
  if (meeting->taken == mask) warp.meetings.remove_if([meeting](const Meeting& other) { return &other == meeting; });
}

std::string Machine::stuck_threads(const Block& block) const {
  std::string text;
  int count = 0;
  Site last = {};
  for (const Thread& thread : block.threads) {
    if (thread.state == Thread::State::kDone || (last.file && same(last, thread.site))) continue;
    last = thread.site;
    if (++count > 4) return text + " ...";
    text += " thread " + to_string(thread.index) + " at " + to_string(thread.site);
  }
  return text;
}

void* Machine::shared_memory(const void* tag, std::size_t bytes, std::size_t alignment, std::size_t granule) {
  Block& block = this->block();
  if (!tag) {  // the dynamic one
    tag = block.job;
    bytes = launch().dynamic_shared_bytes;
  }
  for (const Block::SharedPiece& piece : block.shared)
    if (piece.tag == tag) return reinterpret_cast<void*>(piece.region.begin);
  const std::size_t offset = (block.shared_used + alignment - 1) / alignment * alignment;
  if (offset + bytes > kMaxSharedBytes) fail("more than 99 KB of shared memory");
  block.shared_used = offset + bytes + kSharedGap;
  std::byte* begin = block.memory->bytes + offset;
  std::memset(begin, 0xff, bytes);  // NaN, or a large index
  const auto address = reinterpret_cast<std::uintptr_t>(begin);
  block.shared.push_back({tag,
                          {.begin = address,
                           .end = address + bytes,
                           .granule = granule,
                           .writable = true,
                           .is_shared = true,
                           .name = "shared memory",
                           .cells = std::vector<Cell>((bytes + granule - 1) / granule)}});
  return begin;
}

Accessor Machine::accessor(const void* code) {
  Thread& thread = current();
  const Block& block = *thread.block;
  const Moment now = {block.number,  block.barriers,  thread.warp->barriers,
                      thread.number, thread.releases, static_cast<std::uint8_t>(block.job->rank)};
  return {now, first_block_, &block.known, &thread.known, code};
}

void Machine::access(std::uintptr_t address, std::size_t bytes, Access kind, Async async, const void* code) {
  if (is_own_stack(reinterpret_cast<const void*>(address))) return;
  Block& block = this->block();
  const Job& job = *block.job;
  if (address - reinterpret_cast<std::uintptr_t>(job.arguments) < job.argument_bytes && kind == Access::kRead) return;
  const char* verb = kind == Access::kRead ? "reads " : kind == Access::kWrite ? "writes " : "updates ";
  const auto describe = [&] {
    return std::string(verb) + std::to_string(bytes) + " bytes at " + place_of(address) +
           "\n  here: " + source_of(code);
  };
  const bool in_shared = block.is_in_shared(address);
  Region* region = in_shared ? block.shared_region(address) : allowed[job.rank].find(address);
  const bool is_mapped = !in_shared && !region && (region = mapped.find(address));
  if (!region || address + bytes > region->end) {
    if (!in_shared && (allowed[job.rank].empty() || is_constant(address))) return;
    return fail("out of bounds: the thread " + describe());
  }
  const Accessor by = accessor(code);
  const Conflict conflict = enter(*region, address, bytes, kind, async, by);
  switch (conflict.kind) {
    case Conflict::Kind::kNone:
      break;
    case Conflict::Kind::kUninitialised:
      return fail("uninitialised: the thread " + describe() + ", of which byte " +
                  std::to_string(conflict.address - region->begin) + " was not written in this block");
    case Conflict::Kind::kReadOnly:
      return fail("read-only memory: the thread " + describe());
    case Conflict::Kind::kPending:
      return fail("missing wait: the thread " + describe() +
                  "\n  a cp.async to this place was not waited for: " + source_of(conflict.other.code));
    case Conflict::Kind::kRace: {
      const Moment& then = conflict.other.moment;
      const bool is_own = then.block == block.number;
      const auto name = names_.find(then.block);
      const std::string who = is_own                 ? "thread " + to_string(unflatten(then.thread, job.launch.threads))
                              : name != names_.end() ? name->second
                                                     : "another block";
      const std::string order = is_own           ? "without a barrier between them"
                                : several_ranks_ ? "without a release and an acquire between them"
                                                 : "in the same launch";
      return fail("race: the thread " + describe() + "\n  " + who + " " + conflict.other_does + " it " + order + ": " +
                  source_of(conflict.other.code));
    }
  }
  if (seed > 1 && random_below(kInterruptEvery) == 0) suspend();
  if (is_mapped && several_ranks_ && kind == Access::kWrite) block.stores.add(address, bytes, by.now);
}

std::string Machine::place_of(std::uintptr_t address) {
  const Region* region = nullptr;
  for (const Block::SharedPiece& piece : block().shared)
    if (address >= piece.region.begin - kSharedGap && address < piece.region.end + kSharedGap) region = &piece.region;
  if (!region) region = mapped.find(address);
  if (!region) region = allowed[block().job->rank].nearest(address);
  if (!region) return "an address that was never allowed";
  const auto offset = static_cast<std::ptrdiff_t>(address - region->begin);
  return "offset " + std::to_string(offset) + " of " + region->name + " (" +
         std::to_string(region->end - region->begin) + " bytes)";
}

void Machine::copy_async(AsyncCopy copy) {
  access(reinterpret_cast<std::uintptr_t>(copy.target), copy.bytes, Access::kWrite, Async::kIssued, copy.code);
  if (copy.source_bytes)
    access(reinterpret_cast<std::uintptr_t>(copy.source), copy.source_bytes, Access::kRead, Async::kNo, copy.code);
  std::memcpy(copy.issued.data(), copy.source, copy.source_bytes);
  current().open_copies.push_back(copy);
}

void Machine::commit_copies() {
  current().copies.push_back(std::exchange(current().open_copies, {}));
}

void Machine::wait_for_copies(std::size_t pending_groups) {
  Thread& thread = current();
  while (thread.copies.size() > pending_groups) {
    const std::vector<AsyncCopy> group = std::move(thread.copies.front());
    thread.copies.erase(thread.copies.begin());
    for (const AsyncCopy& copy : group) {
      access(reinterpret_cast<std::uintptr_t>(copy.target), copy.bytes, Access::kWrite, Async::kArrives, copy.code);
      if (copy.source_bytes)
        access(reinterpret_cast<std::uintptr_t>(copy.source), copy.source_bytes, Access::kRead, Async::kNo, copy.code);
      if (std::memcmp(copy.source, copy.issued.data(), copy.source_bytes) != 0)
        fail("the source of a cp.async has changed before it was waited for, issued at " + source_of(copy.code));
      std::memcpy(copy.target, copy.source, copy.source_bytes);
      std::memset(copy.target + copy.source_bytes, 0, copy.bytes - copy.source_bytes);
    }
  }
}

void Machine::fail(const std::string& what) {
  fail(block(), what);
  suspend();  // for good
}

void Machine::fail(const Block& block, const std::string& what) {
  if (!finding_.empty()) return;
  finding_ = "simt: kernel " + std::string(block.job->launch.kernel);
  if (several_ranks_) finding_ += ", rank " + std::to_string(block.job->rank);
  finding_ += ", block " + to_string(block.index);
  if (current_) finding_ += ", thread " + to_string(current_->index);
  finding_ += ": " + what;
}

}  // namespace simt

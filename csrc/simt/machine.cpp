#include "simt/machine.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <utility>

namespace simt {

thread_local Machine* machine = nullptr;
thread_local Regions allowed;
thread_local std::uint64_t seed = 0;

namespace {

constexpr std::size_t kMaxSharedBytes = 227 * 1024;  // what a block can have on sm_90 and sm_100
constexpr std::size_t kSharedGap = 128;              // between two pieces of shared memory
constexpr unsigned kMaxThreads = 1024;
constexpr std::uint32_t kInterruptEvery = 64;  // accesses, on average

thread_local std::uint64_t random_state = 1;
thread_local std::uint32_t last_block = 0;

// Stacks and shared memory, kept for the next launch.
thread_local std::vector<Stack> stacks;
struct alignas(1024) SharedMemory {
  std::byte bytes[kMaxSharedBytes + 64 * kSharedGap];
};
thread_local SharedMemory* shared_bytes = nullptr;

std::string to_string(uint3 v) {
  return "(" + std::to_string(v.x) + ", " + std::to_string(v.y) + ", " + std::to_string(v.z) + ")";
}

std::string to_string(Site site) {
  return site.file ? std::string(site.file) + ":" + std::to_string(site.line) : "?";
}

bool same(Site a, Site b) {
  return a.line == b.line && std::strcmp(a.file, b.file) == 0;
}

unsigned size(dim3 d) {
  return d.x * d.y * d.z;
}

uint3 unflatten(unsigned i, dim3 d) {
  return {i % d.x, i / d.x % d.y, i / (d.x * d.y)};
}

// 0, 1, ... in the order that the seed asks for.
void arrange(std::vector<unsigned>& order) {
  if (seed == 1) std::reverse(order.begin(), order.end());
  if (seed < 2) return;
  for (std::size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[random_below(i)]);
}

std::vector<unsigned> arranged(unsigned count) {
  std::vector<unsigned> order(count);
  std::iota(order.begin(), order.end(), 0u);
  arrange(order);
  return order;
}

}  // namespace

std::uint32_t random_below(std::uint32_t limit) {
  random_state = random_state * 6364136223846793005u + 1442695040888963407u;
  return static_cast<std::uint32_t>((random_state >> 33) * limit >> 31);
}

Machine::Machine(const Launch& launch, void (*body)(void*), void* arguments, std::size_t argument_bytes)
    : launch_(launch), body_(body), arguments_(arguments), argument_bytes_(argument_bytes) {}

std::string Machine::run() {
  const unsigned num_threads = size(launch_.threads), num_blocks = size(launch_.blocks);
  if (num_threads == 0 || num_threads > kMaxThreads || num_blocks == 0)
    return "simt: " + std::string(launch_.kernel) + ": expected 1 to 1024 threads and at least one block, got " +
           std::to_string(num_threads) + " and " + std::to_string(num_blocks);
  if (!shared_bytes) shared_bytes = new SharedMemory;
  while (stacks.size() < num_threads) stacks.emplace_back();
  threads_.resize(num_threads);
  warps_.resize((num_threads + kWarpSize - 1) / kWarpSize);
  random_state = seed * 0x9e3779b97f4a7c15u + 1;
  first_block_ = last_block + 1;
  machine = this;
  for (const unsigned b : arranged(num_blocks)) {
    block_ = unflatten(b, launch_.blocks);
    block_number_ = ++last_block;
    run_block();
    if (!finding_.empty()) break;
  }
  machine = nullptr;
  return finding_;
}

void Machine::run_block() {
  const auto num_threads = static_cast<unsigned>(threads_.size());
  shared_.clear();
  shared_used_ = 0;
  if (launch_.dynamic_shared_bytes) shared_memory(this, launch_.dynamic_shared_bytes, 128, 4);
  barriers_ = at_barrier_ = 0;
  live_ = num_threads;
  for (Warp& warp : warps_) warp = {};
  for (unsigned i = 0; i < num_threads; ++i) {
    Thread& thread = threads_[i];
    thread.stack = &stacks[i];
    thread.index = unflatten(i, launch_.threads);
    thread.number = static_cast<std::uint16_t>(i);
    thread.warp = &warps_[i / kWarpSize];
    thread.warp->live |= 1u << thread.lane();
    thread.state = Thread::State::kReady;
    thread.open_copies.clear();
    thread.copies.clear();
    prepare(thread.context, *thread.stack, &Machine::enter_thread);
  }
  std::vector<unsigned> order = arranged(num_threads);
  while (live_ && finding_.empty()) {
    bool any_ran = false;
    for (const unsigned i : order) {
      if (threads_[i].state != Thread::State::kReady) continue;
      run_thread(threads_[i]);
      any_ran = true;
      if (!finding_.empty()) return;
    }
    if (!any_ran) return fail("threads wait for each other for ever:" + stuck_threads());
    if (seed > 1) arrange(order);
  }
}

void Machine::run_thread(Thread& thread) {
  current_ = &thread;
  switch_to(scheduler_, thread.context);
  current_ = nullptr;
}

void Machine::suspend() {
  switch_to(current_->context, scheduler_);
}

void Machine::enter_thread() {
  Machine& m = *machine;
  m.body_(m.arguments_);
  Thread& thread = m.current();
  thread.state = Thread::State::kDone;
  thread.warp->live &= ~(1u << thread.lane());
  --m.live_;
  if (!thread.open_copies.empty() || !thread.copies.empty())
    m.fail("the thread ends while a cp.async of its own is under way, issued at " +
           source_of((thread.open_copies.empty() ? thread.copies.front() : thread.open_copies).front().code));
  if (m.at_barrier_)
    m.fail("the thread ends while others wait at the barrier at " + to_string(m.barrier_site_) +
           ", which all threads of a block must reach");
  for (const Meeting& meeting : thread.warp->meetings)
    if (meeting.arrived != meeting.mask && meeting.mask >> thread.lane() & 1)
      m.fail("the thread ends while others of its warp wait for it in " + std::string(meeting.name) + " at " +
             to_string(meeting.site));
  m.suspend();
  __builtin_unreachable();
}

void Machine::sync_threads(Site site) {
  Thread& thread = current();
  if (at_barrier_ && !same(site, barrier_site_))
    fail("divergent barrier: the thread is at " + to_string(site) + ", others wait at " + to_string(barrier_site_));
  if (live_ != threads_.size())
    fail("barrier at " + to_string(site) + " although " + std::to_string(threads_.size() - live_) +
         " threads of the block have ended");
  barrier_site_ = thread.site = site;
  if (++at_barrier_ == live_) return pass_barrier();
  thread.state = Thread::State::kAtBarrier;
  suspend();
}

void Machine::pass_barrier() {
  ++barriers_;
  at_barrier_ = 0;
  for (Thread& thread : threads_)
    if (thread.state == Thread::State::kAtBarrier) thread.state = Thread::State::kReady;
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
    for (Thread& other : threads_)
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

std::string Machine::stuck_threads() const {
  std::string text;
  int count = 0;
  Site last = {};
  for (const Thread& thread : threads_) {
    if (thread.state == Thread::State::kDone || (last.file && same(last, thread.site))) continue;
    last = thread.site;
    if (++count > 4) return text + " ...";
    text += " thread " + to_string(thread.index) + " at " + to_string(thread.site);
  }
  return text;
}

void* Machine::shared_memory(const void* tag, std::size_t bytes, std::size_t alignment, std::size_t granule) {
  for (const SharedPiece& piece : shared_)
    if (piece.tag == tag) return reinterpret_cast<void*>(piece.region.begin);
  const std::size_t offset = (shared_used_ + alignment - 1) / alignment * alignment;
  if (offset + bytes > kMaxSharedBytes) fail("more than 227 KB of shared memory");
  shared_used_ = offset + bytes + kSharedGap;
  std::byte* begin = shared_bytes->bytes + offset;
  std::memset(begin, 0xff, bytes);  // NaN, or a large index
  const auto address = reinterpret_cast<std::uintptr_t>(begin);
  shared_.push_back({tag,
                     {.begin = address,
                      .end = address + bytes,
                      .granule = granule,
                      .writable = true,
                      .is_shared = true,
                      .name = "shared memory",
                      .cells = std::vector<Cell>((bytes + granule - 1) / granule)}});
  return begin;
}

Region* Machine::shared_region(std::uintptr_t address) {
  for (SharedPiece& piece : shared_)
    if (piece.region.contains(address)) return &piece.region;
  return nullptr;
}

Moment Machine::now() const {
  return {block_number_, barriers_, current_->warp->barriers, current_->number};
}

void Machine::access(std::uintptr_t address, std::size_t bytes, Access kind, bool pending, const void* code) {
  if (is_own_stack(reinterpret_cast<const void*>(address))) return;
  if (address - reinterpret_cast<std::uintptr_t>(arguments_) < argument_bytes_ && kind == Access::kRead) return;
  const char* verb = kind == Access::kRead ? "reads " : kind == Access::kWrite ? "writes " : "updates ";
  const auto describe = [&] {
    return std::string(verb) + std::to_string(bytes) + " bytes at " + place_of(address) +
           "\n  here: " + source_of(code);
  };
  const bool in_shared = address - reinterpret_cast<std::uintptr_t>(shared_bytes) < sizeof(SharedMemory);
  Region* region = in_shared ? shared_region(address) : allowed.find(address);
  if (!region || address + bytes > region->end) {
    if (!in_shared && (allowed.empty() || is_constant(address))) return;
    return fail("out of bounds: the thread " + describe());
  }
  const Conflict conflict = enter(*region, address, bytes, kind, pending, now(), first_block_, code);
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
      const std::string who = then.block == block_number_
                                  ? "thread " + to_string(unflatten(then.thread, launch_.threads))
                                  : "another block";
      const std::string order = then.block == block_number_ ? "without a barrier between them" : "in the same launch";
      return fail("race: the thread " + describe() + "\n  " + who + " " + conflict.other_does + " it " + order + ": " +
                  source_of(conflict.other.code));
    }
  }
  if (seed > 1 && random_below(kInterruptEvery) == 0) suspend();
}

std::string Machine::place_of(std::uintptr_t address) const {
  const Region* region = nullptr;
  for (const SharedPiece& piece : shared_)
    if (address >= piece.region.begin - kSharedGap && address < piece.region.end + kSharedGap) region = &piece.region;
  if (!region) region = allowed.nearest(address);
  if (!region) return "an address that was never allowed";
  const auto offset = static_cast<std::ptrdiff_t>(address - region->begin);
  return "offset " + std::to_string(offset) + " of " + region->name + " (" +
         std::to_string(region->end - region->begin) + " bytes)";
}

void Machine::copy_async(const AsyncCopy& copy) {
  access(reinterpret_cast<std::uintptr_t>(copy.target), copy.bytes, Access::kWrite, true, copy.code);
  if (copy.source_bytes)
    access(reinterpret_cast<std::uintptr_t>(copy.source), copy.source_bytes, Access::kRead, false, copy.code);
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
      access(reinterpret_cast<std::uintptr_t>(copy.target), copy.bytes, Access::kWrite, false, copy.code);
      std::memcpy(copy.target, copy.source, copy.source_bytes);
      std::memset(copy.target + copy.source_bytes, 0, copy.bytes - copy.source_bytes);
    }
  }
}

void Machine::fail(const std::string& what) {
  if (finding_.empty()) {
    finding_ = "simt: kernel " + std::string(launch_.kernel) + ", block " + to_string(block_);
    if (current_) finding_ += ", thread " + to_string(current_->index);
    finding_ += ": " + what;
  }
  if (current_) suspend();  // for good
}

}  // namespace simt

// The functions that a kernel's source calls, for the launch that the host's thread is in.
#include <cstring>
#include <utility>

#include "simt/machine.h"

namespace simt {
namespace {

const Thread& self() {
  return machine->current();
}

thread_local std::string finding;
thread_local Interceptor runs_elsewhere = nullptr;

// Launches that wait for run_ranks(), with their arguments.
struct Line {
  std::vector<std::deque<Job>> jobs;
  std::list<std::vector<std::byte>> arguments;
  int rank = 0;
};
thread_local Line line;

const char* told(std::string text) {
  finding = std::move(text);
  return finding.empty() ? nullptr : finding.c_str();
}

}  // namespace

uint3 thread_index() {
  return self().index;
}
uint3 block_index() {
  return machine->block().index;
}
dim3 block_dim() {
  return machine->launch().threads;
}
dim3 grid_dim() {
  return machine->launch().blocks;
}
int lane() {
  return self().lane();
}

bool sync_threads(bool vote, Site site) {
  return machine->sync_threads(vote, site);
}

void gather(const char* name, unsigned mask, const void* mine, std::size_t bytes, void* all, bool order_memory,
            Site site) {
  machine->gather(name, mask, mine, bytes, all, order_memory, site);
}

std::uint64_t shuffle(const char* name, unsigned mask, std::uint64_t value, int source, Site site) {
  std::uint64_t all[kWarpSize];
  machine->gather(name, mask, &value, sizeof(value), all, false, site);
  if (!(mask >> source & 1))
    machine->fail(std::string(name) + " at " + site.file + ":" + std::to_string(site.line) + ": lane " +
                  std::to_string(source) + ", whose value is asked for, is not in the mask");
  return all[source];
}

unsigned ballot(const char* name, unsigned mask, bool predicate, Site site) {
  bool all[kWarpSize];
  machine->gather(name, mask, &predicate, sizeof(predicate), all, false, site);
  unsigned votes = 0;
  for (int i = 0; i < kWarpSize; ++i)
    if (mask >> i & 1 && all[i]) votes |= 1u << i;
  return votes;
}

void* shared_memory(const void* tag, std::size_t bytes, std::size_t alignment, std::size_t granule) {
  return machine->shared_memory(tag, bytes, alignment, granule);
}

void* dynamic_shared_memory() {
  return machine->shared_memory(nullptr, 0, 128, 4);
}

void check_access(const void* address, std::size_t bytes, Access access, const void* code) {
  if (machine && machine->in_kernel())
    machine->access(reinterpret_cast<std::uintptr_t>(address), bytes, access, Async::kNo, code);
}

void check_aligned_access(const void* address, std::size_t bytes, Access access, const void* code) {
  if (!machine || !machine->in_kernel() || machine->is_own_stack(address)) return;
  if (reinterpret_cast<std::uintptr_t>(address) % bytes)
    machine->fail("misaligned: the thread accesses " + std::to_string(bytes) +
                  " bytes at an address that is no multiple of it\n  here: " + source_of(code));
  machine->access(reinterpret_cast<std::uintptr_t>(address), bytes, access, Async::kNo, code);
}

void copy_async(void* target, const void* source, std::size_t bytes, std::size_t source_bytes, const void* code) {
  machine->copy_async({static_cast<char*>(target), static_cast<const char*>(source), bytes, source_bytes, code});
}
void commit_copies() {
  machine->commit_copies();
}
void wait_for_copies(std::size_t pending_groups) {
  machine->wait_for_copies(pending_groups);
}

std::uint64_t load_strong(const void* address, std::size_t bytes, Order order, Site site, const void* code) {
  return machine->load(address, bytes, order, site, code);
}
void store_strong(void* address, std::size_t bytes, std::uint64_t value, Order order, const void* code) {
  machine->store(address, bytes, value, order, code);
}
std::uint64_t nanoseconds() {
  return machine->nanoseconds();
}

const char* run(const Launch& launch, void (*body)(void*), void* arguments, std::size_t argument_bytes) {
  if (std::string problem = check(launch); !problem.empty()) return told(std::move(problem));
  Job job = {launch, body, arguments, argument_bytes, line.rank};
  if (line.jobs.empty()) return told(Machine().run(job));
  const auto* bytes = static_cast<const std::byte*>(arguments);
  job.arguments = line.arguments.emplace_back(bytes, bytes + argument_bytes).data();
  line.jobs[line.rank].push_back(job);
  return nullptr;
}

void begin_ranks(int count) {
  line = {};
  line.jobs.resize(count);
  allowed = std::vector<Regions>(count);
}

void set_rank(int rank) {
  line.rank = rank;
}

const char* run_ranks() {
  const Line launches = std::exchange(line, {});
  const char* result = told(Machine().run_ranks(launches.jobs));
  allowed = std::vector<Regions>(1);
  return result;
}

void intercept(Interceptor interceptor) {
  runs_elsewhere = interceptor;
}
Interceptor interceptor() {
  return runs_elsewhere;
}

void set_seed(std::uint64_t value) {
  seed = value;
}

void allow(const void* begin, std::size_t bytes, std::size_t granule, bool writable, const char* name) {
  const auto address = reinterpret_cast<std::uintptr_t>(begin);
  if (bytes)
    allowed[line.rank].add(
        {.begin = address, .end = address + bytes, .granule = granule, .writable = writable, .name = name});
}

void allow_workspace(const void* begin, std::size_t bytes, std::size_t granule) {
  if (!allowed[line.rank].empty()) allow(begin, bytes, granule, true, "the workspace");
}

void forget_allowed() {
  allowed[line.rank].clear();
}

void map(const void* begin, std::size_t bytes, std::size_t granule, const char* name) {
  const auto address = reinterpret_cast<std::uintptr_t>(begin);
  if (bytes) mapped.add({.begin = address, .end = address + bytes, .granule = granule, .name = name});
}

void unmap_within(const void* begin, std::size_t bytes) {
  const auto address = reinterpret_cast<std::uintptr_t>(begin);
  mapped.remove_within(address, address + bytes);
}

}  // namespace simt

// For callers in other languages.
#define SIMT_EXPORT extern "C" __attribute__((visibility("default")))
SIMT_EXPORT void simt_seed(unsigned long value) {
  simt::set_seed(value);
}
SIMT_EXPORT void simt_allow(const void* begin, std::size_t bytes, std::size_t granule, bool writable,
                            const char* name) {
  simt::allow(begin, bytes, granule, writable, name);
}
SIMT_EXPORT void simt_forget() {
  simt::forget_allowed();
}
SIMT_EXPORT void simt_begin_ranks(int count) {
  simt::begin_ranks(count);
}
SIMT_EXPORT void simt_set_rank(int rank) {
  simt::set_rank(rank);
}
SIMT_EXPORT const char* simt_run_ranks() {
  return simt::run_ranks();
}
SIMT_EXPORT void simt_intercept(simt::Interceptor interceptor) {
  simt::intercept(interceptor);
}
// The pieces of memory that kernels may use, by their number; false behind the last one.
SIMT_EXPORT bool simt_allowed(std::size_t number, const void** begin, std::size_t* bytes, bool* writable,
                              const char** name) {
  const std::vector<simt::Region>& regions = simt::allowed[simt::line.rank].all();
  if (number >= regions.size()) return false;
  const simt::Region& region = regions[number];
  *begin = reinterpret_cast<const void*>(region.begin);
  *bytes = region.end - region.begin;
  *writable = region.writable;
  *name = region.name.c_str();
  return true;
}

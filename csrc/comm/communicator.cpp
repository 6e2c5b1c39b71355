#include "comm/communicator.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <utility>

#include "comm/hand_over.h"
#include "comm/registry.h"
#include "comm/steps.h"
#include "cpu/isa.h"
#include "cpu/kernels.h"

namespace teco::comm {

// Of what is summed and of the sum.
struct SumTypes {
  DType in, out;
};

namespace {

int64_t size_of(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

Call call_of(Collective collective, int dtype, int64_t count, int root = 0, int64_t row_size = 0) {
  return {collective, static_cast<uint8_t>(dtype), static_cast<int16_t>(root), static_cast<uint32_t>(row_size), count,
          -1};
}

void copy(void* to, const void* from, int64_t bytes) {
  if (to != from && bytes > 0) std::memcpy(to, from, static_cast<size_t>(bytes));
}

SumRanksParams sum_of(int num_ranks, SumTypes types) {
  SumRanksParams sum{};
  sum.num_ranks = num_ranks;
  sum.dtype = types.in;
  sum.out_dtype = types.out;
  return sum;
}

constexpr auto kNothing = [](int64_t) {};

// A stretch of a tensor, cut into a share per rank: all equal and whole cache lines, but for the last ones.
struct Shares {
  int64_t count, share;

  Shares(int64_t count, int world_size) : count(count), share((count + world_size - 1) / world_size) {
    share = (share + 31) / 32 * 32;
  }
  int64_t begin(int rank) const { return std::min(rank * share, count); }
  int64_t size(int rank) const { return begin(rank + 1) - begin(rank); }
};

}  // namespace

int64_t new_number() {
  static std::atomic<int64_t> last = 0;
  return ++last;
}

Communicator::Communicator(Segment segment, int rank, const std::vector<pid_t>& pids, std::chrono::nanoseconds timeout)
    : segment_(std::move(segment)),
      steps_(std::make_unique<Steps>(segment_.layout(), rank, segment_.world_size(), pids, timeout)),
      ways_(std::make_unique<Ways>()),
      pid_(::getpid()) {}

std::shared_ptr<Communicator> Communicator::create(Segment segment, int rank, const std::vector<pid_t>& pids,
                                                   std::chrono::nanoseconds timeout) {
  std::shared_ptr<Communicator> made(new Communicator(std::move(segment), rank, pids, timeout));
  made->number_ = Registry<Communicator>::instance().add(made);
  return made;
}

std::shared_ptr<Communicator> Communicator::find(int64_t number) {
  return Registry<Communicator>::instance().find(number);
}

Communicator::~Communicator() {
  close();
  Registry<Communicator>::instance().remove(number_);
}

void Communicator::close() {
  if (::getpid() != pid_) return;  // a forked child that forgets what it never used
  steps_->end(Cause::kClosed, steps_->rank());
}

bool Communicator::ended() const {
  return steps_->ended();
}
int Communicator::rank() const {
  return steps_->rank();
}
int Communicator::world_size() const {
  return steps_->world_size();
}
double Communicator::timeout() const {
  return std::chrono::duration<double>(steps_->timeout()).count();
}

int64_t Communicator::one_shot_bytes(int world_size) {
  return world_size <= 2 ? INT64_MAX : kSlotBytes / world_size;
}

void Communicator::all_reduce(void* out, const void* in, int64_t count, DType dtype) {
  reduce(call_of(Collective::kAllReduce, static_cast<int>(dtype), count), out, in, count, {dtype, dtype}, kNothing);
}

void Communicator::all_reduce_rms_norm(void* normed, void* new_residual, const void* in, const void* residual,
                                       const void* weight, int64_t num_rows, int64_t row_size, float eps, DType dtype,
                                       DType out_dtype) {
  const int64_t row_bytes = row_size * size_of(out_dtype);
  int64_t done = 0;
  // Rows are normed where they were summed, while they are still in the cache.
  const auto norm_rows = [&](int64_t summed) {
    const int64_t rows = row_size ? summed / row_size - done : 0;
    if (rows == 0) return;
    const auto row = [&](auto* begin) { return static_cast<decltype(begin)>(begin) + done * row_bytes; };
    char* out = row(static_cast<char*>(normed));
    cpu::kernels()->rms_norm(
        RmsNormParams{
            .out = out,
            .residual_out = row(static_cast<char*>(new_residual)),
            .input = out,
            .residual = row(static_cast<const char*>(residual)),
            .weight = weight,
            .num_rows = rows,
            .hidden_size = row_size,
            .inner_rows = rows,
            .out_stride = row_size,
            .residual_out_stride = row_size,
            .input_stride = row_size,
            .residual_stride = row_size,
            .out_outer_stride = rows * row_size,
            .input_outer_stride = rows * row_size,
            .eps = eps,
            .dtype = out_dtype,
        },
        1);
    done += rows;
  };
  const int64_t count = num_rows * row_size;
  reduce(call_of(Collective::kAllReduceRmsNorm, static_cast<int>(dtype), count, 0, row_size), normed, in, count,
         {dtype, out_dtype}, norm_rows);
}

template <class Body>
void Communicator::choosing_way(Collective collective, int64_t bytes, Body body) {
  if (bytes < Ways::kLeastBytes) return body(Way::kCached);
  using Clock = std::chrono::steady_clock;
  WayChoice& choice = ways_->of(collective, bytes);
  const Way way = choice.next();
  const auto started = Clock::now();
  body(way);
  choice.took(way, Clock::now() - started);
}

int64_t Communicator::registered_offset(const void* in, const void* out, int64_t bytes) const {
  const auto offset_of = [&](const void* p) { return static_cast<const char*>(p) - registered(); };
  const int64_t from = offset_of(in), to = offset_of(out);
  const bool is_registered = from >= 0 && from + bytes <= registered_bytes();
  const bool out_is_apart = to + bytes <= 0 || to >= registered_bytes();
  return is_registered && out_is_apart ? from : -1;
}

template <class After>
void Communicator::reduce(Call call, void* out, const void* in, int64_t count, SumTypes types, After after) {
  const std::lock_guard lock(mutex_);
  const int64_t bytes = count * size_of(types.in);
  if (bytes > 0 && bytes <= one_shot_bytes(world_size())) call.registered = registered_offset(in, out, bytes);
  if (call.registered >= 0)
    return reduce_registered(call, static_cast<char*>(out), static_cast<const char*>(in), count, types, after);
  const auto reduce_by = bytes <= one_shot_bytes(world_size()) ? &Communicator::reduce_one_shot<After>
                                                               : &Communicator::reduce_two_shot<After>;
  choosing_way(call.collective, bytes, [&](Way way) {
    (this->*reduce_by)(call, static_cast<char*>(out), static_cast<const char*>(in), count, types, way, after);
  });
}

template <class After>
void Communicator::reduce_one_shot(const Call& call, char* out, const char* in, int64_t count, SumTypes types, Way way,
                                   After after) {
  const int64_t bytes = size_of(types.in);
  SumRanksParams sum = sum_of(world_size(), types);
  int64_t begin = 0;
  do {
    steps_->begin();
    sum.count = std::min(count - begin, kSlotBytes / bytes);
    hand_over(steps_->slot(rank()).data, in + begin * bytes, sum.count * bytes, way);
    steps_->arrive(call);
    steps_->wait();
    for (int other = 0; other < world_size(); ++other) sum.inputs[other] = steps_->slot(other).data;
    sum.inputs[rank()] = in + begin * bytes;
    sum.out = out + begin * size_of(types.out);
    cpu::kernels()->sum_ranks(sum);
    begin += sum.count;
    after(begin);
  } while (begin < count);
}

// Of as many stretches as fit the caches, but in one step: all the data is there.
template <class After>
void Communicator::reduce_registered(const Call& call, char* out, const char* in, int64_t count, SumTypes types,
                                     After after) {
  const int64_t bytes = size_of(types.in), stretch = kSlotBytes / bytes;
  SumRanksParams sum = sum_of(world_size(), types);
  steps_->begin();
  steps_->arrive(call);
  steps_->wait();
  for (int64_t begin = 0; begin < count; begin += stretch) {
    for (int other = 0; other < world_size(); ++other)
      sum.inputs[other] = segment_.registered(other) + call.registered + begin * bytes;
    sum.inputs[rank()] = in + begin * bytes;
    sum.out = out + begin * size_of(types.out);
    sum.count = std::min(count - begin, stretch);
    cpu::kernels()->sum_ranks(sum);
    after(begin + sum.count);
  }
}

// A stretch takes two steps: all hand over what they have of each other's shares; each adds up its own and hands over
// the result. The second is the first of the next stretch, so that there is one step per stretch and one more.
template <class After>
void Communicator::reduce_two_shot(const Call& call, char* out, const char* in, int64_t count, SumTypes types, Way way,
                                   After after) {
  const int64_t bytes = size_of(types.in), stretch = kSlotBytes / bytes;
  SumRanksParams sum = sum_of(world_size(), types);
  Shares summed(0, world_size());  // of the stretch before
  for (int64_t begin = 0; begin < count || summed.count > 0; begin += stretch) {
    const Shares shares(std::clamp<int64_t>(count - begin, 0, stretch), world_size());
    const int64_t offset = begin * bytes, out_bytes = size_of(types.out), before = begin - stretch;
    const auto each_other = [&](auto body) {
      for (int other = 0; other < world_size(); ++other)
        if (other != rank()) body(other);
    };
    steps_->begin();
    each_other([&](int other) {
      const int64_t share = shares.begin(other) * bytes;
      hand_over(steps_->slot(rank()).data + share, in + offset + share, shares.size(other) * bytes, way);
    });
    steps_->arrive(call);
    steps_->wait();
    each_other([&](int other) {
      copy(out + (before + summed.begin(other)) * out_bytes, steps_->slot(other).result,
           summed.size(other) * out_bytes);
    });
    if (summed.count > 0) after(std::min(begin, count));
    const int64_t own = shares.begin(rank()) * bytes;
    each_other([&](int other) { sum.inputs[other] = steps_->slot(other).data + own; });
    sum.inputs[rank()] = in + offset + own;
    sum.out = out + (begin + shares.begin(rank())) * out_bytes;
    sum.copy = steps_->next_slot(rank()).result;
    sum.count = shares.size(rank());
    cpu::kernels()->sum_ranks(sum);
    summed = shares;
  }
}

void Communicator::reduce_scatter(void* out, const void* in, int64_t count, DType dtype) {
  const std::lock_guard lock(mutex_);
  const Call call = call_of(Collective::kReduceScatter, static_cast<int>(dtype), count);
  const int64_t bytes = size_of(dtype), row = count * bytes;
  const int64_t most = kSlotBytes / bytes / world_size() / 32 * 32;  // of each row, in whole cache lines
  SumRanksParams sum = sum_of(world_size(), {dtype, dtype});
  choosing_way(call.collective, row * world_size(), [&](Way way) {
    int64_t begin = 0;
    do {
      steps_->begin();
      sum.count = std::min(count - begin, most);
      const char* from = static_cast<const char*>(in) + begin * bytes;
      for (int other = 0; other < world_size(); ++other)
        if (other != rank())
          hand_over(steps_->slot(rank()).data + other * most * bytes, from + other * row, sum.count * bytes, way);
      steps_->arrive(call);
      steps_->wait();
      for (int other = 0; other < world_size(); ++other)
        sum.inputs[other] = steps_->slot(other).data + rank() * most * bytes;
      sum.inputs[rank()] = from + rank() * row;
      sum.out = static_cast<char*>(out) + begin * bytes;
      cpu::kernels()->sum_ranks(sum);
      begin += sum.count;
    } while (begin < count);
  });
}

void Communicator::all_gather(void* out, const void* in, int64_t count, int element_bytes, int dtype) {
  const std::lock_guard lock(mutex_);
  const Call call = call_of(Collective::kAllGather, dtype, count);
  const int64_t bytes = count * element_bytes;
  choosing_way(call.collective, bytes, [&](Way way) {
    int64_t begin = 0;
    do {
      steps_->begin();
      const int64_t size = std::min(bytes - begin, kSlotBytes);
      const char* from = static_cast<const char*>(in) + begin;
      hand_over(steps_->slot(rank()).data, from, size, way);
      steps_->arrive(call);
      steps_->wait();
      for (int other = 0; other < world_size(); ++other)
        copy(static_cast<char*>(out) + other * bytes + begin, other == rank() ? from : steps_->slot(other).data, size);
      begin += size;
    } while (begin < bytes);
  });
}

void Communicator::broadcast(void* out, const void* in, int64_t count, int element_bytes, int dtype, int root) {
  const std::lock_guard lock(mutex_);
  const Call call = call_of(Collective::kBroadcast, dtype, count, root);
  const int64_t bytes = count * element_bytes;
  choosing_way(call.collective, bytes, [&](Way way) {
    int64_t begin = 0;
    do {
      steps_->begin();
      const int64_t size = std::min(bytes - begin, kSlotBytes);
      if (rank() == root) hand_over(steps_->slot(rank()).data, static_cast<const char*>(in) + begin, size, way);
      steps_->arrive(call);
      steps_->wait();
      const char* from = rank() == root ? static_cast<const char*>(in) + begin : steps_->slot(root).data;
      copy(static_cast<char*>(out) + begin, from, size);
      begin += size;
    } while (begin < bytes);
  });
}

}  // namespace teco::comm

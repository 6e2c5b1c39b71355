// Collectives over shared memory, for ranks that are processes of one host.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "comm/layout.h"
#include "comm/segment.h"
#include "comm/visible.h"
#include "params.h"

namespace teco::comm {

class Steps;
struct SumTypes;
class Ways;
enum class Way : uint8_t;

// A communicator has a number, by which the operators of a framework, which take no classes, name it.
//
// Every rank makes the same calls in the same order; each returns when this rank's result is there, and throws
// CommunicatorError when that cannot be. `out` is either `in` itself or apart from it, both are contiguous. Calls from
// several threads follow one another; which order that is, the caller must know.
class TECO_VISIBLE Communicator {
 public:
  // pids of all ranks, in their order. Throws system_error where their life cannot be watched.
  static std::shared_ptr<Communicator> create(Segment segment, int rank, const std::vector<pid_t>& pids,
                                              std::chrono::nanoseconds timeout);
  // The one with this number, if it still lives.
  static std::shared_ptr<Communicator> find(int64_t number);
  ~Communicator();
  Communicator(const Communicator&) = delete;
  Communicator& operator=(const Communicator&) = delete;

  // out, in: [count]
  void all_reduce(void* out, const void* in, int64_t count, DType dtype);
  // normed, in, residual, new_residual: [num_rows, row_size]; weight [row_size]. The bits of all_reduce and then
  // fused_add_rms_norm. `in` has out_dtype, as all the others have, or fp64.
  void all_reduce_rms_norm(void* normed, void* new_residual, const void* in, const void* residual, const void* weight,
                           int64_t num_rows, int64_t row_size, float eps, DType dtype, DType out_dtype);
  // out [count], in [world_size, count]: row `rank` of the sum
  void reduce_scatter(void* out, const void* in, int64_t count, DType dtype);
  // out [world_size, count], in [count], of any kind of element; `dtype` is compared and no more. `in` may be the row
  // of `out` that this rank's data comes to lie in.
  void all_gather(void* out, const void* in, int64_t count, int element_bytes, int dtype);
  // out, in: [count], of any kind; `in` is looked at by the root only
  void broadcast(void* out, const void* in, int64_t count, int element_bytes, int dtype, int root);

  // Memory of this rank that all others can read where it lies: what all_reduce and all_reduce_rms_norm are given from
  // there, at the same place on every rank, is not copied. It may be written again as soon as this rank has come out of
  // the next collective; `out` must lie elsewhere.
  char* registered() const { return segment_.registered(rank()); }
  int64_t registered_bytes() const { return segment_.registered_bytes(); }

  // Once all ranks have the segment.
  void close_descriptor() { segment_.close_descriptor(); }
  // Any call of the others from now on fails; so do this rank's.
  void close();
  bool ended() const;

  int64_t number() const { return number_; }
  int rank() const;
  int world_size() const;
  double timeout() const;  // seconds

  // Up to so many bytes every rank adds everything up; beyond, each its share, which the others then fetch.
  static int64_t one_shot_bytes(int world_size);

 private:
  Communicator(Segment segment, int rank, const std::vector<pid_t>& pids, std::chrono::nanoseconds timeout);

  // Sums of whatever length, slot by slot; after(n) is called as soon as the first n elements of out are there.
  template <class After>
  void reduce(Call call, void* out, const void* in, int64_t count, SumTypes types, After after);
  template <class After>
  void reduce_one_shot(const Call& call, char* out, const char* in, int64_t count, SumTypes types, Way way,
                       After after);
  // From registered memory, at `offset`.
  template <class After>
  void reduce_registered(const Call& call, char* out, const char* in, int64_t count, SumTypes types, After after);
  template <class After>
  void reduce_two_shot(const Call& call, char* out, const char* in, int64_t count, SumTypes types, Way way,
                       After after);

  // Where in registered memory so many bytes lie that are to be summed into `out`; -1 where they do not, or `out` does.
  int64_t registered_offset(const void* in, const void* out, int64_t bytes) const;

  // Runs body(way), and takes note of the time that it took where the message is large enough.
  template <class Body>
  void choosing_way(Collective collective, int64_t bytes, Body body);

  Segment segment_;
  std::unique_ptr<Steps> steps_;
  std::unique_ptr<Ways> ways_;
  const pid_t pid_;
  int64_t number_ = 0;
  std::mutex mutex_;
};

}  // namespace teco::comm

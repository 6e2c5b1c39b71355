// The sum of a collective: what the ranks gave, added in the order of the ranks in fp32 and rounded once, so that it
// does not matter which rank adds, nor how many of them.
//
// Bound by the reads of memory that another core has just written. Two ranks, the usual number, have a loop of their
// own, which the compiler unrolls; sums and their order are the same.
#include "cpu/vec.h"

namespace teco::cpu::TECO_ISA {
namespace {

template <class T, int kRanks>
F32x8 sum_at(const SumRanksParams& p, int64_t i, int64_t lanes) {
  const int num_ranks = kRanks ? kRanks : p.num_ranks;
  F32x8 sum = load_up_to(static_cast<const T*>(p.inputs[0]) + i, lanes);
  for (int rank = 1; rank < num_ranks; ++rank) sum += load_up_to(static_cast<const T*>(p.inputs[rank]) + i, lanes);
  return sum;
}

template <class T, int kRanks>
void sum_all(const SumRanksParams& p) {
  const int64_t tail = p.count % kLanes, body = p.count - tail;
  T *out = static_cast<T*>(p.out), *copy = static_cast<T*>(p.copy);
  if (copy) {
    for (int64_t i = 0; i < body; i += kLanes) {
      const F32x8 sum = sum_at<T, kRanks>(p, i, kLanes);
      store(out + i, sum);
      store(copy + i, sum);
    }
  } else {
    for (int64_t i = 0; i < body; i += kLanes) store(out + i, sum_at<T, kRanks>(p, i, kLanes));
  }
  if (tail) {
    const F32x8 sum = sum_at<T, kRanks>(p, body, tail);
    store_partial(out + body, sum, tail);
    if (copy) store_partial(copy + body, sum, tail);
  }
}

}  // namespace

void sum_ranks(const SumRanksParams& p) {
  with_float_type(p.dtype, [&]<class T>(Type<T>) {
    if (p.num_ranks == 2) {
      sum_all<T, 2>(p);
    } else {
      sum_all<T, 0>(p);
    }
  });
}

}  // namespace teco::cpu::TECO_ISA

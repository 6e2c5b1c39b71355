// The sum of a collective: what the ranks gave, added in the order of the ranks in fp32 (fp64 in fp64) and rounded
// once, so that it does not matter which rank adds, nor how many of them.
//
// Bound by the reads of memory that another core has just written. Two ranks, the usual number, have a loop of their
// own, which the compiler unrolls; sums and their order are the same.
#include "cpu/vec.h"

namespace teco::cpu::TECO_ISA {
namespace {

template <class Input, int kRanks>
F32x8 sum_at(const SumRanksParams& p, int64_t i, int64_t lanes) {
  const int num_ranks = kRanks ? kRanks : p.num_ranks;
  const auto input = [&](int rank) { return static_cast<const Input*>(p.inputs[rank]) + i; };
  if constexpr (sizeof(Input) == sizeof(double)) {
    float rounded[kLanes] = {};
    for (int64_t lane = 0; lane < lanes; ++lane) {
      double sum = input(0)[lane];
      for (int rank = 1; rank < num_ranks; ++rank) sum += input(rank)[lane];
      rounded[lane] = static_cast<float>(sum);
    }
    return load(rounded);
  } else {
    F32x8 sum = load_up_to(input(0), lanes);
    for (int rank = 1; rank < num_ranks; ++rank) sum += load_up_to(input(rank), lanes);
    return sum;
  }
}

template <class Input, class T, int kRanks>
void sum_all(const SumRanksParams& p) {
  const int64_t tail = p.count % kLanes, body = p.count - tail;
  T *out = static_cast<T*>(p.out), *copy = static_cast<T*>(p.copy);
  if (copy) {
    for (int64_t i = 0; i < body; i += kLanes) {
      const F32x8 sum = sum_at<Input, kRanks>(p, i, kLanes);
      store(out + i, sum);
      store(copy + i, sum);
    }
  } else {
    for (int64_t i = 0; i < body; i += kLanes) store(out + i, sum_at<Input, kRanks>(p, i, kLanes));
  }
  if (tail) {
    const F32x8 sum = sum_at<Input, kRanks>(p, body, tail);
    store_partial(out + body, sum, tail);
    if (copy) store_partial(copy + body, sum, tail);
  }
}

template <class Input, class T>
void sum_as(const SumRanksParams& p) {
  if (p.num_ranks == 2) {
    sum_all<Input, T, 2>(p);
  } else {
    sum_all<Input, T, 0>(p);
  }
}

}  // namespace

void sum_ranks(const SumRanksParams& p) {
  with_float_type(p.out_dtype, [&]<class T>(Type<T>) {
    if (p.dtype == DType::kFloat64) {
      sum_as<double, T>(p);
    } else {
      sum_as<T, T>(p);
    }
  });
}

}  // namespace teco::cpu::TECO_ISA

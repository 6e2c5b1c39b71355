// The C interface: checks, and the kernels of the instruction set in use. An exception becomes a status.
#include <cstdio>
#include <cstring>

#include "capi/checks.h"
#include "capi/guard.h"
#include "cpu/isa.h"
#include "cpu/kernels.h"
#include "teco_kernels.h"

namespace teco::capi {
namespace {

using cpu::KernelTable;

// The C struct is the C++ one in C's spelling.
template <class Params, class CParams>
Params params_of(const CParams* given) {
  static_assert(sizeof(Params) == sizeof(CParams) && alignof(Params) == alignof(CParams));
  require_pointers({{"params", given}});
  Params params;
  std::memcpy(&params, given, sizeof(params));
  return params;
}

const KernelTable& kernels() {
  if (!cpu::kernels()) throw UnsupportedCpu(cpu::isa_problem());
  return *cpu::kernels();
}

template <class Params, class CParams>
TecoStatus run(const CParams* given, int32_t num_threads, void (*KernelTable::*kernel)(const Params&, int)) {
  return guarded([&] {
    const Params params = params_of<Params>(given);
    require_at_least("num_threads", num_threads, 1);
    if (check(params)) (kernels().*kernel)(params, num_threads);
  });
}

}  // namespace

namespace {
// Without a destructor, it can be written to as long as the thread lives.
thread_local char last_error[512] = "";
}  // namespace

void tell(const char* message) {
  std::snprintf(last_error, sizeof(last_error), "%s", message);
}

}  // namespace teco::capi

using teco::capi::run;
using Table = teco::cpu::KernelTable;

int32_t teco_abi_version(void) {
  return TECO_ABI_VERSION;
}
const char* teco_last_error(void) {
  return teco::capi::last_error;
}
const char* teco_instruction_set(void) {
  const char* name = "";
  teco::capi::guarded([&] { name = teco::cpu::isa_name(); });
  return name;
}

TecoStatus teco_embedding(const TecoEmbeddingParams* params, int32_t num_threads) {
  return run(params, num_threads, &Table::embedding);
}
TecoStatus teco_gptq_embedding(const TecoGptqEmbeddingParams* params, int32_t num_threads) {
  return run(params, num_threads, &Table::gptq_embedding);
}
TecoStatus teco_rms_norm(const TecoRmsNormParams* params, int32_t num_threads) {
  return run(params, num_threads, &Table::rms_norm);
}
TecoStatus teco_sum_ranks(const TecoSumRanksParams* params) {
  return teco::capi::guarded([&] {
    const auto given = teco::capi::params_of<teco::SumRanksParams>(params);
    if (teco::capi::check(given)) teco::capi::kernels().sum_ranks(given);
  });
}
TecoStatus teco_silu_and_mul(const TecoSiluAndMulParams* params, int32_t num_threads) {
  return run(params, num_threads, &Table::silu_and_mul);
}
TecoStatus teco_rotary_embedding(const TecoRotaryEmbeddingParams* params, int32_t num_threads) {
  return run(params, num_threads, &Table::rotary_embedding);
}
TecoStatus teco_sample(const TecoSampleParams* params, int32_t num_threads) {
  return run(params, num_threads, &Table::sample);
}
TecoStatus teco_dense_matmul(const TecoDenseMatmulParams* params, int32_t num_threads) {
  return run(params, num_threads, &Table::dense_matmul);
}
TecoStatus teco_sparse24_matmul(const TecoSparse24MatmulParams* params, int32_t num_threads) {
  return run(params, num_threads, &Table::sparse24_matmul);
}
TecoStatus teco_gptq_matmul(const TecoGptqMatmulParams* params, int32_t num_threads) {
  return run(params, num_threads, &Table::gptq_matmul);
}
TecoStatus teco_reshape_and_cache(const TecoReshapeAndCacheParams* params, int32_t num_threads) {
  return run(params, num_threads, &Table::reshape_and_cache);
}
TecoStatus teco_copy_blocks(const TecoCopyBlocksParams* params, int32_t num_threads) {
  return run(params, num_threads, &Table::copy_blocks);
}
TecoStatus teco_paged_attention(const TecoPagedAttentionParams* params, int32_t num_threads) {
  return run(params, num_threads, &Table::paged_attention);
}
TecoStatus teco_merge_attention_states(const TecoMergeAttentionStatesParams* params, int32_t num_threads) {
  return run(params, num_threads, &Table::merge_attention_states);
}
TecoStatus teco_recycle_project(const TecoRecycleProjectParams* params, int32_t num_threads) {
  return run(params, num_threads, &Table::recycle_project);
}
TecoStatus teco_gptq_recycle_project(const TecoGptqRecycleProjectParams* params, int32_t num_threads) {
  return run(params, num_threads, &Table::gptq_recycle_project);
}
TecoStatus teco_lm_head_argmax(const TecoLmHeadArgmaxParams* params, int32_t num_threads) {
  return run(params, num_threads, &Table::lm_head_argmax);
}
TecoStatus teco_gptq_lm_head_argmax(const TecoGptqLmHeadArgmaxParams* params, int32_t num_threads) {
  return run(params, num_threads, &Table::gptq_lm_head_argmax);
}
TecoStatus teco_verify_recycled(const TecoVerifyRecycledParams* params, int32_t num_threads) {
  return run(params, num_threads, &Table::verify_recycled);
}
TecoStatus teco_verify_recycled_sampled(const TecoVerifyRecycledSampledParams* params, int32_t num_threads) {
  return run(params, num_threads, &Table::verify_recycled_sampled);
}

// The one table of operators: schema, then implementation. Outputs are arguments marked (a!): the Python function
// allocates them when the caller gave none, and the dispatcher sees exactly what is written.
#include "ops/ops.h"

#include <torch/csrc/stable/library.h>

#include "cpu/isa.h"
#include "ops/backend.h"
#include "ops/checks.h"
#include "ops/kernel_calls.h"
#include "ops/plan.h"

namespace teco::ops {
namespace {

// Picks the instruction set; fails when TECO_CPU_ISA names one that is not here.
std::string cpu_isa() {
  require(cpu::kernels() != nullptr, cpu::isa_problem());
  return cpu::isa_name();
}

std::string cpu_isa_choices() {
  return cpu::isa_choices();
}

std::string cpu_isa_compiled() {
  return cpu::isa_compiled();
}

std::string compiler() {
#if defined(__clang__)
  return __VERSION__;
#elif defined(__GNUC__)
  return "GCC " __VERSION__;
#else
  return "unknown";
#endif
}

}  // namespace

STABLE_TORCH_LIBRARY(teco_kernels, m) {
  m.def("cpu_isa() -> str");
  m.def("cpu_isa_choices() -> str");
  m.def("cpu_isa_compiled() -> str");
  m.def("compiler() -> str");
  m.def("cuda_operators() -> str");
  m.def("kernel_calls(str name) -> int");

  m.def("embedding(Tensor(a!) out, Tensor token_ids, Tensor weight, int? first_token) -> ()");
  m.def(
      "embedding.gptq(Tensor(a!) out, Tensor token_ids, Tensor weight, Tensor? input_order, int vocab_size, "
      "int hidden_size, int bits, bool has_minimum, int? first_token) -> ()");
  m.def("rms_norm(Tensor(a!) out, Tensor input, Tensor weight, float eps) -> ()");
  m.def(
      "fused_add_rms_norm(Tensor(a!) out, Tensor(b!) residual_out, Tensor input, Tensor residual, Tensor weight, "
      "float eps) -> ()");
  m.def("silu_and_mul(Tensor(a!) out, Tensor input) -> ()");
  m.def(
      "rotary_embedding(Tensor positions, Tensor(a!) query, Tensor(b!) key, Tensor cos_sin_cache, bool interleaved) "
      "-> ()");
  m.def(
      "sample(Tensor(a!) out, Tensor logits, Tensor temperature, Tensor top_k, Tensor top_p, Tensor min_p, "
      "Tensor seed, Tensor offset) -> ()");
  m.def("dense_matmul(Tensor(a!) out, Tensor input, Tensor weight, Tensor? bias, int out_features) -> ()");
  m.def(
      "sparse24_matmul(Tensor(a!) out, Tensor input, Tensor values, Tensor indices, Tensor? bias, int in_features, "
      "int out_features) -> ()");
  m.def(
      "gptq_matmul(Tensor(a!) out, Tensor input, Tensor weight, Tensor? input_order, Tensor? bias, int in_features, "
      "int out_features, int bits, bool has_minimum, bool int8_activation, int section_size) -> ()");
  m.def(
      "reshape_and_cache(Tensor key, Tensor value, Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor slot_mapping, "
      "Tensor(c!)? key_scale, Tensor(d!)? value_scale) -> ()");
  m.def("copy_blocks(Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor block_mapping) -> ()");
  m.def("swap_blocks(Tensor source_cache, Tensor(a!) target_cache, Tensor block_mapping) -> ()");
  m.def(
      "paged_attention(Tensor(a!) out, Tensor(b!)? lse, Tensor query, Tensor key_cache, Tensor value_cache, "
      "Tensor block_table, Tensor seq_lens, Tensor? query_start_loc, Tensor? alibi_slopes, Tensor? sinks, "
      "Tensor? key_scale, Tensor? value_scale, float scale, float soft_cap, int sliding_window, bool causal) -> ()");
  m.def(
      "merge_attention_states(Tensor(a!) out, Tensor(b!) lse, Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b) "
      "-> ()");
  m.def(
      "recycle_project(Tensor(a!) out, Tensor hidden, Tensor token_ids, Tensor embedding, "
      "Tensor? embedding_order, int vocab_size, int embedding_bits, bool embedding_has_minimum, Tensor hidden_norm, "
      "Tensor embedding_norm, Tensor projection, Tensor? bias, int out_features, float eps) -> ()");
  m.def(
      "recycle_project.gptq(Tensor(a!) out, Tensor hidden, Tensor token_ids, Tensor embedding, "
      "Tensor? embedding_order, int vocab_size, int embedding_bits, bool embedding_has_minimum, Tensor hidden_norm, "
      "Tensor embedding_norm, Tensor projection, Tensor? input_order, Tensor? bias, int in_features, "
      "int out_features, int bits, bool has_minimum, bool int8_activation, float eps) -> ()");
  m.def(
      "lm_head_argmax(Tensor(a!) token_ids, Tensor(b!) logits, Tensor(c!)? logsumexp, Tensor hidden, Tensor weight, "
      "Tensor? bias, int out_features) -> ()");
  m.def(
      "lm_head_argmax.gptq(Tensor(a!) token_ids, Tensor(b!) logits, Tensor(c!)? logsumexp, Tensor hidden, "
      "Tensor weight, Tensor? input_order, Tensor? bias, int in_features, int out_features, int bits, "
      "bool has_minimum, bool int8_activation) -> ()");
  m.def("verify_recycled(Tensor(a!) out, Tensor target_token_ids, Tensor recycled_token_ids) -> ()");
  m.def(
      "verify_recycled_sampled(Tensor(a!) num_accepted, Tensor(b!) next_token_ids, Tensor target_probs, "
      "Tensor recycled_probs, Tensor recycled_token_ids, Tensor seed, Tensor offset) -> ()");

  m.def("all_reduce(Tensor(a!) out, Tensor input, int comm) -> ()");
  m.def(
      "all_reduce_rms_norm(Tensor(a!) out, Tensor(b!) residual_out, Tensor input, Tensor residual, Tensor weight, "
      "float eps, int comm) -> ()");
  m.def("all_gather(Tensor(a!) out, Tensor input, int comm) -> ()");
  m.def("reduce_scatter(Tensor(a!) out, Tensor input, int comm) -> ()");
  m.def("broadcast(Tensor(a!) out, Tensor input, int root, int comm) -> ()");

  m.def("_plan_begin() -> ()");
  m.def("_plan_end() -> int");
  m.def("_plan_run(int plan) -> ()");
  m.def("_plan_free(int plan) -> ()");

  m.def("_emulate_cuda(str library) -> ()");

  m.def("_read_probe(Tensor data, int num_streams) -> ()");
  m.def("_fma_probe(int iterations) -> int");
  m.def("_int8_probe(int iterations) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(teco_kernels, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&cpu_isa));
  m.impl("cpu_isa_choices", TORCH_BOX(&cpu_isa_choices));
  m.impl("cpu_isa_compiled", TORCH_BOX(&cpu_isa_compiled));
  m.impl("compiler", TORCH_BOX(&compiler));
  m.impl("cuda_operators", TORCH_BOX(&cuda_operators));
  m.impl("kernel_calls", TORCH_BOX(&kernel_calls_of));
  m.impl("_emulate_cuda", TORCH_BOX(&emulate_cuda));
  m.impl("_plan_begin", TORCH_BOX(&plan_begin));
  m.impl("_plan_end", TORCH_BOX(&plan_end));
  m.impl("_plan_run", TORCH_BOX(&plan_run));
  m.impl("_plan_free", TORCH_BOX(&plan_free));
  m.impl("_fma_probe", TORCH_BOX(&fma_probe));
  m.impl("_int8_probe", TORCH_BOX(&int8_probe));
}

STABLE_TORCH_LIBRARY_IMPL(teco_kernels, CPU, m) {
  m.impl("embedding", TORCH_BOX(&embedding));
  m.impl("embedding.gptq", TORCH_BOX(&gptq_embedding));
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("fused_add_rms_norm", TORCH_BOX(&fused_add_rms_norm));
  m.impl("silu_and_mul", TORCH_BOX(&silu_and_mul));
  m.impl("rotary_embedding", TORCH_BOX(&rotary_embedding));
  m.impl("sample", TORCH_BOX(&sample));
  m.impl("dense_matmul", TORCH_BOX(&dense_matmul));
  m.impl("sparse24_matmul", TORCH_BOX(&sparse24_matmul));
  m.impl("gptq_matmul", TORCH_BOX(&gptq_matmul));
  m.impl("reshape_and_cache", TORCH_BOX(&reshape_and_cache));
  m.impl("copy_blocks", TORCH_BOX(&copy_blocks));
  m.impl("swap_blocks", TORCH_BOX(&swap_blocks));
  m.impl("paged_attention", TORCH_BOX(&paged_attention));
  m.impl("merge_attention_states", TORCH_BOX(&merge_attention_states));
  m.impl("recycle_project", TORCH_BOX(&recycle_project));
  m.impl("recycle_project.gptq", TORCH_BOX(&gptq_recycle_project));
  m.impl("lm_head_argmax", TORCH_BOX(&lm_head_argmax));
  m.impl("lm_head_argmax.gptq", TORCH_BOX(&gptq_lm_head_argmax));
  m.impl("verify_recycled", TORCH_BOX(&verify_recycled));
  m.impl("verify_recycled_sampled", TORCH_BOX(&verify_recycled_sampled));
  m.impl("all_reduce", TORCH_BOX(&all_reduce));
  m.impl("all_reduce_rms_norm", TORCH_BOX(&all_reduce_rms_norm));
  m.impl("all_gather", TORCH_BOX(&all_gather));
  m.impl("reduce_scatter", TORCH_BOX(&reduce_scatter));
  m.impl("broadcast", TORCH_BOX(&broadcast));
  m.impl("_read_probe", TORCH_BOX(&read_probe));
}

// In any build: what a build has no CUDA kernels of may be launched by the caller (ops/backend.h).
STABLE_TORCH_LIBRARY_IMPL(teco_kernels, CUDA, m) {
  m.impl("embedding", TORCH_BOX(&embedding));
  m.impl("embedding.gptq", TORCH_BOX(&gptq_embedding));
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("fused_add_rms_norm", TORCH_BOX(&fused_add_rms_norm));
  m.impl("silu_and_mul", TORCH_BOX(&silu_and_mul));
  m.impl("rotary_embedding", TORCH_BOX(&rotary_embedding));
  m.impl("sample", TORCH_BOX(&sample));
  m.impl("dense_matmul", TORCH_BOX(&dense_matmul));
  m.impl("gptq_matmul", TORCH_BOX(&gptq_matmul));
  m.impl("reshape_and_cache", TORCH_BOX(&reshape_and_cache));
  m.impl("copy_blocks", TORCH_BOX(&copy_blocks));
  m.impl("swap_blocks", TORCH_BOX(&swap_blocks));
  m.impl("paged_attention", TORCH_BOX(&paged_attention));
  m.impl("merge_attention_states", TORCH_BOX(&merge_attention_states));
  m.impl("recycle_project", TORCH_BOX(&recycle_project));
  m.impl("recycle_project.gptq", TORCH_BOX(&gptq_recycle_project));
  m.impl("lm_head_argmax", TORCH_BOX(&lm_head_argmax));
  m.impl("lm_head_argmax.gptq", TORCH_BOX(&gptq_lm_head_argmax));
  m.impl("verify_recycled", TORCH_BOX(&verify_recycled));
  m.impl("verify_recycled_sampled", TORCH_BOX(&verify_recycled_sampled));
  m.impl("all_reduce", TORCH_BOX(&all_reduce));
  m.impl("all_reduce_rms_norm", TORCH_BOX(&all_reduce_rms_norm));
  m.impl("all_gather", TORCH_BOX(&all_gather));
  m.impl("reduce_scatter", TORCH_BOX(&reduce_scatter));
  m.impl("broadcast", TORCH_BOX(&broadcast));
}

}  // namespace teco::ops

// The instruction sets a kernel file is compiled for, and the one in use.
#pragma once

namespace teco::cpu {

struct KernelTable;

#pragma GCC visibility push(default)  // for the operators of torch, which are another library

// The table of the widest instruction set that was compiled, that this processor has, and that TECO_CPU_ISA allows
// (picked once). Null when TECO_CPU_ISA names none of them; isa_problem() then says why.
const KernelTable* kernels();
const char* isa_name();
const char* isa_problem();
// The instruction sets that were compiled and that this processor has, widest first, separated by spaces.
const char* isa_choices();
// All that were compiled, also those that this processor lacks.
const char* isa_compiled();

#pragma GCC visibility pop

}  // namespace teco::cpu

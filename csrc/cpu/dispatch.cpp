#include <cstdlib>
#include <cstring>
#include <string>

#include "cpu/isa.h"
#include "cpu/kernels.h"

namespace teco::cpu {

namespace baseline {
extern const KernelTable table;
}
#ifdef TECO_HAVE_AVX2
namespace avx2 {
extern const KernelTable table;
}
#endif
#ifdef TECO_HAVE_AVX512
namespace avx512 {
extern const KernelTable table;
}
#endif

namespace {

#ifdef TECO_HAVE_AVX2
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
         __builtin_cpu_supports("bmi2");
}
#endif
#ifdef TECO_HAVE_AVX512
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vnni");
}
#endif

struct Isa {
  const char* name;
  const KernelTable* table;
  bool (*present)();
};

// Widest first.
const Isa kIsas[] = {
#ifdef TECO_HAVE_AVX512
    {"avx512", &avx512::table, has_avx512},
#endif
#ifdef TECO_HAVE_AVX2
    {"avx2", &avx2::table, has_avx2},
#endif
    {"baseline", &baseline::table, [] { return true; }},
};

struct Choice {
  const Isa* isa = nullptr;
  std::string available, compiled;
  std::string problem;
};

Choice choose() {
  Choice choice;
  const char* wanted = std::getenv("TECO_CPU_ISA");
  for (const Isa& isa : kIsas) {
    choice.compiled += (choice.compiled.empty() ? "" : " ") + std::string(isa.name);
    if (!isa.present()) continue;
    choice.available += (choice.available.empty() ? "" : " ") + std::string(isa.name);
    const bool allowed = !wanted || !*wanted || std::strcmp(wanted, isa.name) == 0;
    if (allowed && !choice.isa) choice.isa = &isa;
  }
  if (!choice.isa)
    choice.problem = "TECO_CPU_ISA: expected one of [" + choice.available + "], got '" + std::string(wanted) + "'";
  return choice;
}

const Choice& choice() {
  static const Choice chosen = choose();
  return chosen;
}

}  // namespace

const KernelTable* kernels() {
  return choice().isa ? choice().isa->table : nullptr;
}
const char* isa_name() {
  return choice().isa ? choice().isa->name : "";
}
const char* isa_problem() {
  return choice().problem.c_str();
}
const char* isa_choices() {
  return choice().available.c_str();
}
const char* isa_compiled() {
  return choice().compiled.c_str();
}

}  // namespace teco::cpu

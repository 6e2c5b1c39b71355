// Where an instruction comes from.
#include <dlfcn.h>
#include <link.h>

#include <cstdint>
#include <cstdio>
#include <cstring>

#include "simt/machine.h"

namespace simt {
namespace {

struct Search {
  std::uintptr_t address;
  bool found;
};

int find_read_only(dl_phdr_info* info, std::size_t, void* context) {
  auto& search = *static_cast<Search*>(context);
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const ElfW(Phdr) & segment = info->dlpi_phdr[i];
    if (segment.p_type == PT_LOAD && !(segment.p_flags & PF_W) &&
        search.address - (info->dlpi_addr + segment.p_vaddr) < segment.p_memsz)
      search.found = true;
  }
  return search.found;
}

}  // namespace

bool is_constant(std::uintptr_t address) {
  Search search = {address, false};
  dl_iterate_phdr(find_read_only, &search);
  return search.found;
}

std::string source_of(const void* code) {
  Dl_info info = {};
  if (!dladdr(code, &info) || !info.dli_fname) return "?";
  // One byte back: `code` is where a call returns to, perhaps on the next line.
  const auto offset = reinterpret_cast<std::uintptr_t>(code) - reinterpret_cast<std::uintptr_t>(info.dli_fbase) - 1;
  char command[4200], line[1024];
  std::snprintf(command, sizeof(command), "addr2line -Cfipse '%s' %#zx 2>/dev/null", info.dli_fname,
                static_cast<std::size_t>(offset));
  std::string text;
  if (FILE* pipe = popen(command, "r")) {
    while (std::fgets(line, sizeof(line), pipe)) text += line;
    pclose(pipe);
  }
  while (!text.empty() && text.back() == '\n') text.pop_back();
  if (!text.empty() && text.find("??") == std::string::npos) return text;
  std::snprintf(line, sizeof(line), "%s+%#zx", info.dli_fname, static_cast<std::size_t>(offset));
  return line;
}

}  // namespace simt

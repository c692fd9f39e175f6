// Built without instruction-set flags: this code runs before anyone knows what the processor can do.

#include "isa.hpp"

#include <cstdlib>
#include <string>
#include <vector>

#include <nvpflow/device.hpp>
#include <nvpflow/error.hpp>

#include "kernels.hpp"

namespace nvpflow {
namespace cpu {

#ifdef NVPFLOW_HAVE_X86
extern const IsaEntry isa_avx512;
extern const IsaEntry isa_avx2;
#endif
#ifdef NVPFLOW_HAVE_NEON
extern const IsaEntry isa_neon;
#else
extern const IsaEntry isa_baseline;
#endif

namespace {

struct Candidate {
  const IsaEntry* entry;
  bool supported;
};

/// Best first. __builtin_cpu_supports asks the operating system's side (XCR0) too.
std::vector<Candidate> candidates() {
  std::vector<Candidate> list;
#ifdef NVPFLOW_HAVE_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw");
  list.push_back({&isa_avx512, avx512});
  list.push_back({&isa_avx2, avx2});
#endif
#ifdef NVPFLOW_HAVE_NEON
  list.push_back({&isa_neon, true});  // part of every aarch64 processor
#else
  list.push_back({&isa_baseline, true});
#endif
  return list;
}

std::string names(bool supported_only) {
  std::string text;
  for (const Candidate& c : candidates()) {
    if (supported_only && !c.supported) continue;
    if (!text.empty()) text += ',';
    text += c.entry->name;
  }
  return text;
}

const IsaEntry& choose() {
  const char* value = std::getenv("NVPFLOW_ISA");  // NOLINT(concurrency-mt-unsafe): nothing here sets variables
  const std::string wanted = value == nullptr ? "" : value;
  for (const Candidate& c : candidates()) {
    if (wanted.empty()) {
      if (c.supported) return *c.entry;
    } else if (wanted == c.entry->name) {
      if (c.supported) return *c.entry;
      throw Error(ErrorCode::unavailable, "NVPFLOW_ISA is \"" + wanted +
                                              "\", which this processor does not support; it supports " + names(true));
    }
  }
  throw Error(ErrorCode::unavailable, "NVPFLOW_ISA is \"" + wanted + "\", expected one of " + names(false));
}

}  // namespace

std::vector<const IsaEntry*> supported_isas() {
  std::vector<const IsaEntry*> entries;
  for (const Candidate& c : candidates()) {
    if (c.supported) entries.push_back(c.entry);
  }
  return entries;
}

bool prefers_wide_blocks() {
#ifdef NVPFLOW_HAVE_X86
  __builtin_cpu_init();
  return __builtin_cpu_is("intel");  // measured on both makers' (tests/bench/NOTEBOOK.md)
#else
  return false;
#endif
}

const IsaEntry& chosen_isa() {
  static const IsaEntry& entry = choose();
  return entry;
}

}  // namespace cpu

const char* cpu_isa() { return cpu::chosen_isa().name; }

const char* cpu_isas_available() {
  static const std::string text = cpu::names(true);
  return text.c_str();
}

}  // namespace nvpflow

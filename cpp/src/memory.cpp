#include "memory.hpp"

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstddef>
#include <cstdint>
#include <new>
#include <string>

#include <nvpflow/error.hpp>

namespace nvpflow {
namespace {

constexpr std::size_t kAlignment = 64;
// Memory of more than a few huge pages asks for them: tiles, tape, weights and moments are read across so many small
// ones that the processor would spend more time on finding their addresses than on waiting for their content.
constexpr std::size_t kHugePage = 2 << 20;

/// A wish: where the system does not grant it, small pages do.
void ask_for_huge_pages([[maybe_unused]] void* p, [[maybe_unused]] std::size_t size) {
#if defined(__linux__)
  if (size < 2 * kHugePage) return;
  const auto begin = reinterpret_cast<std::uintptr_t>(p);
  const std::uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage, end = begin + size;
  ::madvise(static_cast<char*>(p) + (first - begin), (end - first) / kHugePage * kHugePage, MADV_HUGEPAGE);
#endif
}

}  // namespace

void* allocate_aligned(std::int64_t bytes) {
  const auto size = static_cast<std::size_t>(bytes);
  void* p = ::operator new(size, std::align_val_t{kAlignment}, std::nothrow);
  if (p == nullptr) {
    throw Error(ErrorCode::out_of_memory, "out of memory: " + std::to_string(bytes) + " bytes of working memory");
  }
  ask_for_huge_pages(p, size);
  return p;
}

void free_aligned(void* memory) noexcept { ::operator delete(memory, std::align_val_t{kAlignment}); }

}  // namespace nvpflow

// Memory that a fuzz target takes, counted in operator new: everything the library allocates comes from there.
#pragma once

#include <malloc.h>

#include <cstddef>
#include <cstdlib>
#include <new>

namespace allocations {

inline std::size_t live = 0, peak = 0;  // bytes, of this one thread

inline void start() { peak = live = 0; }

inline void* counted(void* p) {
  if (p != nullptr) {
    live += malloc_usable_size(p);
    peak = live > peak ? live : peak;
  }
  return p;
}

inline void* take(std::size_t size) {
  void* const p = counted(std::malloc(size));
  if (p == nullptr) throw std::bad_alloc();
  return p;
}

// What was there before start() may be freed after it: the count wraps around and back.
inline void give(void* p) {
  if (p != nullptr) live -= malloc_usable_size(p);
  std::free(p);
}

inline void* take_aligned(std::size_t size, std::align_val_t alignment) {
  void* p = nullptr;
  if (posix_memalign(&p, static_cast<std::size_t>(alignment), size) != 0) return nullptr;
  return counted(p);
}

}  // namespace allocations

#pragma GCC visibility push(default)
void* operator new(std::size_t size) { return allocations::take(size); }
void* operator new[](std::size_t size) { return allocations::take(size); }
void* operator new(std::size_t size, const std::nothrow_t&) noexcept { return allocations::counted(std::malloc(size)); }
void* operator new(std::size_t size, std::align_val_t alignment) {
  void* const p = allocations::take_aligned(size, alignment);
  if (p == nullptr) throw std::bad_alloc();
  return p;
}
void* operator new(std::size_t size, std::align_val_t alignment, const std::nothrow_t&) noexcept {
  return allocations::take_aligned(size, alignment);
}
void operator delete(void* p) noexcept { allocations::give(p); }
void operator delete[](void* p) noexcept { allocations::give(p); }
void operator delete(void* p, std::size_t) noexcept { allocations::give(p); }
void operator delete[](void* p, std::size_t) noexcept { allocations::give(p); }
void operator delete(void* p, std::align_val_t) noexcept { allocations::give(p); }
void operator delete(void* p, std::size_t, std::align_val_t) noexcept { allocations::give(p); }
#pragma GCC visibility pop

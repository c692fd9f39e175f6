// Working memory at vectors' boundaries, in huge pages where it is large.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

namespace nvpflow {

/// At 64 bytes, not initialised. Throws Error(out_of_memory) with the size.
void* allocate_aligned(std::int64_t bytes);
void free_aligned(void* memory) noexcept;

/// Memory that is kept when it is large enough.
class AlignedBuffer {
 public:
  void* reserve(std::int64_t bytes) {
    if (bytes > capacity_) {
      memory_.reset();
      capacity_ = 0;
      memory_.reset(allocate_aligned(bytes));
      capacity_ = bytes;
    }
    return memory_.get();
  }

 private:
  struct Free {
    void operator()(void* memory) const noexcept { free_aligned(memory); }
  };
  std::unique_ptr<void, Free> memory_;
  std::int64_t capacity_ = 0;
};

template <class T>
struct AlignedAllocator {
  using value_type = T;
  AlignedAllocator() = default;
  template <class U>
  AlignedAllocator(const AlignedAllocator<U>&) noexcept {}  // NOLINT(misc-explicit-constructor): as allocators must be

  T* allocate(std::size_t count) {
    return static_cast<T*>(allocate_aligned(static_cast<std::int64_t>(count * sizeof(T))));
  }
  void deallocate(T* memory, std::size_t) noexcept { free_aligned(memory); }
  bool operator==(const AlignedAllocator&) const = default;
};

/// Gives a vector's memory back; `v = {}` keeps it: that assigns an empty list.
template <class V>
void release(V& v) {
  V().swap(v);
}

/// Arrays as long as the parameters.
template <class T>
using AlignedVector = std::vector<T, AlignedAllocator<T>>;

}  // namespace nvpflow

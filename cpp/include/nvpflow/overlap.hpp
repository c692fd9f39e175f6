/// @file
/// Memory that arrays share.
#pragma once

#include <cstdint>
#include <functional>
#include <string>

#include <nvpflow/error.hpp>

namespace nvpflow {

/// Whether two pieces of memory share a byte.
inline bool overlap(const void* a, std::int64_t a_bytes, const void* b, std::int64_t b_bytes) {
  const auto* pa = static_cast<const char*>(a);
  const auto* pb = static_cast<const char*>(b);
  const std::less<> before;
  return a_bytes > 0 && b_bytes > 0 && before(pa, pb + b_bytes) && before(pb, pa + a_bytes);
}

/// A piece of memory, and the name that errors call it by.
struct NamedMemory {
  const char* name;        ///< of the argument
  const void* data;        ///< where it begins
  std::int64_t bytes = 0;  ///< its size; 0: there is none
};

/// Throws Error(invalid_argument) where the two share a byte.
inline void refuse_overlap(const NamedMemory& a, const NamedMemory& b) {
  if (!overlap(a.data, a.bytes, b.data, b.bytes)) return;
  throw Error(ErrorCode::invalid_argument,
              std::string(a.name) + " overlaps " + b.name + "; they must not share memory");
}

}  // namespace nvpflow

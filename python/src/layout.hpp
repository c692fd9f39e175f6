// Where an array's elements lie, judged from sizes and steps that somebody else wrote down. Knows neither Python nor
// NumPy, so that it can be tested, and fuzzed, by itself (tests/fuzz/layout.cpp).
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <optional>
#include <span>
#include <string>
#include <vector>

namespace nvpflow::python {

/// More than any library's arrays have that NumPy reads.
inline constexpr std::int32_t kMostAxes = 32;

/// "(3, 4)", "(3,)", "()".
template <class Int>
std::string shape_text(std::span<const Int> shape) {
  std::string text = "(";
  for (std::size_t i = 0; i < shape.size(); ++i) text += (i > 0 ? ", " : "") + std::to_string(shape[i]);
  return text + (shape.size() == 1 ? ",)" : ")");
}

inline std::string shape_text(const std::vector<std::int64_t>& shape) {
  return shape_text(std::span<const std::int64_t>(shape));
}

/// Elements of an array of this shape; -1 where no array can have it. Sizes that could not even stand beside each other
/// without the axis of length 0 are refused, too: their strides would overflow.
inline std::int64_t elements_of(std::span<const std::int64_t> shape) {
  constexpr std::int64_t kMost = std::int64_t{1} << 58;  // of 16 bytes, and a sign
  std::int64_t room = kMost, count = 1;
  for (const std::int64_t extent : shape) {
    if (extent < 0 || (room /= std::max<std::int64_t>(1, extent)) == 0) return -1;
    count *= extent;
  }
  return count;
}

/// Whether elements `unit` apart (1: strides in elements) lie one after the other, the last axis fastest. shape: one
/// that elements_of knows; strides of axes of length 1 mean nothing.
inline bool is_c_contiguous(std::span<const std::int64_t> shape, std::span<const std::int64_t> strides,
                            std::int64_t unit) {
  if (strides.size() != shape.size()) return false;
  if (std::find(shape.begin(), shape.end(), 0) != shape.end()) return true;
  std::int64_t expected = unit;
  for (std::size_t i = shape.size(); i-- > 0;) {
    if (shape[i] != 1 && strides[i] != expected) return false;
    expected *= shape[i];
  }
  return true;
}

/// Strides in bytes of an array whose strides are given in elements, or not at all (null: C-contiguous). Nothing where
/// an element would lie further from the first one than an address can tell. shape: one that elements_of knows,
/// item_bytes up to 16.
inline std::optional<std::vector<std::int64_t>> byte_strides(std::span<const std::int64_t> shape,
                                                             const std::int64_t* strides, std::int64_t item_bytes) {
  std::vector<std::int64_t> bytes(shape.size());
  std::int64_t elements = 1, reach = 0;
  for (std::size_t i = shape.size(); i-- > 0;) {
    const std::int64_t step = strides == nullptr ? elements : strides[i];
    std::int64_t distance = 0;
    if (__builtin_mul_overflow(item_bytes, step, &bytes[i]) || bytes[i] == std::numeric_limits<std::int64_t>::min() ||
        __builtin_mul_overflow(std::max<std::int64_t>(1, shape[i]) - 1, bytes[i] < 0 ? -bytes[i] : bytes[i],
                               &distance) ||
        __builtin_add_overflow(reach, distance, &reach)) {
      return std::nullopt;
    }
    elements *= std::max<std::int64_t>(1, shape[i]);
  }
  return bytes;
}

/// [B, features], or [features] for one row.
template <class Int>
bool are_rows(std::span<const Int> shape, std::int64_t features) {
  return (shape.size() == 1 || shape.size() == 2) && shape.back() == features;
}

}  // namespace nvpflow::python

// Sums that have the same bits in whatever order they are formed: addends are rounded to multiples of one power of two
// for each group of elements, and the multiples are added up as integers. (Climate models call it a reproducible sum.)
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

namespace nvpflow {

/// The least exponent that is used: finer multiples tell nothing.
inline constexpr std::int64_t kLeastExponent = -900;

/// |value| < 2^exponent_of(value) of a finite value.
inline std::int64_t exponent_of(double value) {
  int exponent = 0;
  std::frexp(value, &exponent);
  return value == 0 || !std::isfinite(value) ? kLeastExponent : std::max<std::int64_t>(exponent, kLeastExponent);
}

/// Bits that an addend may have where so many are added up in 63.
inline std::int64_t bits_of_addend(std::int64_t addends) {
  return 62 -
         static_cast<std::int64_t>(std::bit_width(static_cast<std::uint64_t>(std::max<std::int64_t>(addends, 1)) - 1));
}

/// An order of integers that is that of doubles, for an exact maximum; its own inverse, by from_ordered.
inline std::int64_t ordered(double value) {
  const auto bits = std::bit_cast<std::int64_t>(value);
  return bits >= 0 ? bits : std::numeric_limits<std::int64_t>::min() - bits;
}
inline double from_ordered(std::int64_t order) {
  return std::bit_cast<double>(order >= 0 ? order : std::numeric_limits<std::int64_t>::min() - order);
}

}  // namespace nvpflow

// KERNEL: adds numbers, rounded to multiples of a unit, to integers: exact_sum.hpp.
//
// Reads 12 and writes 8 bytes a float; ten operations, in vectors of float64 that the compiler makes.
#pragma once

#include <stdint.h>

#include "kernels.hpp"

namespace nvpflow::cpu {
namespace {

/// words[i] += llrint(values[i] * factor) where |values[i] * factor| < limit <= 2^62; returns how many others there
/// are.
///
/// Without a conversion, for which most instruction sets have no vector form: the upper and the lower 32 bits are each
/// left in the mantissa of a double.
template <class T>
int64_t add_to_grid(const T* values, int64_t count, double factor, double limit, int64_t* words) {
  constexpr double kInteger = 0x1.8p52, kUpper = 0x1p32;
  constexpr int64_t kZero = __builtin_bit_cast(int64_t, kInteger);
  int64_t outside = 0;
  for (int64_t i = 0; i < count; ++i) {
    const double given = static_cast<double>(values[i]) * factor;
    const bool fits = __builtin_fabs(given) < limit;  // not a NaN
    const double v = fits ? given : 0.0;
    const double upper = (v * (1 / kUpper) + kInteger) - kInteger;
    const uint64_t high = static_cast<uint64_t>(__builtin_bit_cast(int64_t, upper + kInteger) - kZero);
    const uint64_t low = static_cast<uint64_t>(__builtin_bit_cast(int64_t, v - upper * kUpper + kInteger) - kZero);
    words[i] = static_cast<int64_t>(static_cast<uint64_t>(words[i]) + (high << 32) + low);
    outside += fits ? 0 : 1;
  }
  return outside;
}

}  // namespace
}  // namespace nvpflow::cpu

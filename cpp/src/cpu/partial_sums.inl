// KERNEL: kLanes partial sums on a tile, added up as sum_lanes adds up those of a row.
#pragma once

#include <stdint.h>

#include "simd.hpp"

namespace nvpflow::cpu {
namespace {

/// Sum of kLanes partial sums, halved as in sum_lanes.
template <class T>
NVPFLOW_INLINE Vec<T> sum_partials(Vec<T> (&partial)[kLanes<T>]) {
#pragma GCC unroll 8
  for (int width = kLanes<T> / 2; width > 0; width /= 2) {
#pragma GCC unroll 16
    for (int l = 0; l < width; ++l) partial[l] = partial[l] + partial[l + width];
  }
  return partial[0];
}

/// out [rows] = sums of the rows of partial [kLanes][rows].
template <class T>
void sum_partials_tile(const T* partial, T* out, int64_t rows) {
  for (int64_t r = 0; r < rows; r += kLanes<T>) {
    Vec<T> sums[kLanes<T>];
#pragma GCC unroll 16
    for (int l = 0; l < kLanes<T>; ++l) sums[l] = load<T>(partial + l * rows + r);
    store<T>(out + r, sum_partials<T>(sums));
  }
}

}  // namespace
}  // namespace nvpflow::cpu

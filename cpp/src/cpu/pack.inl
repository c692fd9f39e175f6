// KERNEL: the transposed weights of a dense layer, which the way back reads.
#pragma once

#include <stdint.h>

#include "blocks.hpp"
#include "kernels.hpp"
#include "simd.hpp"
#include "tile.inl"

namespace nvpflow::cpu {
namespace {

/// Dense::transposed of a paired layer.
template <class T>
void pair_weights(const Dense<T>& d, T* to) {
  constexpr int L = kLanes<T>;
  for (int64_t o = 0; o < d.out; o += 2, to += L) {
    const T* w = d.weights + o / L * L * d.in + o % L;
    store<T>(to, Vec<T>{});
    for (int64_t i = 0; i < d.in; ++i) {  // the weight past the last output is a zero of the padding
      to[2 * i] = w[i * L];
      to[2 * i + 1] = w[i * L + 1];
    }
  }
}

/// Dense::transposed, of inputs [first, last).
template <class T>
void transpose_weights(const Dense<T>& d, int64_t first, int64_t last, T* to) {
  constexpr int L = kLanes<T>;
  if (d.paired) return pair_weights<T>(d, to);
  to += first * d.out;
  for (int64_t i = first; i < last; i += L) {
    for (int64_t o = 0; o < d.out; o += L) {
      const int64_t columns = smaller(L, d.out - o);
      gather_tile<T>([&](int64_t l) { return d.weights + o * d.in + (i + l) * L; }, smaller(L, d.in - i), columns, to,
                     L);
      to += columns * L;
    }
  }
}

}  // namespace
}  // namespace nvpflow::cpu

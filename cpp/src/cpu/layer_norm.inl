// KERNEL: LayerNorm of a hidden layer's values: each row to mean 0 and variance 1 (unbiased, plus 1e-5), without an
// affine map. The sums over units are kept in kLanes partial sums, unit i in partial i mod kLanes, so that a tile and a
// few rows give the same bits.
#pragma once

#include <stdint.h>

#include "kernels.hpp"
#include "partial_sums.inl"
#include "scratch.hpp"
#include "simd.hpp"

namespace nvpflow::cpu {
namespace {

/// 1 / the standard deviation, from the sum of the squares of n centred values.
template <class T>
NVPFLOW_INLINE Vec<T> inverse_deviation(Vec<T> squares, int64_t n) {
  return set1(T(1)) / sqrt(squares / static_cast<T>(n - 1) + T(1e-5));
}

/// x [n][rows], in place. n >= 2.
template <class T>
void layer_norm_tile(T* x, int64_t n, int64_t rows) {
  constexpr int L = kLanes<T>;
  for (int64_t r = 0; r < rows; r += L, x += L) {
    // The sum over the units of what add(sum, value) adds.
    const auto sum = [=](auto add) __attribute__((always_inline)) {
      Vec<T> sums[L] = {};
      int64_t i = 0;
      for (; i + L <= n; i += L) {
#pragma GCC unroll 16
        for (int l = 0; l < L; ++l) sums[l] = add(sums[l], load<T>(x + (i + l) * rows));
      }
#pragma GCC unroll 16
      for (int l = 0; l < L; ++l) {
        if (i + l < n) sums[l] = add(sums[l], load<T>(x + (i + l) * rows));
      }
      return sum_partials<T>(sums);
    };
    const Vec<T> mean =
        sum([](Vec<T> s, Vec<T> v) __attribute__((always_inline)) { return s + v; }) / static_cast<T>(n);
    const Vec<T> squares =
        sum([=](Vec<T> s, Vec<T> v) __attribute__((always_inline)) { return fma(v - mean, v - mean, s); });
    const Vec<T> factor = inverse_deviation<T>(squares, n);
    for (int64_t i = 0; i < n; ++i) store<T>(x + i * rows, (load<T>(x + i * rows) - mean) * factor);
  }
}

/// y[count][n] from x[count][n], rows `stride` apart; y may be x. factors: null, or where 1 / the standard deviation of
/// each row goes. Columns n and beyond are not read.
template <class T>
void layer_norm_rows(const T* x, T* y, int64_t n, int64_t stride, int64_t count, T* factors) {
  constexpr int L = kLanes<T>;
  for (int64_t r = 0; r < count; ++r, x += stride, y += stride) {
    Vec<T> sum = {}, squares = {};
    for (int64_t i = 0; i < n; i += L) sum = sum + load_upto<T>(x + i, n - i);
    const Vec<T> mean = set1(sum_lanes<T>(sum)) / static_cast<T>(n);
    for (int64_t i = 0; i < n; i += L) {
      store<T>(y + i, load<T>(x + i) - mean);
      const Vec<T> centred = load_upto<T>(y + i, n - i);
      squares = fma(centred, centred, squares);
    }
    const Vec<T> factor = inverse_deviation<T>(set1(sum_lanes<T>(squares)), n);
    for (int64_t i = 0; i < n; i += L) store<T>(y + i, load<T>(y + i) * factor);
    if (factors != nullptr) factors[r] = factor[0];
  }
}

/// From the cotangents g [count][n] of the results y to those of what they were made from, in place; rows `stride`
/// apart.
template <class T>
void layer_norm_backward(const T* y, const T* factors, T* g, int64_t n, int64_t stride, int64_t count) {
  constexpr int L = kLanes<T>;
  for (int64_t r = 0; r < count; ++r, y += stride, g += stride) {
    Vec<T> sum = {}, product = {};
    for (int64_t i = 0; i < n; i += L) {
      const Vec<T> cotangent = load_upto<T>(g + i, n - i);
      sum = sum + cotangent;
      product = fma(cotangent, load_upto<T>(y + i, n - i), product);
    }
    const Vec<T> mean = set1(sum_lanes<T>(sum) / static_cast<T>(n));
    const Vec<T> along = set1(sum_lanes<T>(product) / static_cast<T>(n - 1));
    for (int64_t i = 0; i < n; i += L) {
      store<T>(g + i, fma(-load<T>(y + i), along, load<T>(g + i) - mean) * factors[r]);
    }
  }
}

}  // namespace
}  // namespace nvpflow::cpu

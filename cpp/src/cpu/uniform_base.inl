// KERNEL: the uniform base density on an interval, edges included, and uniform noise from counters.
//
// Density: 2 D comparisons, no arithmetic on the latents: every row inside has the same one, in any order of the sums.
#pragma once

#include <stdint.h>

#include "base_tile.inl"
#include "kernels.hpp"
#include "philox.inl"
#include "poison.inl"
#include "simd.hpp"
#include "tile.inl"

namespace nvpflow::cpu {
namespace {

/// u in (0, 1) of column `column` of a block from its words [4][kLanes]: the middles of 2^23 and 2^52 equal steps,
/// exact numbers that come near neither end by rounding.
NVPFLOW_INLINE void uniform_numbers(const uint32_t* words, int column, float* u) {
  for (int l = 0; l < kLanes<float>; ++l) {
    u[l] = (static_cast<float>(words[column * kLanes<float> + l] >> 9) + 0.5f) * 0x1p-23f;
  }
}

NVPFLOW_INLINE void uniform_numbers(const uint32_t* words, int column, double* u) {
  constexpr int L = kLanes<double>;
  for (int l = 0; l < L; ++l) {
    const uint64_t low = words[2 * column * L + l], high = words[(2 * column + 1) * L + l];
    u[l] = (static_cast<double>((high << 32 | low) >> 12) + 0.5) * 0x1p-52;
  }
}

template <class T>
struct UniformDensity {
  /// As NormalDensity. A row of NaN has the density NaN.
  template <class Place>
  static void log_prob_tile(const BaseDensity<T>& base, const T* state, int64_t features, const T* log_det, T* out,
                            int64_t rows, Place) {
    for (int64_t r = 0; r < rows; r += kLanes<T>) {
      const Vec<T> inside = load<T>(log_det + r) + base.log_density;
      IntVec<T> is_outside = {}, is_nan = inside != inside;
      for (int64_t j = 0; j < features; ++j) {
        const Vec<T> z = load<T>(state + j * rows + r);
        is_outside |= (z < base.low) | (z > base.high);
        is_nan |= z != z;
      }
      const Vec<T> density = is_outside ? set1(-kInfinity<T>) : inside;
      store<T>(out + r, is_nan ? set1(kNaN<T>) : density);
    }
  }

  static NVPFLOW_NOINLINE T log_prob_row(const BaseDensity<T>& base, const T* z, int64_t features, T log_det) {
    const T inside = log_det + base.log_density;
    bool is_outside = false, is_nan = __builtin_isnan(inside);
    for (int64_t j = 0; j < features; ++j) {
      is_outside |= z[j] < base.low || z[j] > base.high;
      is_nan |= __builtin_isnan(z[j]);
    }
    return is_nan ? kNaN<T> : is_outside ? -kInfinity<T> : inside;
  }

  static TapeSize tape(const BaseDensity<T>&, int64_t) { return {}; }

  /// Density and flow are flat around a row outside: its log_prob_cotangent becomes 0, and nothing moves.
  static void backward(const BaseDensity<T>& base, const BaseTile<T>& tile) {
    const int64_t rows = tile.rows;
    for (int64_t r = 0; r < rows; r += kLanes<T>) {
      IntVec<T> is_outside = {};
      for (int64_t j = 0; j < tile.features; ++j) {
        const Vec<T> z = load<T>(tile.state + j * rows + r);
        is_outside |= (z < base.low) | (z > base.high);
        store<T>(tile.cotangent + j * rows + r, Vec<T>{});
      }
      store<T>(tile.log_prob_cotangent + r, is_outside ? Vec<T>{} : load<T>(tile.log_prob_cotangent + r));
    }
  }

  static PartSize part(const BaseDensity<T>&, int64_t) { return {}; }
  static void weight_gradient(const BaseDensity<T>&, int64_t, int64_t, int64_t, const TileTapes<T>&, T*, bool) {}

  /// As NormalDensity, from the same blocks. Rounding does not carry a number past `high`.
  template <class Place>
  static void noise_tile(const BaseDensity<T>& base, uint64_t seed, uint64_t row, int64_t features, T* state,
                         int64_t rows, Place place) {
    constexpr int L = kLanes<T>;
    constexpr int kColumns = sizeof(T) == 4 ? 4 : 2;
    for (int64_t r = 0; r < rows; r += L) {
      for (int64_t j = 0; j < features; j += kColumns) {
        uint32_t words[4 * L];
        philox_lanes<L>(seed, row + static_cast<uint64_t>(r), static_cast<uint32_t>(j / kColumns), words);
        for (int column = 0; column < kColumns && j + column < features; ++column) {
          T u[L];
          uniform_numbers(words, column, u);
          const Vec<T> z = fma(load<T>(u), set1(base.range), set1(base.low));
          store<T>(state + place(j + column) * rows + r, at_most(z, base.high));
        }
      }
    }
  }
};

}  // namespace
}  // namespace nvpflow::cpu

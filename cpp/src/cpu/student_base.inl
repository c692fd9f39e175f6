// KERNEL: the base of independent Student t distributions, and noise of them from counters.
//
// Density: a logarithm, a log1p and two divisions a latent. Everything is in terms of t = |z| / sqrt(nu) and of the
// smaller of t and 1 / t, so that no square overflows: far latents are what this base is for. Noise: Bailey's polar
// form (1994), which rejects nothing, so that a number depends only on its counter.
#pragma once

#include <stdint.h>

#include "base_tile.inl"
#include "elementary.hpp"
#include "kernels.hpp"
#include "normal_base.inl"
#include "partial_sums.inl"
#include "philox.inl"
#include "scratch.hpp"
#include "simd.hpp"
#include "tile.inl"

namespace nvpflow::cpu {
namespace {

template <class T>
constexpr T kLargest = sizeof(T) == 4 ? static_cast<T>(__FLT_MAX__) : static_cast<T>(__DBL_MAX__);

/// What density and gradient need of a latent.
template <class T>
struct StudentPoint {
  Vec<T> log_term;  // log(1 + t^2)
  Vec<T> slope;     // t / (1 + t^2)
  Vec<T> share;     // t^2 / (1 + t^2)
};

template <class T>
NVPFLOW_INLINE StudentPoint<T> student_point(Vec<T> z, Vec<T> inverse_root) {
  const Vec<T> t = absolute<T>(z) * inverse_root;
  const Vec<T> inverse = T(1) / t;
  const IntVec<T> far = t > T(1);
  const Vec<T> m = far ? inverse : t, square = m * m;
  const Vec<T> bounded = at_most(t, kLargest<T>);
  const Vec<T> log_far = log<T>(at_least(bounded, T(1))) + (t - bounded);  // infinite where t is
  const Vec<T> rest = T(1) / (square + T(1));
  return {fma(log_far, set1(T(2)), log1p_unit<T>(square)), m * rest, far ? rest : square * rest};
}

template <class T>
struct StudentDensity {
  static NVPFLOW_INLINE T number(const BaseDensity<T>& base, StudentNumber which, int64_t feature) {
    return base.student[which * base.stride + feature];
  }

  /// As NormalDensity.
  template <class Place>
  static void log_prob_tile(const BaseDensity<T>& base, const T* state, int64_t features, const T* log_det, T* out,
                            int64_t rows, Place place) {
    constexpr int L = kLanes<T>;
    for (int64_t r = 0; r < rows; r += L) {
      Vec<T> sums[L] = {};
      for (int64_t j = 0; j < features; ++j) {
        const StudentPoint<T> point =
            student_point<T>(load<T>(state + place(j) * rows + r), set1(number(base, kInverseRoot, j)));
        sums[j % L] = fma(point.log_term, set1(number(base, kPower, j)), sums[j % L]);
      }
      store<T>(out + r, load<T>(log_det + r) + (set1(base.log_density) - sum_partials<T>(sums)));
    }
  }

  static NVPFLOW_NOINLINE T log_prob_row(const BaseDensity<T>& base, const T* z, int64_t features, T log_det) {
    Vec<T> sum = {};
    for (int64_t j = 0; j < features; j += kLanes<T>) {
      const T* numbers = base.student + j;
      const StudentPoint<T> point =
          student_point<T>(load_upto<T>(z + j, features - j), load<T>(numbers + kInverseRoot * base.stride));
      sum = fma(point.log_term, load<T>(numbers + kPower * base.stride), sum);
    }
    return log_det + (base.log_density - sum_lanes<T>(sum));
  }

  /// By unit of rows, sums of the gradient of log_df [D].
  static TapeSize tape(const BaseDensity<T>&, int64_t features) { return {0, row_stride<T>(features)}; }

  static void backward(const BaseDensity<T>& base, const BaseTile<T>& tile) {
    const int64_t unit = row_stride<T>(tile.features);
    for (int64_t j = 0; j < tile.features; ++j) {
      const int64_t at = place_of(tile.place, j) * tile.rows;
      const Vec<T> root = set1(number(base, kInverseRoot, j)), slope = set1(-number(base, kSlope, j));
      const Vec<T> power = set1(number(base, kPower, j)), half = set1(-number(base, kHalf, j));
      const Vec<T> norm = set1(number(base, kNormSlope, j));
      Vec<T> sum = {};
      for (int64_t r = 0; r < tile.rows; r += kLanes<T>) {
        const Vec<T> z = load<T>(tile.state + at + r), g = load<T>(tile.log_prob_cotangent + r);
        const StudentPoint<T> point = student_point<T>(z, root);
        store<T>(tile.cotangent + at + r, copy_sign<T>(slope * point.slope, -z) * g);
        if (r >= tile.count) continue;
        const Vec<T> by_log_df = fma(point.share, power, fma(point.log_term, half, norm)) * g;
        if (r % kGradientUnit == 0) sum = Vec<T>{};
        T terms[kLanes<T>];
        store<T>(terms, by_log_df);
        sum = sum + load_upto<T>(terms, tile.count - r);
        tile.tape[r / kGradientUnit * unit + j] = sum_lanes<T>(sum);
      }
    }
  }

  static PartSize part(const BaseDensity<T>&, int64_t features) { return {features, 0}; }
  static void weight_gradient(const BaseDensity<T>& base, int64_t features, int64_t first, int64_t last,
                              const TileTapes<T>& tapes, T* gradient, bool add) {
    for (int64_t j = first; j < last; ++j) {
      T sum = 0;
      for (int64_t row = 0; row < tapes.count; row += kGradientUnit) {
        const T* sums = tapes.first + row / tapes.rows * tapes.stride;
        sum += sums[row % tapes.rows / kGradientUnit * row_stride<T>(features) + j];
      }
      T* to = gradient + base.offset + j;
      *to = add ? *to + sum : sum;
    }
  }

  /// As NormalDensity, a number from each pair of words that it takes two normals from. z = sqrt(nu (u^(-2 / nu) - 1))
  /// cos(2 pi v); with x = -2 log(u) / nu the root is sqrt(nu) e^(x / 2) sqrt(1 - e^-x), which keeps small x and does
  /// not overflow before z does.
  template <class Place>
  static void noise_tile(const BaseDensity<T>& base, uint64_t seed, uint64_t row, int64_t features, T* state,
                         int64_t rows, Place place) {
    constexpr int L = kLanes<T>;
    constexpr int kPairs = sizeof(T) == 4 ? 2 : 1;
    for (int64_t r = 0; r < rows; r += L) {
      for (int64_t j = 0; j < features; j += kPairs) {
        uint32_t words[4 * L];
        philox_lanes<L>(seed, row + static_cast<uint64_t>(r), static_cast<uint32_t>(j / kPairs), words);
        for (int pair = 0; pair < kPairs && j + pair < features; ++pair) {
          const int64_t column = j + pair;
          T u[L], quarters[L];
          uniforms(words, pair, u, quarters);
          const Vec<T> half = log<T>(load<T>(u)) * T(-0.5) * number(base, kInverseHalf, column);  // x / 2
          const Vec<T> radius = exp<T>(half) * sqrt(-expm1_bounded<T>(half * T(-2)));
          const Vec<T> z = radius * turn<T>(load<T>(quarters)).cosine * number(base, kRoot, column);
          store<T>(state + place(column) * rows + r, z);
        }
      }
    }
  }
};

}  // namespace
}  // namespace nvpflow::cpu

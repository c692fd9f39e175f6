// KERNEL: the base density N(0, I), and standard normal noise from counters.
//
// Density: 2 D FLOPs and no memory beyond the tile. Noise: one Philox call gives 4 float or 2 double normals by the
// transform of Box and Muller (1958); about 30 integer and 40 floating-point operations per pair.
#pragma once

#include <stdint.h>

#include "base_tile.inl"
#include "elementary.hpp"
#include "kernels.hpp"
#include "partial_sums.inl"
#include "philox.inl"
#include "simd.hpp"
#include "tile.inl"

namespace nvpflow::cpu {
namespace {

template <class T>
constexpr T kHalfLogTwoPi = static_cast<T>(0.91893853320467274178);

/// log N(z; 0, I) + log_det, from |z|^2.
template <class T>
NVPFLOW_INLINE Vec<T> log_prob_from(Vec<T> square, Vec<T> log_det, int64_t features) {
  return log_det + fma(square, set1(T(-0.5)), set1(-kHalfLogTwoPi<T> * static_cast<T>(features)));
}

/// cos(2 pi v) and sin(2 pi v), v = quarter / 4 + f / 4, |f| <= 1/2.
template <class T>
struct Turn {
  Vec<T> cosine, sine;
};

template <class T>
NVPFLOW_INLINE Turn<T> turn(Vec<T> quarters) {
  const Vec<T> magic = set1(Simd<T>::kRoundMagic);
  const Vec<T> shifted = quarters + magic;
  const Vec<T> f = quarters - (shifted - magic);
  const IntVec<T> quadrant = (IntVec<T>)shifted & 3;
  const Vec<T> s = sin_quarter<T>(f), c = cos_quarter<T>(f);
  const IntVec<T> odd = (quadrant & 1) != 0;
  const Vec<T> cos_magnitude = odd ? s : c, sin_magnitude = odd ? c : s;
  const IntVec<T> cos_negative = (quadrant == 1) | (quadrant == 2), sin_negative = quadrant >= 2;
  return {cos_negative ? -cos_magnitude : cos_magnitude, sin_negative ? -sin_magnitude : sin_magnitude};
}

/// Box and Muller: r = sqrt(-2 log u), (r cos a, r sin a) with a = 2 pi v.
template <class T>
NVPFLOW_INLINE void box_muller(Vec<T> u, Vec<T> quarters, T* cosine, T* sine) {
  const Turn<T> angle = turn<T>(quarters);
  const Vec<T> radius = sqrt(log<T>(u) * T(-2));
  store<T>(cosine, radius * angle.cosine);
  store<T>(sine, radius * angle.sine);
}

/// u in (0, 1) and 4 v in [0, 4) of pair `pair` from the four words [4][kLanes].
NVPFLOW_INLINE void uniforms(const uint32_t* words, int pair, float* u, float* quarters) {
  for (int l = 0; l < kLanes<float>; ++l) {
    u[l] = (static_cast<float>(words[2 * pair * kLanes<float> + l]) + 0.5f) * 0x1p-32f;
    // 24 bits are kept exactly: rounding up to 4 would repeat the angle 0.
    quarters[l] = static_cast<float>(words[(2 * pair + 1) * kLanes<float> + l] >> 8) * 0x1p-22f;
  }
}

NVPFLOW_INLINE void uniforms(const uint32_t* words, int, double* u, double* quarters) {
  constexpr int L = kLanes<double>;
  for (int l = 0; l < L; ++l) {
    const uint64_t first = (static_cast<uint64_t>(words[L + l]) << 32 | words[l]) >> 12;
    const uint64_t second = (static_cast<uint64_t>(words[3 * L + l]) << 32 | words[2 * L + l]) >> 11;
    u[l] = (static_cast<double>(first) + 0.5) * 0x1p-52;
    quarters[l] = static_cast<double>(second) * 0x1p-51;
  }
}

template <class T>
struct NormalDensity {
  /// state [D][rows] holds z, feature j in row place(j); out [rows].
  template <class Place>
  static void log_prob_tile(const BaseDensity<T>&, const T* state, int64_t features, const T* log_det, T* out,
                            int64_t rows, Place place) {
    constexpr int L = kLanes<T>;
    for (int64_t r = 0; r < rows; r += L) {
      Vec<T> sums[L] = {};
      const auto z = [&](int64_t column)
                         __attribute__((always_inline)) { return load<T>(state + place(column) * rows + r); };
      int64_t j = 0;
      for (; j + L <= features; j += L) {
#pragma GCC unroll 16
        for (int l = 0; l < L; ++l) sums[l] = fma(z(j + l), z(j + l), sums[l]);
      }
#pragma GCC unroll 16
      for (int l = 0; l < L; ++l) {
        if (j + l < features) sums[l] = fma(z(j + l), z(j + l), sums[l]);
      }
      store<T>(out + r, log_prob_from<T>(sum_partials<T>(sums), load<T>(log_det + r), features));
    }
  }

  static NVPFLOW_INLINE T log_prob_row(const BaseDensity<T>&, const T* z, int64_t features, T log_det) {
    Vec<T> square = {};
    for (int64_t j = 0; j < features; j += kLanes<T>) {
      const Vec<T> v = load_upto<T>(z + j, features - j);
      square = fma(v, v, square);
    }
    return log_prob_from<T>(set1(sum_lanes<T>(square)), set1(log_det), features)[0];
  }

  static TapeSize tape(const BaseDensity<T>&, int64_t) { return {}; }

  /// -z times the cotangent of log p.
  static void backward(const BaseDensity<T>&, const BaseTile<T>& tile) {
    const int64_t rows = tile.rows;
    for (int64_t j = 0; j < tile.features; ++j) {
      for (int64_t r = 0; r < rows; r += kLanes<T>) {
        store<T>(tile.cotangent + j * rows + r,
                 -load<T>(tile.state + j * rows + r) * load<T>(tile.log_prob_cotangent + r));
      }
    }
  }

  static PartSize part(const BaseDensity<T>&, int64_t) { return {}; }
  static void weight_gradient(const BaseDensity<T>&, int64_t, int64_t, int64_t, const TileTapes<T>&, T*, bool) {}

  /// state [D][rows] = normals of rows row .. row + rows of `seed`; column c comes from block c / N of its row, where N
  /// is 4 for float and 2 for double: the numbers of a row depend only on seed, row and column. Column c goes to row
  /// place(c).
  template <class Place>
  static void noise_tile(const BaseDensity<T>&, uint64_t seed, uint64_t row, int64_t features, T* state, int64_t rows,
                         Place place) {
    constexpr int L = kLanes<T>;
    constexpr int kPairs = sizeof(T) == 4 ? 2 : 1;
    for (int64_t r = 0; r < rows; r += L) {
      for (int64_t j = 0; j < features; j += 2 * kPairs) {
        uint32_t words[4 * L];
        philox_lanes<L>(seed, row + static_cast<uint64_t>(r), static_cast<uint32_t>(j / (2 * kPairs)), words);
        for (int pair = 0; pair < kPairs; ++pair) {
          T u[L], quarters[L], normals[2][L];
          uniforms(words, pair, u, quarters);
          box_muller<T>(load<T>(u), load<T>(quarters), normals[0], normals[1]);
          for (int side = 0; side < 2; ++side) {
            const int64_t column = j + 2 * pair + side;
            if (column < features) store<T>(state + place(column) * rows + r, load<T>(normals[side]));
          }
        }
      }
    }
  }
};

}  // namespace
}  // namespace nvpflow::cpu

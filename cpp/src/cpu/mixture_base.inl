// KERNEL: the base that is a mixture of normal distributions, and noise of it from counters.
//
// A component's density comes from e = F^-1 (z - mean): D multiply-adds a row, or D (D + 1) / 2 of a full covariance.
// Components are added up in order, by the largest so far, with one exponential each.
#pragma once

#include <stdint.h>

#include "base_tile.inl"
#include "blocks.hpp"
#include "elementary.hpp"
#include "kernels.hpp"
#include "normal_base.inl"
#include "philox.inl"
#include "poison.inl"
#include "scratch.hpp"
#include "simd.hpp"
#include "student_base.inl"
#include "tile.inl"
#include "uniform_base.inl"

namespace nvpflow::cpu {
namespace {

/// log of the sum of e^a of the numbers added so far.
template <class T>
struct LogSum {
  Vec<T> most = set1(-kLargest<T>), sum = {};

  NVPFLOW_INLINE void add(Vec<T> a) {
    const Vec<T> scale = exp<T>(-absolute<T>(a - most));
    const IntVec<T> larger = a > most;
    sum = larger ? fma(sum, scale, set1(T(1))) : sum + scale;
    most = larger ? a : most;
  }

  /// -inf where no number was more, or where one got lost as inf - inf.
  NVPFLOW_INLINE Vec<T> value() const {
    const IntVec<T> known = (most > -kLargest<T>)&(sum == sum);
    return known ? most + log<T>(sum) : set1(-kInfinity<T>);
  }
};

/// The numbers of one component.
template <class T>
struct Component {
  const T *mean, *factor, *inverse;
  T log_peak;
  bool full;

  NVPFLOW_INLINE Component(const BaseDensity<T>& base, int64_t features, int64_t m)
      : mean(base.means + m * features),
        factor(base.factors + m * mixture_factor_size(features, base.full)),
        inverse(base.inverses + m * mixture_factor_size(features, base.full)),
        log_peak(base.log_peaks[m]),
        full(base.full) {}

  /// Where row i of a lower triangle begins.
  static NVPFLOW_INLINE int64_t row(int64_t i) { return i * (i + 1) / 2; }

  /// Element i of e. z(j): latent j.
  template <class Z>
  NVPFLOW_INLINE Vec<T> whitened(int64_t i, Z z) const {
    if (!full) return (z(i) - mean[i]) * inverse[i];
    const T* of_row = inverse + row(i);
    Vec<T> sum = {};
    for (int64_t j = 0; j <= i; ++j) sum = fma(z(j) - mean[j], set1(of_row[j]), sum);
    return sum;
  }

  /// Log of the weighted density; keep(i, e_i).
  template <class Z, class Keep>
  NVPFLOW_INLINE Vec<T> log_density(int64_t features, Z z, Keep keep) const {
    Vec<T> square = {};
    for (int64_t i = 0; i < features; ++i) {
      const Vec<T> e = whitened(i, z);
      keep(i, e);
      square = fma(e, e, square);
    }
    return fma(square, set1(T(-0.5)), set1(log_peak));
  }

  /// Element j of F^-T e, which is minus the gradient of log N by z. e(i): element i.
  template <class E>
  NVPFLOW_INLINE Vec<T> pulled_back(int64_t j, int64_t features, E e) const {
    if (!full) return e(j) * inverse[j];
    Vec<T> sum = {};
    for (int64_t i = j; i < features; ++i) sum = fma(e(i), set1(inverse[row(i) + j]), sum);
    return sum;
  }
};

/// Of each row: responsibility times the cotangent of log p, [M]; the same less what the weights alone are responsible
/// for, [M]; e and F^-T e, [M D] each.
template <class T>
struct MixtureTape {
  T *shares, *excess, *whitened, *pulled;

  static NVPFLOW_INLINE int64_t size(const BaseDensity<T>& base, int64_t features) {
    return base.components * (2 + 2 * features);
  }
  NVPFLOW_INLINE MixtureTape(const BaseDensity<T>& base, int64_t features, T* tape, int64_t rows)
      : shares(tape),
        excess(shares + base.components * rows),
        whitened(excess + base.components * rows),
        pulled(whitened + base.components * features * rows) {}
};

template <class T>
struct MixtureDensity {
  /// z(j): latent j of some rows, the same for all paths.
  template <class Z>
  static NVPFLOW_INLINE Vec<T> log_density(const BaseDensity<T>& base, int64_t features, Z z) {
    LogSum<T> sum;
    for (int64_t m = 0; m < base.components; ++m) {
      sum.add(
          Component<T>(base, features, m).log_density(features, z, [](int64_t, Vec<T>) __attribute__((always_inline)) {
          }));
    }
    const Vec<T> first = z(0);
    return first == first ? sum.value() : first;  // a row of NaN has the density NaN
  }

  /// As NormalDensity.
  template <class Place>
  static void log_prob_tile(const BaseDensity<T>& base, const T* state, int64_t features, const T* log_det, T* out,
                            int64_t rows, Place place) {
    for (int64_t r = 0; r < rows; r += kLanes<T>) {
      const auto z = [&](int64_t j) __attribute__((always_inline)) { return load<T>(state + place(j) * rows + r); };
      store<T>(out + r, load<T>(log_det + r) + log_density(base, features, z));
    }
  }

  static NVPFLOW_NOINLINE T log_prob_row(const BaseDensity<T>& base, const T* z, int64_t features, T log_det) {
    const auto same = [&](int64_t j) __attribute__((always_inline)) { return set1(z[j]); };
    return log_det + log_density(base, features, same)[0];
  }

  static TapeSize tape(const BaseDensity<T>& base, int64_t features) {
    return {MixtureTape<T>::size(base, features), 0};
  }

  static void backward(const BaseDensity<T>& base, const BaseTile<T>& tile) {
    const MixtureTape<T> keep(base, tile.features, tile.tape, tile.rows);
    for (int64_t r = 0; r < tile.rows; r += kLanes<T>) backward_of_rows(base, tile, keep, r);
  }

  /// Components [first, last).
  static PartSize part(const BaseDensity<T>& base, int64_t features) {
    return {base.components, mixture_factor_size(features, base.full)};
  }
  static void weight_gradient(const BaseDensity<T>& base, int64_t features, int64_t first, int64_t last,
                              const TileTapes<T>& tapes, T* gradient, bool add) {
    for (int64_t m = first; m < last; ++m) component_gradient(base, features, m, tapes, gradient, add);
  }

  /// Component by a number of a stream of its own, then mean + F e with the normals of NormalDensity.
  template <class Place>
  static void noise_tile(const BaseDensity<T>& base, uint64_t seed, uint64_t row, int64_t features, T* state,
                         int64_t rows, Place place) {
    constexpr int L = kLanes<T>;
    NormalDensity<T>::noise_tile(base, seed, row, features, state, rows, place);
    for (int64_t r = 0; r < rows; r += L) {
      uint32_t words[4 * L];
      philox_lanes<L>(seed, row + static_cast<uint64_t>(r), 0, words, kComponentStream);
      T u[L];
      uniform_numbers(words, 0, u);
      for (int l = 0; l < L; ++l) {
        const Component<T> component(base, features, chosen(base, u[l]));
        place_row(component, features, state + r + l, rows, place);
      }
    }
  }

 private:
  /// The component whose share of [0, 1] holds u.
  static NVPFLOW_INLINE int64_t chosen(const BaseDensity<T>& base, T u) {
    int64_t m = 0;
    while (m + 1 < base.components && !(u < base.cumulated[m])) ++m;
    return m;
  }

  /// e to mean + F e, in place, of one row; its numbers are `rows` apart. From the last feature on: each reads those
  /// before it.
  template <class Place>
  static NVPFLOW_INLINE void place_row(const Component<T>& of, int64_t features, T* e, int64_t rows, Place place) {
    for (int64_t i = features - 1; i >= 0; --i) {
      T sum = of.mean[i];
      if (of.full) {
        for (int64_t j = 0; j <= i; ++j) sum += of.factor[of.row(i) + j] * e[place(j) * rows];
      } else {
        sum += of.factor[i] * e[place(i) * rows];
      }
      e[place(i) * rows] = sum;
    }
  }

  static NVPFLOW_NOINLINE void backward_of_rows(const BaseDensity<T>& base, const BaseTile<T>& tile,
                                                const MixtureTape<T>& keep, int64_t r) {
    const int64_t features = tile.features, rows = tile.rows;
    const auto z = [&](int64_t j) __attribute__((always_inline)) {
      return load<T>(tile.state + place_of(tile.place, j) * rows + r);
    };
    LogSum<T> sum;
    for (int64_t m = 0; m < base.components; ++m) {
      T* e = keep.whitened + m * features * rows + r;
      const Vec<T> a = Component<T>(base, features, m)
                           .log_density(features, z, [&](int64_t i, Vec<T> v) __attribute__((always_inline)) {
                             store<T>(e + i * rows, v);
                           });
      store<T>(keep.shares + m * rows + r, a);
      sum.add(a);
    }
    const Vec<T> density = sum.value(), g = load<T>(tile.log_prob_cotangent + r);
    for (int64_t j = 0; j < features; ++j) store<T>(tile.cotangent + j * rows + r, Vec<T>{});
    for (int64_t m = 0; m < base.components; ++m) {
      T* share = keep.shares + m * rows + r;
      const Vec<T> p = exp<T>(load<T>(share) - density) * g;
      store<T>(share, p);
      store<T>(keep.excess + m * rows + r, p - g * base.weights[m]);
      const T* e = keep.whitened + m * features * rows + r;
      T* v = keep.pulled + m * features * rows + r;
      const Component<T> component(base, features, m);
      for (int64_t j = 0; j < features; ++j) {
        const Vec<T> pulled = component.pulled_back(
            j, features, [&](int64_t i) __attribute__((always_inline)) { return load<T>(e + i * rows); });
        store<T>(v + j * rows, pulled);
        T* cotangent = tile.cotangent + place_of(tile.place, j) * rows + r;
        store<T>(cotangent, fma(-p, pulled, load<T>(cotangent)));
      }
    }
  }

  /// The sum of f(tape of a tile, row on it, rows that count) over all rows: by units, so that threads do not matter.
  template <class F>
  static NVPFLOW_INLINE T sum_of_rows(const BaseDensity<T>& base, int64_t features, const TileTapes<T>& tapes, F f) {
    T total = 0;
    for (int64_t unit = 0; unit < tapes.count; unit += kGradientUnit) {
      T* tape = const_cast<T*>(tapes.first) + unit / tapes.rows * tapes.stride;
      const MixtureTape<T> keep(base, features, tape, tapes.rows);
      const int64_t count = smaller(kGradientUnit, tapes.count - unit);
      Vec<T> sum = {};
      for (int64_t r = 0; r < count; r += kLanes<T>) sum = sum + f(keep, unit % tapes.rows + r, count - r);
      total += sum_lanes<T>(sum);
    }
    return total;
  }

  static NVPFLOW_NOINLINE void component_gradient(const BaseDensity<T>& base, int64_t features, int64_t m,
                                                  const TileTapes<T>& tapes, T* gradient, bool add) {
    const int64_t rows = tapes.rows;
    const auto put = [&](int64_t at, T sum) { gradient[at] = add ? gradient[at] + sum : sum; };
    const auto share = [=](const MixtureTape<T>& keep, int64_t r, int64_t n)
                           __attribute__((always_inline)) { return load_upto<T>(keep.shares + m * rows + r, n); };
    const auto element = [=](const T* of, int64_t j, int64_t r, int64_t n) __attribute__((always_inline)) {
      return load_upto<T>(of + (m * features + j) * rows + r, n);
    };
    put(base.offset + m, sum_of_rows(base, features, tapes, [=](const MixtureTape<T>& keep, int64_t r, int64_t n) {
          return load_upto<T>(keep.excess + m * rows + r, n);
        }));
    for (int64_t j = 0; j < features; ++j) {
      const auto of_mean = [=](const MixtureTape<T>& keep, int64_t r, int64_t n) {
        return share(keep, r, n) * element(keep.pulled, j, r, n);
      };
      const auto of_log_scale = [=](const MixtureTape<T>& keep, int64_t r, int64_t n) {
        const Vec<T> e = element(keep.whitened, j, r, n);
        return share(keep, r, n) * fma(e, e, set1(T(-1)));
      };
      put(base.means_offset + m * features + j, sum_of_rows(base, features, tapes, of_mean));
      put(base.log_scales_offset + m * features + j, sum_of_rows(base, features, tapes, of_log_scale));
    }
    if (!base.full) return;
    const Component<T> component(base, features, m);
    int64_t at = base.lower_offset + m * (features * (features - 1) / 2);
    for (int64_t i = 0; i < features; ++i) {
      for (int64_t j = 0; j < i; ++j) {
        const T scale = component.factor[component.row(j) + j];
        const auto of_lower = [=](const MixtureTape<T>& keep, int64_t r, int64_t n) {
          return share(keep, r, n) * element(keep.pulled, i, r, n) * element(keep.whitened, j, r, n);
        };
        put(at++, sum_of_rows(base, features, tapes, of_lower) * scale);
      }
    }
  }
};

}  // namespace
}  // namespace nvpflow::cpu

// KERNEL PART: the base densities and their noise from counters. Uniform numbers are the CPU's to the bit, where that
// has fused multiply-adds, normal ones to 2 ulp (cpp/src/cpu/base.inl).
#pragma once

#include "../cpp/src/random.hpp"
#include "elementary.cuh"

namespace nvpflow::cuda {

template <class T>
NVPFLOW_DEVICE bool is_outside(const BaseDensity<T>& base, T z) {
  return z < base.low || z > base.high;
}

// ---- density: log p of a row comes from its log_det and from one sum over its features ------------------------------

/// What latent z adds to the sum. is_feature: else it is padding, which is zero.
template <class T>
NVPFLOW_DEVICE T add_latent(OfBase<BaseKind::normal>, const BaseDensity<T>&, T sum, T z, bool) {
  return multiply_add(z, z, sum);
}
/// 0 for all inside, NaN with NaN.
template <class T>
NVPFLOW_DEVICE T add_latent(OfBase<BaseKind::uniform>, const BaseDensity<T>& base, T sum, T z, bool is_feature) {
  return !is_feature ? sum : is_outside(base, z) ? sum + 1 : z == z ? sum : z;
}

template <class T>
NVPFLOW_DEVICE T log_prob_from(OfBase<BaseKind::normal>, const BaseDensity<T>&, T sum, T log_det, int features) {
  return log_det + multiply_add(sum, T(-0.5), static_cast<T>(-0.91893853320467274178) * static_cast<T>(features));
}
template <class T>
NVPFLOW_DEVICE T log_prob_from(OfBase<BaseKind::uniform>, const BaseDensity<T>& base, T sum, T log_det, int) {
  return sum > 0 ? -infinity<T>() : sum + (log_det + base.log_density);
}

/// What a walk that ends in data takes off log p for the latents that it begins with, from their sum: all of it but
/// for a constant, which log_prob_from adds.
template <class T>
NVPFLOW_DEVICE T latent_cost(OfBase<BaseKind::normal>, T sum) {
  return T(0.5) * sum;
}
template <class T>
NVPFLOW_DEVICE T latent_cost(OfBase<BaseKind::uniform>, T sum) {
  return sum > 0 ? infinity<T>() : sum;
}

/// The cotangent of z from that of log p.
template <class T>
NVPFLOW_DEVICE T latent_cotangent(OfBase<BaseKind::normal>, T z, T g) {
  return -z * g;
}
template <class T>
NVPFLOW_DEVICE T latent_cotangent(OfBase<BaseKind::uniform>, T, T) {
  return T(0);
}

// ---- bases with parameters: a row's sum over its latents is what log p lacks of its constant

/// What density and gradient need of a latent of a student_t base (cpp/src/cpu/student_base.inl).
template <class T>
struct StudentPoint {
  T log_term;  // log(1 + t^2), t = |z| / sqrt(nu)
  T slope;     // t / (1 + t^2)
  T share;     // t^2 / (1 + t^2)
};

template <class T>
NVPFLOW_DEVICE StudentPoint<T> student_point(T z, T inverse_root) {
  const T t = absolute(z) * inverse_root, inverse = T(1) / t;
  const bool far = t > T(1);
  const T m = far ? inverse : t, square = m * m;
  const T bounded = at_most(t, Real<T>::kLargest);
  const T log_far = logarithm(at_least(bounded, T(1))) + (t - bounded);  // infinite where t is
  const T rest = T(1) / (square + T(1));
  return {multiply_add(log_far, T(2), log1p_unit(square)), m * rest, far ? rest : square * rest};
}

template <class T>
NVPFLOW_DEVICE T student_number(const BaseDensity<T>& base, StudentNumber which, std::int64_t f) {
  return base.student[which * base.stride + f];
}

/// log of the sum of e^a of the numbers added so far; -inf where one got lost.
template <class T>
struct LogSum {
  T most = -Real<T>::kLargest, sum = 0;

  NVPFLOW_DEVICE void add(T a) {
    const T scale = exponential(-absolute(a - most));
    const bool larger = a > most;
    sum = larger ? multiply_add(sum, scale, T(1)) : sum + scale;
    most = larger ? a : most;
  }
  NVPFLOW_DEVICE T value() const {
    return most > -Real<T>::kLargest && sum == sum ? most + logarithm(sum) : -infinity<T>();
  }
};

/// The numbers of one component of a mixture (cpp/src/cpu/mixture_base.inl).
template <class T>
struct Component {
  const T *mean, *factor, *inverse;
  T log_peak;
  int features;
  bool full;

  NVPFLOW_DEVICE Component(const BaseDensity<T>& base, int f, std::int64_t m)
      : mean(base.means + m * f),
        factor(base.factors + m * mixture_factor_size(f, base.full)),
        inverse(base.inverses + m * mixture_factor_size(f, base.full)),
        log_peak(base.log_peaks[m]),
        features(f),
        full(base.full) {}

  static NVPFLOW_DEVICE std::int64_t row(std::int64_t i) { return i * (i + 1) / 2; }

  /// Log of the weighted density; z(j): latent j; keep(i, e_i) of e = F^-1 (z - mean).
  template <class Z, class Keep>
  NVPFLOW_DEVICE T log_density(Z z, Keep keep) const {
    T square = 0;
    for (int i = 0; i < features; ++i) {
      T e = 0;
      if (full) {
        for (int j = 0; j <= i; ++j) e = multiply_add(z(j) - mean[j], inverse[row(i) + j], e);
      } else {
        e = (z(i) - mean[i]) * inverse[i];
      }
      keep(i, e);
      square = multiply_add(e, e, square);
    }
    return multiply_add(square, T(-0.5), log_peak);
  }

  /// Element j of F^-T e; e(i): element i.
  template <class E>
  NVPFLOW_DEVICE T pulled_back(int j, E e) const {
    if (!full) return e(j) * inverse[j];
    T sum = 0;
    for (int i = j; i < features; ++i) sum = multiply_add(e(i), inverse[row(i) + j], sum);
    return sum;
  }
};

/// Of a row the part of its sum that latents first, first + step, ... give.
template <class T, class Z>
NVPFLOW_DEVICE T row_sum(OfBase<BaseKind::student_t>, const BaseDensity<T>& base, int features, Z z, int first,
                         int step) {
  T sum = 0;
  for (int f = first; f < features; f += step) {
    const StudentPoint<T> point = student_point(z(f), student_number(base, kInverseRoot, f));
    sum = multiply_add(point.log_term, student_number(base, kPower, f), sum);
  }
  return sum;
}
/// The first one gives all.
template <class T, class Z>
NVPFLOW_DEVICE T row_sum(OfBase<BaseKind::mixture>, const BaseDensity<T>& base, int features, Z z, int first, int) {
  if (first != 0) return T(0);
  LogSum<T> sum;
  for (std::int64_t m = 0; m < base.components; ++m) {
    sum.add(Component<T>(base, features, m).log_density(z, [](int, T) {}));
  }
  return -sum.value();
}

template <class T>
NVPFLOW_DEVICE T log_prob_from(OfBase<BaseKind::student_t>, const BaseDensity<T>& base, T sum, T log_det, int) {
  return log_det + (base.student[kStudentNumbers * base.stride] - sum);
}
template <class T>
NVPFLOW_DEVICE T log_prob_from(OfBase<BaseKind::mixture>, const BaseDensity<T>&, T sum, T log_det, int) {
  return log_det - sum;
}
template <BaseKind kind, class T>
NVPFLOW_DEVICE T latent_cost(OfBase<kind>, T sum) {
  return sum;
}

// ---- noise ----------------------------------------------------------------------------------------------------------

/// Columns that one Philox call gives.
template <class T>
inline constexpr int kNoiseColumns = sizeof(T) == 4 ? 4 : 2;

/// Philox 4x32-10 of counter {row, block, stream}; the text for the host is in cpp/src/random.hpp.
NVPFLOW_DEVICE void philox(std::uint64_t key, std::uint64_t row, unsigned block, unsigned (&out)[4],
                           unsigned stream = 0) {
  unsigned c0 = static_cast<unsigned>(row), c1 = static_cast<unsigned>(row >> 32), c2 = block, c3 = stream;
  unsigned k0 = static_cast<unsigned>(key), k1 = static_cast<unsigned>(key >> 32);
  NVPFLOW_UNROLL
  for (int round = 0; round < 10; ++round) {
    const unsigned long long product0 = 0xD2511F53ull * c0, product1 = 0xCD9E8D57ull * c2;
    c0 = static_cast<unsigned>(product1 >> 32) ^ c1 ^ k0;
    c2 = static_cast<unsigned>(product0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<unsigned>(product1);
    c3 = static_cast<unsigned>(product0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  out[0] = c0, out[1] = c1, out[2] = c2, out[3] = c3;
}

/// cos a and sin a, a = 2 pi v, v = quarter / 4 + f / 4, |f| <= 1/2.
template <class T>
NVPFLOW_DEVICE void turn(T quarters, T& cosine, T& sine) {
  const T magic = Real<T>::kRoundMagic;
  const T shifted = quarters + magic;
  const T f = quarters - (shifted - magic);
  const int quadrant = static_cast<int>(to_bits(shifted) & 3);
  const T s = sin_quarter(f), c = cos_quarter(f);
  const T cos_magnitude = quadrant % 2 != 0 ? s : c, sin_magnitude = quadrant % 2 != 0 ? c : s;
  cosine = quadrant == 1 || quadrant == 2 ? -cos_magnitude : cos_magnitude;
  sine = quadrant >= 2 ? -sin_magnitude : sin_magnitude;
}

/// Box and Muller (1958): r = sqrt(-2 log u), (r cos a, r sin a).
template <class T>
NVPFLOW_DEVICE void box_muller(T u, T quarters, T& cosine, T& sine) {
  turn(quarters, cosine, sine);
  const T radius = square_root(logarithm(u) * T(-2));
  cosine = radius * cosine;
  sine = radius * sine;
}

/// u in (0, 1) and 4 v in [0, 4) of pair `pair` of four words.
NVPFLOW_DEVICE void uniforms(const unsigned (&words)[4], int pair, float& u, float& quarters) {
  u = (static_cast<float>(words[2 * pair]) + 0.5f) * 0x1p-32f;
  // 24 bits are kept exactly: rounding up to 4 would repeat the angle 0.
  quarters = static_cast<float>(words[2 * pair + 1] >> 8) * 0x1p-22f;
}
NVPFLOW_DEVICE void uniforms(const unsigned (&words)[4], int, double& u, double& quarters) {
  const unsigned long long first = (static_cast<unsigned long long>(words[1]) << 32 | words[0]) >> 12;
  const unsigned long long second = (static_cast<unsigned long long>(words[3]) << 32 | words[2]) >> 11;
  u = (static_cast<double>(first) + 0.5) * 0x1p-52;
  quarters = static_cast<double>(second) * 0x1p-51;
}

/// u in (0, 1) of the first column of a block of uniform numbers.
NVPFLOW_DEVICE float uniform_number(const unsigned (&words)[4], float) {
  return (static_cast<float>(words[0] >> 9) + 0.5f) * 0x1p-23f;
}
NVPFLOW_DEVICE double uniform_number(const unsigned (&words)[4], double) {
  const unsigned long long word = static_cast<unsigned long long>(words[1]) << 32 | words[0];
  return (static_cast<double>(word >> 12) + 0.5) * 0x1p-52;
}

/// Columns block * n .. + n of one row.
template <class T>
NVPFLOW_DEVICE void noise_block(OfBase<BaseKind::normal>, const BaseDensity<T>&, std::uint64_t seed, std::uint64_t row,
                                unsigned block, T (&normals)[kNoiseColumns<T>]) {
  unsigned words[4];
  philox(seed, row, block, words);
  NVPFLOW_UNROLL
  for (int pair = 0; pair < kNoiseColumns<T> / 2; ++pair) {
    T u, quarters;
    uniforms(words, pair, u, quarters);
    box_muller(u, quarters, normals[2 * pair], normals[2 * pair + 1]);
  }
}

/// Bailey's polar form, a number from each pair of words (cpp/src/cpu/student_base.inl).
template <class T>
NVPFLOW_DEVICE void noise_block(OfBase<BaseKind::student_t>, const BaseDensity<T>& base, std::uint64_t seed,
                                std::uint64_t row, unsigned block, T (&numbers)[kNoiseColumns<T>]) {
  constexpr int kPairs = kNoiseColumns<T> / 2;
  NVPFLOW_UNROLL
  for (int i = 0; i < kNoiseColumns<T>; ++i) {
    unsigned words[4];
    philox(seed, row, static_cast<unsigned>(kNoiseColumns<T> / kPairs) * block + static_cast<unsigned>(i / kPairs),
           words);
    T u, quarters, cosine, sine;
    uniforms(words, i % kPairs, u, quarters);
    turn(quarters, cosine, sine);
    const std::int64_t f = std::int64_t{block} * kNoiseColumns<T> + i;
    const T half = logarithm(u) * T(-0.5) * student_number(base, kInverseHalf, f);
    numbers[i] =
        exponential(half) * square_root(-expm1_bounded(half * T(-2))) * cosine * student_number(base, kRoot, f);
  }
}

/// A row of a mixture, at(f): where its latent f goes. The component by a number of a stream of its own, then the mean
/// + F e, from the last latent on, for each reads the normals before it.
template <class T, class At>
NVPFLOW_DEVICE void mixture_noise(const BaseDensity<T>& base, std::uint64_t seed, std::uint64_t row, int features,
                                  At at) {
  for (int first = 0; first < features; first += kNoiseColumns<T>) {
    T normals[kNoiseColumns<T>];
    noise_block(OfBase<BaseKind::normal>(), base, seed, row, static_cast<unsigned>(first / kNoiseColumns<T>), normals);
    NVPFLOW_UNROLL
    for (int i = 0; i < kNoiseColumns<T>; ++i) {
      if (first + i < features) at(first + i) = normals[i];
    }
  }
  unsigned words[4];
  philox(seed, row, 0, words, kStreamComponent);
  const T u = uniform_number(words, T());
  std::int64_t m = 0;
  while (m + 1 < base.components && !(u < base.cumulated[m])) ++m;
  const Component<T> component(base, features, m);
  for (int i = features - 1; i >= 0; --i) {
    T sum = component.mean[i];
    if (component.full) {
      for (int j = 0; j <= i; ++j) sum += component.factor[component.row(i) + j] * at(j);
    } else {
      sum += component.factor[i] * at(i);
    }
    at(i) = sum;
  }
}

/// u in (0, 1) to the interval; rounding does not carry it past `high`.
template <class T>
NVPFLOW_DEVICE T uniform_from(const BaseDensity<T>& base, T u) {
  const T z = multiply_add(u, base.range, base.low);
  return z > base.high ? base.high : z;
}

NVPFLOW_DEVICE void noise_block(OfBase<BaseKind::uniform>, const BaseDensity<float>& base, std::uint64_t seed,
                                std::uint64_t row, unsigned block, float (&numbers)[4]) {
  unsigned words[4];
  philox(seed, row, block, words);
  NVPFLOW_UNROLL
  for (int i = 0; i < 4; ++i) {
    numbers[i] = uniform_from(base, (static_cast<float>(words[i] >> 9) + 0.5f) * 0x1p-23f);
  }
}

NVPFLOW_DEVICE void noise_block(OfBase<BaseKind::uniform>, const BaseDensity<double>& base, std::uint64_t seed,
                                std::uint64_t row, unsigned block, double (&numbers)[2]) {
  unsigned words[4];
  philox(seed, row, block, words);
  NVPFLOW_UNROLL
  for (int i = 0; i < 2; ++i) {
    const unsigned long long word = static_cast<unsigned long long>(words[2 * i + 1]) << 32 | words[2 * i];
    numbers[i] = uniform_from(base, (static_cast<double>(word >> 12) + 0.5) * 0x1p-52);
  }
}

}  // namespace nvpflow::cuda

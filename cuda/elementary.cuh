// KERNEL PART: elementary functions and activations.
//
// The formulas, coefficients and bounds of error are those of cpp/src/cpu/elementary.hpp. NaN goes through all of them.
#pragma once

#include "device.cuh"

namespace nvpflow::cuda {

template <class T>
struct Real;

template <>
struct Real<float> {
  using Int = int;
  using Bits = unsigned;
  static constexpr int kMantissaBits = 23;
  static constexpr Int kExponentBias = 127;
  static constexpr Int kRootHalf = 0x3f3504f3;
  static constexpr Bits kSign = 0x80000000u;
  static constexpr float kRoundMagic = 12582912.0f;
  static constexpr float kLn2High = 0x1.62e400p-1f, kLn2Low = 0x1.7f7d1cp-20f;
  static constexpr float kLargest = 3.402823466e38f, kExpLow = -110.0f, kExpHigh = 89.5f, kExpm1Low = -26.0f,
                         kTanhHigh = 10.0f;
  static constexpr float kTailHigh = 14.5f;
  static constexpr float kQuarterPiRest = -0x1.de12cap-26f;
  static constexpr float kHalfPiLow = -0x1.777a5cp-25f;
};

template <>
struct Real<double> {
  using Int = long long;
  using Bits = unsigned long long;
  static constexpr int kMantissaBits = 52;
  static constexpr Int kExponentBias = 1023;
  static constexpr Int kRootHalf = 0x3fe6a09e667f3bcdll;
  static constexpr Bits kSign = 0x8000000000000000ull;
  static constexpr double kRoundMagic = 6755399441055744.0;
  static constexpr double kLn2High = 0x1.62e42fee00000p-1, kLn2Low = 0x1.a39ef35793c76p-33;
  static constexpr double kLargest = 1.7976931348623157e308, kExpLow = -755.0, kExpHigh = 710.5, kExpm1Low = -46.0,
                          kTanhHigh = 20.0;
  static constexpr double kTailHigh = 39.0;
  static constexpr double kQuarterPiRest = 0x1.678afae35cdd1p-55;
  static constexpr double kHalfPiLow = 0x1.1a62633145c07p-54;
};

template <class T, int N>
NVPFLOW_DEVICE T polynomial(T x, const T (&c)[N]) {
  T sum = c[N - 1];
  NVPFLOW_UNROLL
  for (int i = N - 2; i >= 0; --i) sum = multiply_add(sum, x, c[i]);
  return sum;
}

enum class Series { expm1_tail, atanh_tail_wide, atanh_tail, atan_tail, sin_tail, cos_tail, mills };

/// One of the polynomials of coefficients.inl, which has to stand in a function: device code cannot read arrays of
/// the host's namespaces.
template <Series series>
NVPFLOW_DEVICE float evaluate(float x) {
#include "../cpp/src/elementary/coefficients.inl"
  (void)kExpm1TailD, (void)kAtanhTailWideD, (void)kAtanhTailD, (void)kAtanTailD, (void)kSinTailD, (void)kCosTailD,
      (void)kMillsD;
  if constexpr (series == Series::expm1_tail) return polynomial(x, kExpm1TailF);
  if constexpr (series == Series::atanh_tail_wide) return polynomial(x, kAtanhTailWideF);
  if constexpr (series == Series::atanh_tail) return polynomial(x, kAtanhTailF);
  if constexpr (series == Series::atan_tail) return polynomial(x, kAtanTailF);
  if constexpr (series == Series::sin_tail) return polynomial(x, kSinTailF);
  if constexpr (series == Series::cos_tail) return polynomial(x, kCosTailF);
  return polynomial(x, kMillsF);
}

template <Series series>
NVPFLOW_DEVICE double evaluate(double x) {
#include "../cpp/src/elementary/coefficients.inl"
  (void)kExpm1TailF, (void)kAtanhTailWideF, (void)kAtanhTailF, (void)kAtanTailF, (void)kSinTailF, (void)kCosTailF,
      (void)kMillsF;
  if constexpr (series == Series::expm1_tail) return polynomial(x, kExpm1TailD);
  if constexpr (series == Series::atanh_tail_wide) return polynomial(x, kAtanhTailWideD);
  if constexpr (series == Series::atanh_tail) return polynomial(x, kAtanhTailD);
  if constexpr (series == Series::atan_tail) return polynomial(x, kAtanTailD);
  if constexpr (series == Series::sin_tail) return polynomial(x, kSinTailD);
  if constexpr (series == Series::cos_tail) return polynomial(x, kCosTailD);
  return polynomial(x, kMillsD);
}

template <class T>
NVPFLOW_DEVICE T absolute(T x) {
  return from_bits(to_bits(x) & ~Real<T>::kSign);
}
template <class T>
NVPFLOW_DEVICE T copy_sign(T magnitude, T sign) {
  return from_bits((to_bits(magnitude) & ~Real<T>::kSign) | (to_bits(sign) & Real<T>::kSign));
}
template <class T>
NVPFLOW_DEVICE T at_most(T x, T high) {
  return x > high ? high : x;
}
template <class T>
NVPFLOW_DEVICE T at_least(T x, T low) {
  return x < low ? low : x;
}
template <class T>
NVPFLOW_DEVICE T not_a_number() {
  return from_bits(static_cast<typename Real<T>::Bits>(sizeof(T) == 4 ? 0x7fc00000ull : 0x7ff8000000000000ull));
}
template <class T>
NVPFLOW_DEVICE T infinity() {
  return from_bits(static_cast<typename Real<T>::Bits>(sizeof(T) == 4 ? 0x7f800000ull : 0x7ff0000000000000ull));
}

template <class T>
NVPFLOW_DEVICE bool is_finite(T x) {
  return x * T(0) == T(0);
}

/// 2^n for n in the range of normal numbers.
template <class T>
NVPFLOW_DEVICE T power_of_two(typename Real<T>::Int n) {
  return from_bits(static_cast<typename Real<T>::Bits>(n + Real<T>::kExponentBias) << Real<T>::kMantissaBits);
}

/// x 2^n in two steps, so that results near both ends of the range neither overflow early nor round twice.
template <class T>
NVPFLOW_DEVICE T scaled(T x, typename Real<T>::Int n) {
  const typename Real<T>::Int half = n >> 1;
  return x * power_of_two<T>(half) * power_of_two<T>(n - half);
}

/// A number in two parts: the rounded value, and what rounding took from it.
template <class T>
struct Two {
  T high, low;
};

/// a b + c for |a b| <= |c| / 2: c - high is exact (Sterbenz 1974).
template <class T>
NVPFLOW_DEVICE Two<T> two_multiply_add(T a, T b, T c) {
  const T high = multiply_add(a, b, c);
  return {high, multiply_add(a, b, c - high)};
}

/// a / b rounded about once (Dekker 1971).
template <class T>
NVPFLOW_DEVICE T quotient(Two<T> a, Two<T> b) {
  const T inverse = T(1) / b.high;
  const T q = a.high * inverse;
  return multiply_add(multiply_add(-q, b.high, a.high) + multiply_add(-q, b.low, a.low), inverse, q);
}

/// e^x = 2^n (1 + p), |x - n ln 2| <= ln 2 / 2 (Cody and Waite 1980).
template <class T>
struct ExpParts {
  T p;
  typename Real<T>::Int n;
};

template <class T>
NVPFLOW_DEVICE ExpParts<T> exp_parts(T x) {
  using Int = typename Real<T>::Int;
  const T magic = Real<T>::kRoundMagic;
  const T shifted = multiply_add(x, static_cast<T>(1.4426950408889634074), magic);
  const T n = shifted - magic;
  const T high = multiply_add(n, -Real<T>::kLn2High, x);
  const T r = multiply_add(n, -Real<T>::kLn2Low, high);
  const T r_low = multiply_add(n, -Real<T>::kLn2Low, high - r);  // what rounding took from r
  const T p = r + multiply_add(r * r, evaluate<Series::expm1_tail>(r), r_low);
  return {p, static_cast<Int>(to_bits(shifted)) - static_cast<Int>(to_bits(magic))};
}

template <class T>
NVPFLOW_DEVICE T exponential(T x) {
  x = at_least(at_most(x, Real<T>::kExpHigh), Real<T>::kExpLow);
  const ExpParts<T> parts = exp_parts(x);
  // In two steps, so that results near both ends of the range neither overflow early nor round twice.
  const typename Real<T>::Int half = parts.n >> 1;
  const T scale = power_of_two<T>(half);
  return multiply_add(parts.p, scale, scale) * power_of_two<T>(parts.n - half);
}

/// e^x - 1 for x <= 0.
template <class T>
NVPFLOW_DEVICE T expm1_bounded(T x) {
  const ExpParts<T> parts = exp_parts(at_least(x, Real<T>::kExpm1Low));
  const T scale = power_of_two<T>(parts.n);
  return multiply_add(parts.p, scale, scale - T(1));
}

/// h / (1 + h) with h = (e^2|x| - 1) / 2, the quotient corrected by its remainder (why the weight: elementary.hpp).
template <class T>
NVPFLOW_DEVICE T hyperbolic_tangent(T x) {
  const ExpParts<T> parts = exp_parts(T(2) * at_most(absolute(x), Real<T>::kTanhHigh));
  const T half_scale = power_of_two<T>(parts.n - 1);
  const T h = multiply_add(parts.p, half_scale, half_scale - T(0.5));
  const T q = divide_inside(h, h + T(1));
  const T weight = T(1) - q;
  return copy_sign(multiply_add(multiply_add(-q, h, h - q), weight * weight, q), x);
}

/// 1 / (1 + e) for e in [0, 1] to an eighth: the chord.
template <class T>
NVPFLOW_DEVICE T near_inverse(T e) {
  return multiply_add(e, T(-0.5), T(1));
}

template <class T>
NVPFLOW_DEVICE T sigmoid(T x) {
  const T e = exponential(-absolute(x));
  const T numerator = x < T(0) ? e : T(1);
  const T q = numerator / (e + T(1));
  return multiply_add(multiply_add(-q, e, numerator - q), near_inverse(e), q);
}

/// x sigmoid(x) = max(x, 0) - |x| e / (1 + e), e = e^-|x| = 2^n (1 + p).
template <class T>
NVPFLOW_DEVICE T silu(T x) {
  const T magnitude = at_most(absolute(x), -Real<T>::kExpLow);
  const ExpParts<T> parts = exp_parts(-magnitude);
  const T e = scaled(parts.p + T(1), parts.n);
  const Two<T> numerator = two_multiply_add(magnitude, parts.p, magnitude);
  const T q = numerator.high / (e + T(1));
  const T rest = multiply_add(-q, e, numerator.high - q) + numerator.low;
  return (x < T(0) ? T(-0.0) : x) - scaled(multiply_add(rest, near_inverse(e), q), parts.n);
}

/// log(1 + e) for e in [0, 1], by 2 atanh s, s = e / (2 + e), with the remainder of the quotient.
template <class T>
NVPFLOW_DEVICE T log1p_unit(T e) {
  const T s = e / (e + T(2));
  const T w = s * s, twice = s + s;
  const T correction = multiply_add(-s, e, e - twice) * (T(1) - s);
  return twice + multiply_add(twice * w, evaluate<Series::atanh_tail_wide>(w), correction);
}

template <class T>
NVPFLOW_DEVICE T softplus(T x) {
  return (x > T(0) ? x : T(0)) + log1p_unit(exponential(-absolute(x)));
}

/// Upper tail of the standard normal in factors, Q(a) = (1/2 + mills) / (a + 5/4) e^(-a^2 / 2), a = |x|, with the
/// bell e^(-a^2 / 2) = 2^n (1 + p) (1 + low).
template <class T>
struct NormalTail {
  T a, mills;
  ExpParts<T> bell;
  T low;
};

template <class T>
NVPFLOW_DEVICE NormalTail<T> normal_tail(T x) {
  const T a = at_most(absolute(x), Real<T>::kTailHigh);
  const T h = a * a;
  const T y = (a - T(4)) / (a + T(4));
  return {a, evaluate<Series::mills>(y), exp_parts(h * T(-0.5)), multiply_add(a, a, -h) * T(-0.5)};
}

/// x Phi(x), the exact form (Hendrycks and Gimpel 2016): x or 0, less |x| Q(|x|).
template <class T>
NVPFLOW_DEVICE T gelu(T x) {
  const NormalTail<T> tail = normal_tail(x);
  const Two<T> m = two_multiply_add(tail.a, tail.mills, tail.a * T(0.5));
  const T m_low = multiply_add(m.high, tail.low, m.low);
  const Two<T> b = two_multiply_add(m.high, tail.bell.p, m.high);
  const Two<T> numerator = {b.high, multiply_add(m_low, tail.bell.p, m_low) + b.low};
  const T d = tail.a + T(1.25);
  const Two<T> denominator = {d, tail.a - (d - T(1.25))};
  return (x < T(0) ? T(-0.0) : x) - scaled(quotient(numerator, denominator), tail.bell.n);
}

template <class T>
NVPFLOW_DEVICE T gelu_derivative(T x) {
  const NormalTail<T> tail = normal_tail(x);
  const T bell = scaled(T(1) + (tail.bell.p + tail.low), tail.bell.n);
  const T q = bell * ((tail.mills + T(0.5)) / (tail.a + T(1.25)));
  const T cdf = x > T(0) ? T(1) - q : q;
  return multiply_add(x, bell * static_cast<T>(0.39894228040143267794), cdf);
}

template <class T>
NVPFLOW_DEVICE T silu_derivative(T x) {
  const T s = sigmoid(x);
  return multiply_add(x * s, T(1) - s, s);
}

template <class T>
NVPFLOW_DEVICE T elu(T x) {
  return x > T(0) ? x : expm1_bounded(at_most(x, T(0)));
}

/// log x for normal positive x.
template <class T>
NVPFLOW_DEVICE T logarithm(T x) {
  using Int = typename Real<T>::Int;
  using Bits = typename Real<T>::Bits;
  const Int bits = static_cast<Int>(to_bits(x));
  const Int exponent = (bits - Real<T>::kRootHalf) >> Real<T>::kMantissaBits;
  const T f = from_bits(static_cast<Bits>(bits) - (static_cast<Bits>(exponent) << Real<T>::kMantissaBits)) - T(1);
  const T n = static_cast<T>(exponent);
  const T s = f / (f + T(2));
  const T w = s * s;
  // 2 atanh s = f - s (f - 2 w tail): the leading term is exact.
  const T inner = multiply_add(w + w, evaluate<Series::atanh_tail>(w), -f);
  const T low = multiply_add(s, inner, n * Real<T>::kLn2Low);
  return multiply_add(n, Real<T>::kLn2High, f + low);
}

/// b + atan t with b = 0, pi / 4 or pi / 2 and |t| <= 1/2 (which t: elementary.hpp).
template <class T>
NVPFLOW_DEVICE T arctangent(T x) {
  const T quarter_pi = static_cast<T>(0.78539816339744830962), a = absolute(x);
  const bool low = a<T(0.5), high = a> T(2);
  const T t = (low ? a : high ? T(-1) : a - T(1)) / (low ? T(1) : high ? a : a + T(1));
  const T base = low ? T(0) : high ? 2 * quarter_pi : quarter_pi;
  const T w = t * t, sum = base + t;
  const T rest =
      (t - (sum - base)) + multiply_add(t * w, evaluate<Series::atan_tail>(w), base * Real<T>::kQuarterPiRest);
  return copy_sign(sum + rest, x);
}

/// sin(pi f / 2) and cos(pi f / 2) for |f| <= 1/2.
template <class T>
NVPFLOW_DEVICE T sin_quarter(T f) {
  const T w = f * f;
  const T low = f * multiply_add(w, evaluate<Series::sin_tail>(w), Real<T>::kHalfPiLow);
  return multiply_add(f, static_cast<T>(1.57079632679489661923), low);
}
template <class T>
NVPFLOW_DEVICE T cos_quarter(T f) {
  const T w = f * f;
  return multiply_add(w, evaluate<Series::cos_tail>(w), T(1));
}

template <class T>
NVPFLOW_DEVICE T activate(Act act, T x) {
  switch (act) {
    case Act::relu:
      return positive_part(x);
    case Act::leaky_relu:
      return x < T(0) ? x * T(0.01) : x;
    case Act::elu:
      return elu(x);
    case Act::gelu:
      return gelu(x);
    case Act::silu:
      return x * sigmoid(x);
    case Act::tanh:
      return hyperbolic_tangent(x);
    case Act::sigmoid:
      return sigmoid(x);
    case Act::softplus:
      return softplus(x);
    default:
      return x;
  }
}

/// Of the activation, from its value, or from its argument where that is kept (keeps_argument).
template <class T>
NVPFLOW_DEVICE T activation_derivative(Act act, T value, T argument) {
  switch (act) {
    case Act::relu:
      return value > T(0) ? T(1) : T(0);
    case Act::leaky_relu:
      return value > T(0) ? T(1) : T(0.01);
    case Act::elu:
      return value > T(0) ? T(1) : value + T(1);
    case Act::gelu:
      return gelu_derivative(argument);
    case Act::silu:
      return silu_derivative(argument);
    case Act::tanh:
      return multiply_add(-value, value, T(1));
    case Act::sigmoid:
      return value * (T(1) - value);
    case Act::softplus:
      return -expm1_bounded(-value);
    default:
      return T(1);
  }
}

}  // namespace nvpflow::cuda

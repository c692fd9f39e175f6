// The elementary functions on vectors. NaN goes through all of them: at_most and at_least keep it.
#pragma once

#include "simd.hpp"
#include "steps.hpp"

namespace nvpflow::cpu {
namespace {

#include "../elementary/coefficients.inl"
#if defined(__AVX512F__)
#include "../elementary/tables.inl"
#endif

template <class T>
NVPFLOW_INLINE Vec<T> absolute(Vec<T> x) {
  constexpr typename Simd<T>::Int kSign = typename Simd<T>::Int{1} << (8 * sizeof(T) - 1);
  return (Vec<T>)((IntVec<T>)x & ~kSign);
}

template <class T>
NVPFLOW_INLINE Vec<T> copy_sign(Vec<T> magnitude, Vec<T> sign) {
  constexpr typename Simd<T>::Int kSign = typename Simd<T>::Int{1} << (8 * sizeof(T) - 1);
  return (Vec<T>)(((IntVec<T>)magnitude & ~kSign) | ((IntVec<T>)sign & kSign));
}

template <class T, class V>
NVPFLOW_INLINE Pair<V> absolute(Pair<V> x) {
  return {absolute<T>(x.a), absolute<T>(x.b)};
}
template <class T, class V>
NVPFLOW_INLINE Pair<V> copy_sign(Pair<V> magnitude, Pair<V> sign) {
  return {copy_sign<T>(magnitude.a, sign.a), copy_sign<T>(magnitude.b, sign.b)};
}

/// Coefficients lowest first, by Horner's rule.
template <class V, class T, int N>
NVPFLOW_INLINE V polynomial(V x, const T (&c)[N]) {
  V sum = fma(x, set1(c[N - 1]), set1(c[N - 2]));
#pragma GCC unroll 32
  for (int i = N - 3; i >= 0; --i) sum = fma(sum, x, set1(c[i]));
  return sum;
}

#define NVPFLOW_COEFFICIENTS(T, name, x) (coefficients_##name(static_cast<T*>(nullptr), x))
#define NVPFLOW_DEFINE_COEFFICIENTS(name)                    \
  template <class V>                                         \
  NVPFLOW_INLINE V coefficients_##name(const float*, V x) {  \
    return polynomial(x, name##F);                           \
  }                                                          \
  template <class V>                                         \
  NVPFLOW_INLINE V coefficients_##name(const double*, V x) { \
    return polynomial(x, name##D);                           \
  }
NVPFLOW_DEFINE_COEFFICIENTS(kExpm1Tail)
NVPFLOW_DEFINE_COEFFICIENTS(kAtanhTailWide)
NVPFLOW_DEFINE_COEFFICIENTS(kAtanhTail)
NVPFLOW_DEFINE_COEFFICIENTS(kAtanTail)
NVPFLOW_DEFINE_COEFFICIENTS(kSinTail)
NVPFLOW_DEFINE_COEFFICIENTS(kCosTail)
NVPFLOW_DEFINE_COEFFICIENTS(kMills)
#undef NVPFLOW_DEFINE_COEFFICIENTS

/// a b - h exactly, where h is a b rounded (Dekker 1971 where there is no fused multiply-add).
template <class T>
NVPFLOW_INLINE Vec<T> product_error(Vec<T> a, Vec<T> b, Vec<T> h) {
  if constexpr (kHasFma) {
    return fma(a, b, -h);
  } else {
    const Vec<T> ca = a * Simd<T>::kSplit, cb = b * Simd<T>::kSplit;
    const Vec<T> ah = ca - (ca - a), bh = cb - (cb - b);
    const Vec<T> al = a - ah, bl = b - bh;
    return ((ah * bh - h) + ah * bl + al * bh) + al * bl;
  }
}

/// a b + c with about the error of one rounding also where there is no fused multiply-add: the parts of the noise, on
/// which every instruction set has to agree to 2 ulp.
template <class T>
NVPFLOW_INLINE Vec<T> accurate_fma(Vec<T> a, Vec<T> b, Vec<T> c) {
  if constexpr (kHasFma) {
    return fma(a, b, c);
  } else {
    const Vec<T> h = a * b;
    const Vec<T> sum = h + c;
    const Vec<T> t = sum - h;  // what the sum took of c (Knuth's two-sum)
    return sum + (((h - (sum - t)) + (c - t)) + product_error<T>(a, b, h));
  }
}

/// a b + c for a c that all but cancels the product: with little or no error, fused multiply-add or not.
template <class T>
NVPFLOW_INLINE Vec<T> residual(Vec<T> a, Vec<T> b, Vec<T> c) {
  if constexpr (kHasFma) {
    return fma(a, b, c);
  } else {
    const Vec<T> h = a * b;
    return (h + c) + product_error<T>(a, b, h);
  }
}

/// A number in two parts: the rounded value, and what rounding took from it.
template <class T>
struct Two {
  Vec<T> high, low;
};

/// a b + c for |a b| <= |c| / 2: c - high is exact (Sterbenz 1974).
template <class T>
NVPFLOW_INLINE Two<T> two_fma(Vec<T> a, Vec<T> b, Vec<T> c) {
  const Vec<T> high = fma(a, b, c);
  return {high, residual<T>(a, b, c - high)};
}

/// a / b rounded about once: the remainder a - q b of a first quotient, divided as well, goes into the last addition
/// (Dekker 1971).
template <class T>
NVPFLOW_INLINE Vec<T> quotient(Two<T> a, Two<T> b) {
  const Vec<T> inverse = T(1) / b.high;
  const Vec<T> q = a.high * inverse;
  const Vec<T> rest = residual<T>(-q, b.high, a.high) + fma(-q, b.low, a.low);
  return fma(rest, inverse, q);
}

template <class V>
struct IntegersOf;
template <>
struct IntegersOf<Vec<float>> {
  using Type = IntVec<float>;
};
template <>
struct IntegersOf<Vec<double>> {
  using Type = IntVec<double>;
};
template <class V>
struct IntegersOf<Pair<V>> {
  using Type = Pair<typename IntegersOf<V>::Type>;
};
template <class V>
using Integers = typename IntegersOf<V>::Type;

/// 2^n for n in the range of normal numbers.
template <class T>
NVPFLOW_INLINE Vec<T> power_of_two(IntVec<T> n) {
  return (Vec<T>)((n + Simd<T>::kExponentBias) << Simd<T>::kMantissaBits);
}
template <class T, class I>
NVPFLOW_INLINE auto power_of_two(Pair<I> n) {
  return Pair<decltype(power_of_two<T>(n.a))>{power_of_two<T>(n.a), power_of_two<T>(n.b)};
}

/// The integer in a number to which kRoundMagic has been added.
template <class T>
NVPFLOW_INLINE IntVec<T> integer_of(Vec<T> shifted) {
  return (IntVec<T>)shifted - (IntVec<T>)set1(Simd<T>::kRoundMagic);
}
template <class T, class V>
NVPFLOW_INLINE Pair<Integers<V>> integer_of(Pair<V> shifted) {
  return {integer_of<T>(shifted.a), integer_of<T>(shifted.b)};
}

/// x 2^n in two steps, so that results near both ends of the range neither overflow early nor round twice.
template <class T>
NVPFLOW_INLINE Vec<T> scaled(Vec<T> x, IntVec<T> n) {
  const IntVec<T> half = n >> 1;
  return x * power_of_two<T>(half) * power_of_two<T>(n - half);
}

/// e^x = 2^n (1 + p), |x - n ln 2| <= ln 2 / 2 (Cody and Waite 1980).
template <class V>
struct ExpParts {
  V p;
  Integers<V> n;
  V whole;  // n as a number of V's kind
};

template <class T, class V>
NVPFLOW_INLINE ExpParts<V> exp_parts(V x) {
  constexpr T kLog2E = static_cast<T>(1.4426950408889634074);
  const Vec<T> magic = set1(Simd<T>::kRoundMagic);
  const V shifted = fma(x, set1(kLog2E), magic);
  const V n = shifted - magic;
  const V high = fma(n, set1(-Simd<T>::kLn2High), x);
  const V r = fma(n, set1(-Simd<T>::kLn2Low), high);
  const V r_low = fma(n, set1(-Simd<T>::kLn2Low), high - r);  // what rounding took from r
  const V p = r + fma(r * r, NVPFLOW_COEFFICIENTS(T, kExpm1Tail, r), r_low);
  return {p, integer_of<T>(shifted), n};
}

/// 2^n (1 + p), rounded once where the result is a normal number.
#if defined(__AVX512F__)
NVPFLOW_INLINE Vec<float> exp_from(const ExpParts<Vec<float>>& e) {
  return _mm512_maskz_scalef_ps(0xffff, e.p + 1.0f, e.whole);
}
NVPFLOW_INLINE Vec<double> exp_from(const ExpParts<Vec<double>>& e) {
  return _mm512_maskz_scalef_pd(0xff, e.p + 1.0, e.whole);
}
#else
template <class V>
NVPFLOW_INLINE V exp_from(const ExpParts<V>& e) {
  using T = decltype(V{}[0] + 0);
  const Integers<V> half = e.n >> 1;  // in two steps, as in scaled()
  const V scale = power_of_two<T>(half);
  return fma(e.p, scale, scale) * power_of_two<T>(e.n - half);
}
#endif
template <class V>
NVPFLOW_INLINE Pair<V> exp_from(const ExpParts<Pair<V>>& e) {
  return {exp_from(ExpParts<V>{e.p.a, e.n.a, e.whole.a}), exp_from(ExpParts<V>{e.p.b, e.n.b, e.whole.b})};
}

template <class T, class V>
NVPFLOW_INLINE V exp(V x) {
  return exp_from(exp_parts<T>(at_least(at_most(x, Simd<T>::kExpHigh), Simd<T>::kExpLow)));
}

/// e^x - 1 for x <= 0.
template <class T>
NVPFLOW_INLINE Vec<T> expm1_bounded(Vec<T> x) {
  const ExpParts<Vec<T>> parts = exp_parts<T>(at_least(x, Simd<T>::kExpm1Low));
  const Vec<T> scale = power_of_two<T>(parts.n);
  return fma(parts.p, scale, scale - T(1));
}

#if defined(__AVX512F__)
// ---- float32 from tables: AVX-512 takes 16 of 32 numbers by one instruction

NVPFLOW_INLINE Vec<float> lookup(const float (&table)[32], IntVec<float> index) {  // its low five bits
  return _mm512_permutex2var_ps(load<float>(table), (__m512i)index, load<float>(table + 16));
}
template <class I>
NVPFLOW_INLINE auto lookup(const float (&table)[32], Pair<I> index) {
  return Pair<decltype(lookup(table, index.a))>{lookup(table, index.a), lookup(table, index.b)};
}

NVPFLOW_INLINE IntVec<float> bits_of(Vec<float> x) { return (IntVec<float>)x; }
template <class V>
NVPFLOW_INLINE auto bits_of(Pair<V> x) {
  return Pair<Integers<V>>{bits_of(x.a), bits_of(x.b)};
}

/// A quarter of an octave is an interval, with a polynomial in the distance from its centre; what is nearer to 0 than
/// all of them belongs to the first, whose centre is 0.
template <class V>
NVPFLOW_INLINE V table_tanh(V x) {
  constexpr int kTerms = sizeof kTanhTable / sizeof kTanhTable[0];
  constexpr float kLowest = 0.0625f;
  const V magnitude = at_most(absolute<float>(x), Simd<float>::kTanhHigh);
  const Integers<V> interval = bits_of(at_least(magnitude, kLowest)) >> 21;
  const V distance = magnitude - lookup(kTanhTable[0], interval);
  V sum = lookup(kTanhTable[kTerms - 1], interval);
#pragma GCC unroll 8
  for (int i = kTerms - 2; i > 0; --i) sum = fma(sum, distance, lookup(kTanhTable[i], interval));
  return copy_sign<float>(sum, x);
}

/// e^x for |x| <= 1: the nearest of 31 arguments, times e^r by its series, |r| <= 1/30.
template <class V>
NVPFLOW_INLINE V table_exp(V x) {
  const Integers<V> nearest = bits_of(fma(x, set1(15.0f), set1(Simd<float>::kRoundMagic)));
  const V r = x - lookup(kExpTable[0], nearest), power = lookup(kExpTable[1], nearest);
  constexpr float kSeries[] = {1.0f, 1.0f / 2, 1.0f / 6, 1.0f / 24};
  return fma(power * r, polynomial(r, kSeries), power);
}
#endif

/// e^x for |x| <= 1: what exp does there, without its precautions.
template <class T, class V>
NVPFLOW_INLINE V exp_within_one(V x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return table_exp(x);
#endif
  const ExpParts<V> parts = exp_parts<T>(x);
  const V scale = power_of_two<T>(parts.n);
  return fma(parts.p, scale, scale);
}

/// h / (1 + h) with h = (e^2|x| - 1) / 2. The remainder of the quotient q over 1 + h, which is the remainder times
/// 1 - tanh |x|, corrects it. The weight is the square of 1 - q instead: below 1/2, where the correction matters, that
/// is near enough, and towards 1, where h is large and h - q rounds, it makes the correction vanish.
template <class T, class V>
NVPFLOW_INLINE V tanh(V x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return table_tanh(x);
#endif
  const V magnitude = at_most(absolute<T>(x), Simd<T>::kTanhHigh);
  const ExpParts<V> parts = exp_parts<T>(magnitude + magnitude);
  const V half_scale = power_of_two<T>(parts.n - 1);
  const V h = fma(parts.p, half_scale, half_scale - T(0.5));
  const V q = h / (h + T(1));
  const V rest = fma(-q, h, h - q);
  const V weight = T(1) - q;
  return copy_sign<T>(fma(rest, weight * weight, q), x);
}

/// 1 / (1 + e) for e in [0, 1] to an eighth, which is enough to weigh the remainder of a quotient: the chord.
template <class T>
NVPFLOW_INLINE Vec<T> near_inverse(Vec<T> e) {
  return fma(e, set1(T(-0.5)), set1(T(1)));
}

/// e / (1 + e) or 1 / (1 + e) with e = e^-|x|, the quotient q corrected by its remainder; numerator - q is exact.
template <class T>
NVPFLOW_INLINE Vec<T> sigmoid(Vec<T> x) {
  const Vec<T> e = exp<T>(-absolute<T>(x));
  const Vec<T> numerator = x < T(0) ? e : set1(T(1));
  const Vec<T> q = numerator / (e + T(1));
  const Vec<T> rest = fma(-q, e, numerator - q);
  return fma(rest, near_inverse<T>(e), q);
}

/// x sigmoid(x) = max(x, 0) - y with y = |x| e / (1 + e), e = e^-|x| = 2^n (1 + p). 2^n comes last: y keeps its
/// relative accuracy where e is subnormal already.
template <class T>
NVPFLOW_INLINE Vec<T> silu(Vec<T> x) {
  const Vec<T> magnitude = at_most(absolute<T>(x), -Simd<T>::kExpLow);
  const ExpParts<Vec<T>> parts = exp_parts<T>(-magnitude);
  const Vec<T> e = scaled<T>(parts.p + T(1), parts.n);
  const Two<T> numerator = two_fma<T>(magnitude, parts.p, magnitude);
  const Vec<T> q = numerator.high / (e + T(1));
  const Vec<T> rest = fma(-q, e, numerator.high - q) + numerator.low;
  const Vec<T> y = scaled<T>(fma(rest, near_inverse<T>(e), q), parts.n);
  return (x < T(0) ? set1(T(-0.0)) : x) - y;
}

/// log(1 + e) for e in [0, 1], by 2 atanh s, s = e / (2 + e); the remainder of the quotient goes into the last
/// addition, with 1 / (2 + e) = (1 - s) / 2.
template <class T>
NVPFLOW_INLINE Vec<T> log1p_unit(Vec<T> e) {
  const Vec<T> s = e / (e + T(2));
  const Vec<T> w = s * s;
  const Vec<T> twice = s + s;
  const Vec<T> rest = fma(-s, e, e - twice);
  const Vec<T> correction = rest * (T(1) - s);
  return twice + fma(twice * w, NVPFLOW_COEFFICIENTS(T, kAtanhTailWide, w), correction);
}

template <class T, class V>
NVPFLOW_INLINE Pair<V> log1p_unit(Pair<V> e) {
  return {log1p_unit<T>(e.a), log1p_unit<T>(e.b)};
}

template <class T>
NVPFLOW_INLINE Vec<T> softplus(Vec<T> x) {
  const Vec<T> positive = x > T(0) ? x : set1(T(0));
  return positive + log1p_unit<T>(exp<T>(-absolute<T>(x)));
}

/// Upper tail of the standard normal in factors, Q(a) = (1/2 + mills) / (a + 5/4) e^(-a^2 / 2), a = |x|, with the
/// bell e^(-a^2 / 2) = 2^n (1 + p) (1 + low). Mills' ratio times (a + 5/4) stays between 0.39 and 0.63, so that the
/// errors of the polynomial in (a - 4) / (a + 4) count for a quarter.
template <class T>
struct NormalTail {
  Vec<T> a, mills;
  ExpParts<Vec<T>> bell;
  Vec<T> low;
};

template <class T>
NVPFLOW_INLINE NormalTail<T> normal_tail(Vec<T> x) {
  const Vec<T> a = at_most(absolute<T>(x), Simd<T>::kTailHigh);
  const Vec<T> h = a * a;
  const Vec<T> y = (a - T(4)) / (a + T(4));
  return {a, NVPFLOW_COEFFICIENTS(T, kMills, y), exp_parts<T>(h * T(-0.5)), product_error<T>(a, a, h) * T(-0.5)};
}

/// x Phi(x), the exact form (Hendrycks and Gimpel 2016): x or 0, less |x| Q(|x|).
template <class T>
NVPFLOW_INLINE Vec<T> gelu(Vec<T> x) {
  const NormalTail<T> tail = normal_tail<T>(x);
  const Two<T> m = two_fma<T>(tail.a, tail.mills, tail.a * T(0.5));
  const Vec<T> m_low = fma(m.high, tail.low, m.low);
  const Two<T> b = two_fma<T>(m.high, tail.bell.p, m.high);
  const Two<T> numerator = {b.high, fma(m_low, tail.bell.p, m_low) + b.low};
  const Vec<T> d = tail.a + T(1.25);
  const Two<T> denominator = {d, tail.a - (d - T(1.25))};  // exact: 5/4 is a multiple of the last place of d
  const Vec<T> y = scaled<T>(quotient<T>(numerator, denominator), tail.bell.n);
  return (x < T(0) ? set1(T(-0.0)) : x) - y;
}

template <class T>
NVPFLOW_INLINE Vec<T> gelu_derivative(Vec<T> x) {
  constexpr T kInverseRootTwoPi = static_cast<T>(0.39894228040143267794);
  const NormalTail<T> tail = normal_tail<T>(x);
  const Vec<T> bell = scaled<T>(T(1) + (tail.bell.p + tail.low), tail.bell.n);
  const Vec<T> q = bell * ((tail.mills + T(0.5)) / (tail.a + T(1.25)));
  const Vec<T> cdf = x > T(0) ? T(1) - q : q;
  return fma(x, bell * kInverseRootTwoPi, cdf);
}

template <class T>
NVPFLOW_INLINE Vec<T> silu_derivative(Vec<T> x) {
  const Vec<T> s = sigmoid<T>(x);
  return fma(x * s, T(1) - s, s);
}

template <class T>
NVPFLOW_INLINE Vec<T> elu(Vec<T> x) {
  return x > T(0) ? x : expm1_bounded<T>(at_most(x, T(0)));
}

/// log x for normal positive x.
template <class T>
NVPFLOW_INLINE Vec<T> log(Vec<T> x) {
  using Int = typename Simd<T>::Int;
  constexpr Int kRootHalf = sizeof(T) == 4 ? Int(0x3f3504f3) : Int(0x3fe6a09e667f3bcdll);
  const auto bits = (IntVec<T>)x;
  const IntVec<T> exponent = (bits - kRootHalf) >> Simd<T>::kMantissaBits;
  const Vec<T> f = (Vec<T>)(bits - (exponent << Simd<T>::kMantissaBits)) - T(1);  // in [sqrt 1/2 - 1, sqrt 2 - 1)
  const Vec<T> n = (Vec<T>)(exponent + (IntVec<T>)set1(Simd<T>::kRoundMagic)) - Simd<T>::kRoundMagic;
  const Vec<T> s = f / (f + T(2));
  const Vec<T> w = s * s;
  // 2 atanh s = f - s (f - 2 w tail): the leading term is exact.
  const Vec<T> inner = accurate_fma<T>(w + w, NVPFLOW_COEFFICIENTS(T, kAtanhTail, w), -f);
  const Vec<T> low = accurate_fma<T>(s, inner, n * Simd<T>::kLn2Low);
  return fma(n, set1(Simd<T>::kLn2High), f + low);
}

template <class T, class V>
NVPFLOW_INLINE Pair<V> log(Pair<V> x) {
  return {log<T>(x.a), log<T>(x.b)};
}

/// b + atan t with b = 0, pi / 4 or pi / 2 and |t| <= 1/2: of a = |x|, t is a below 1/2, -1 / a from 2 on, and
/// (a - 1) / (a + 1) between, where a - 1 is exact. What rounding takes from b + t goes into the last addition.
template <class T, class V>
NVPFLOW_INLINE V atan(V x) {
  constexpr T kQuarterPi = static_cast<T>(0.78539816339744830962);
  constexpr T kRest = sizeof(T) == 4 ? T(-0x1.de12cap-26) : T(0x1.678afae35cdd1p-55);  // (pi / 4) / kQuarterPi - 1
  const V a = absolute<T>(x);
  const auto low = a < T(0.5);
  const auto high = a > T(2);
  const Vec<T> zero = set1(T(0)), one = set1(T(1));
  const V t = select<T>(low, a, select<T>(high, -one, a - T(1))) / select<T>(low, one, select<T>(high, a, a + T(1)));
  const V base = select<T>(low, zero, select<T>(high, set1(2 * kQuarterPi), set1(kQuarterPi)));
  const V w = t * t;
  const V sum = base + t;
  const V rest = (t - (sum - base)) + fma(t * w, NVPFLOW_COEFFICIENTS(T, kAtanTail, w), base * kRest);
  return copy_sign<T>(sum + rest, x);
}

/// sin(pi f / 2) and cos(pi f / 2) for |f| <= 1/2.
template <class T>
NVPFLOW_INLINE Vec<T> sin_quarter(Vec<T> f) {
  constexpr T kHalfPi = static_cast<T>(1.57079632679489661923);
  constexpr T kHalfPiLow = sizeof(T) == 4 ? T(-0x1.777a5cp-25) : T(0x1.1a62633145c07p-54);  // pi / 2 - kHalfPi
  const Vec<T> w = f * f;
  const Vec<T> low = f * fma(w, NVPFLOW_COEFFICIENTS(T, kSinTail, w), set1(kHalfPiLow));
  return accurate_fma<T>(f, set1(kHalfPi), low);
}

template <class T>
NVPFLOW_INLINE Vec<T> cos_quarter(Vec<T> f) {
  const Vec<T> w = f * f;
  return accurate_fma<T>(w, NVPFLOW_COEFFICIENTS(T, kCosTail, w), set1(T(1)));
}

}  // namespace
}  // namespace nvpflow::cpu

// Vectors of the instruction set this file is compiled for, and the elementary functions on them.
//
// Arithmetic is that of the compilers' vector types; fused multiply-adds are written out and the files that include
// this are built with -ffp-contract=off, so that one formula gives the same bits wherever it stands. Everything lies in
// an unnamed namespace: an object built with wider instructions must not offer a function to code built with narrower
// ones.
#pragma once

#include <stdint.h>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#elif defined(__ARM_NEON) && defined(__aarch64__)
#include <arm_neon.h>
#endif

#define NVPFLOW_INLINE inline __attribute__((always_inline))
#define NVPFLOW_NOINLINE __attribute__((noinline))

namespace nvpflow::cpu {
namespace {

#include "coefficients.inl"

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class T>
struct Simd;

template <>
struct Simd<float> {
  typedef float V __attribute__((vector_size(kVectorBytes)));
  typedef int32_t I __attribute__((vector_size(kVectorBytes)));
  using Int = int32_t;
  static constexpr int kMantissaBits = 23;
  static constexpr Int kExponentBias = 127;
  static constexpr float kRoundMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  static constexpr float kLn2High = 0x1.62e400p-1f;  // trailing zeros: n * kLn2High is exact
  static constexpr float kLn2Low = 0x1.7f7d1cp-20f;
  static constexpr float kExpLow = -105.0f, kExpHigh = 89.5f;  // beyond: 0 and inf
  static constexpr float kExpm1Low = -26.0f;                   // beyond: -1 to the last bit
  static constexpr float kTanhHigh = 10.0f;                    // beyond: 1 to the last bit
  static constexpr float kTailHigh = 14.5f;                    // beyond: the normal upper tail is 0
  static constexpr float kSplit = 4097.0f;                     // 2^12 + 1 (Veltkamp)
};

template <>
struct Simd<double> {
  typedef double V __attribute__((vector_size(kVectorBytes)));
  typedef int64_t I __attribute__((vector_size(kVectorBytes)));
  using Int = int64_t;
  static constexpr int kMantissaBits = 52;
  static constexpr Int kExponentBias = 1023;
  static constexpr double kRoundMagic = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double kLn2High = 0x1.62e42fee00000p-1;
  static constexpr double kLn2Low = 0x1.a39ef35793c76p-33;
  static constexpr double kExpLow = -746.0, kExpHigh = 710.5;
  static constexpr double kExpm1Low = -46.0;
  static constexpr double kTanhHigh = 20.0;
  static constexpr double kTailHigh = 39.0;
  static constexpr double kSplit = 134217729.0;  // 2^27 + 1
};

template <class T>
using Vec = typename Simd<T>::V;
template <class T>
using IntVec = typename Simd<T>::I;
template <class T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

// ---- the few operations that need intrinsics ---------------------------------------------------------------------

#if defined(__AVX512F__)
NVPFLOW_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) { return _mm512_fmadd_ps(a, b, c); }
NVPFLOW_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) { return _mm512_fmadd_pd(a, b, c); }
// Masked with every lane on: gcc 12 warns of an uninitialised operand inside the plain intrinsic.
NVPFLOW_INLINE Vec<float> sqrt(Vec<float> a) { return _mm512_maskz_sqrt_ps(0xffff, a); }
NVPFLOW_INLINE Vec<double> sqrt(Vec<double> a) { return _mm512_maskz_sqrt_pd(0xff, a); }
NVPFLOW_INLINE Vec<float> set1(float a) { return _mm512_set1_ps(a); }
NVPFLOW_INLINE Vec<double> set1(double a) { return _mm512_set1_pd(a); }
constexpr bool kHasFma = true;
#elif defined(__AVX2__)
NVPFLOW_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) { return _mm256_fmadd_ps(a, b, c); }
NVPFLOW_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) { return _mm256_fmadd_pd(a, b, c); }
NVPFLOW_INLINE Vec<float> sqrt(Vec<float> a) { return _mm256_sqrt_ps(a); }
NVPFLOW_INLINE Vec<double> sqrt(Vec<double> a) { return _mm256_sqrt_pd(a); }
NVPFLOW_INLINE Vec<float> set1(float a) { return _mm256_set1_ps(a); }
NVPFLOW_INLINE Vec<double> set1(double a) { return _mm256_set1_pd(a); }
constexpr bool kHasFma = true;
#elif defined(__SSE2__)
NVPFLOW_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) { return a * b + c; }
NVPFLOW_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) { return a * b + c; }
NVPFLOW_INLINE Vec<float> sqrt(Vec<float> a) { return _mm_sqrt_ps(a); }
NVPFLOW_INLINE Vec<double> sqrt(Vec<double> a) { return _mm_sqrt_pd(a); }
NVPFLOW_INLINE Vec<float> set1(float a) { return _mm_set1_ps(a); }
NVPFLOW_INLINE Vec<double> set1(double a) { return _mm_set1_pd(a); }
constexpr bool kHasFma = false;
#elif defined(__ARM_NEON) && defined(__aarch64__)
NVPFLOW_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
  return (Vec<float>)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
}
NVPFLOW_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
  return (Vec<double>)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
}
NVPFLOW_INLINE Vec<float> sqrt(Vec<float> a) { return (Vec<float>)vsqrtq_f32((float32x4_t)a); }
NVPFLOW_INLINE Vec<double> sqrt(Vec<double> a) { return (Vec<double>)vsqrtq_f64((float64x2_t)a); }
NVPFLOW_INLINE Vec<float> set1(float a) { return (Vec<float>)vdupq_n_f32(a); }
NVPFLOW_INLINE Vec<double> set1(double a) { return (Vec<double>)vdupq_n_f64(a); }
constexpr bool kHasFma = true;
#else
NVPFLOW_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) { return a * b + c; }
NVPFLOW_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) { return a * b + c; }
NVPFLOW_INLINE Vec<float> sqrt(Vec<float> a) {
  for (int l = 0; l < kLanes<float>; ++l) a[l] = __builtin_sqrtf(a[l]);
  return a;
}
NVPFLOW_INLINE Vec<double> sqrt(Vec<double> a) {
  for (int l = 0; l < kLanes<double>; ++l) a[l] = __builtin_sqrt(a[l]);
  return a;
}
NVPFLOW_INLINE Vec<float> set1(float a) { return Vec<float>{} + a; }
NVPFLOW_INLINE Vec<double> set1(double a) { return Vec<double>{} + a; }
constexpr bool kHasFma = false;
#endif

// ---- memory ------------------------------------------------------------------------------------------------------

template <class T>
NVPFLOW_INLINE Vec<T> load(const T* p) {
  Vec<T> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

template <class T>
NVPFLOW_INLINE void store(T* p, Vec<T> v) {
  __builtin_memcpy(p, &v, sizeof v);
}

#if defined(__AVX512F__)
/// A bit for each of the lanes [begin, end).
NVPFLOW_INLINE __mmask16 lane_mask(int64_t begin, int64_t end) {
  return static_cast<__mmask16>((1u << end) - (1u << begin));
}
#endif

/// Lanes [begin, end) of p[0], p[1], ...; the other lanes are zero and their memory is not touched.
template <class T>
NVPFLOW_INLINE Vec<T> load_lanes(const T* p, int64_t begin, int64_t end) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    return _mm512_maskz_loadu_ps(lane_mask(begin, end), p);
  } else {
    return _mm512_maskz_loadu_pd(static_cast<__mmask8>(lane_mask(begin, end)), p);
  }
#else
  T lanes[kLanes<T>] = {};
  for (int64_t l = begin; l < end; ++l) lanes[l] = p[l];
  return load<T>(lanes);
#endif
}

template <class T>
NVPFLOW_INLINE void store_lanes(T* p, Vec<T> v, int64_t begin, int64_t end) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    _mm512_mask_storeu_ps(p, lane_mask(begin, end), v);
  } else {
    _mm512_mask_storeu_pd(p, static_cast<__mmask8>(lane_mask(begin, end)), v);
  }
#else
  T lanes[kLanes<T>];
  store<T>(lanes, v);
  for (int64_t l = begin; l < end; ++l) p[l] = lanes[l];
#endif
}

/// n >= lanes means all of them.
template <class T>
NVPFLOW_INLINE Vec<T> load_upto(const T* p, int64_t n) {
  return n >= kLanes<T> ? load<T>(p) : load_lanes<T>(p, 0, n);
}

template <class T>
NVPFLOW_INLINE void store_upto(T* p, Vec<T> v, int64_t n) {
  if (n >= kLanes<T>) {
    store<T>(p, v);
  } else {
    store_lanes<T>(p, v, 0, n);
  }
}

/// Sum of the lanes by halving: lane l takes lane l + lanes/2, then l + lanes/4, and so on.
template <class T>
NVPFLOW_INLINE T sum_lanes(Vec<T> v) {
  T lanes[kLanes<T>];
  store<T>(lanes, v);
  for (int width = kLanes<T> / 2; width > 0; width /= 2) {
    for (int l = 0; l < width; ++l) lanes[l] += lanes[l + width];
  }
  return lanes[0];
}

// ---- elementary functions ----------------------------------------------------------------------------------------
// NaN goes through all of them: bounds are applied as `x > high ? high : x`, which keeps it.

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

template <class T>
NVPFLOW_INLINE Vec<T> at_most(Vec<T> x, T high) {
  return x > high ? set1(high) : x;
}

template <class T>
NVPFLOW_INLINE Vec<T> at_least(Vec<T> x, T low) {
  return x < low ? set1(low) : x;
}

/// Coefficients lowest first, by Horner's rule.
template <class T, int N>
NVPFLOW_INLINE Vec<T> polynomial(Vec<T> x, const T (&c)[N]) {
  Vec<T> sum = set1(c[N - 1]);
#pragma GCC unroll 32
  for (int i = N - 2; i >= 0; --i) sum = fma(sum, x, set1(c[i]));
  return sum;
}

#define NVPFLOW_COEFFICIENTS(T, name, x) (coefficients_##name(static_cast<T*>(nullptr), x))
#define NVPFLOW_DEFINE_COEFFICIENTS(name)                                                                             \
  NVPFLOW_INLINE Vec<float> coefficients_##name(const float*, Vec<float> x) { return polynomial<float>(x, name##F); } \
  NVPFLOW_INLINE Vec<double> coefficients_##name(const double*, Vec<double> x) {                                      \
    return polynomial<double>(x, name##D);                                                                            \
  }
NVPFLOW_DEFINE_COEFFICIENTS(kExpm1Tail)
NVPFLOW_DEFINE_COEFFICIENTS(kAtanhTailWide)
NVPFLOW_DEFINE_COEFFICIENTS(kAtanhTail)
NVPFLOW_DEFINE_COEFFICIENTS(kSinTail)
NVPFLOW_DEFINE_COEFFICIENTS(kCosTail)
NVPFLOW_DEFINE_COEFFICIENTS(kMills)
#undef NVPFLOW_DEFINE_COEFFICIENTS

/// 2^n for n in the range of normal numbers.
template <class T>
NVPFLOW_INLINE Vec<T> power_of_two(IntVec<T> n) {
  return (Vec<T>)((n + Simd<T>::kExponentBias) << Simd<T>::kMantissaBits);
}

/// e^x = 2^n (1 + p), |x - n ln 2| <= ln 2 / 2 (Cody and Waite 1980).
template <class T>
struct ExpParts {
  Vec<T> p;
  IntVec<T> n;
};

template <class T>
NVPFLOW_INLINE ExpParts<T> exp_parts(Vec<T> x) {
  constexpr T kLog2E = static_cast<T>(1.4426950408889634074);
  const Vec<T> magic = set1(Simd<T>::kRoundMagic);
  const Vec<T> shifted = fma(x, set1(kLog2E), magic);
  const Vec<T> n = shifted - magic;
  const Vec<T> high = fma(n, set1(-Simd<T>::kLn2High), x);
  const Vec<T> r = fma(n, set1(-Simd<T>::kLn2Low), high);
  const Vec<T> r_low = fma(n, set1(-Simd<T>::kLn2Low), high - r);  // what rounding took from r
  const Vec<T> p = r + fma(r * r, NVPFLOW_COEFFICIENTS(T, kExpm1Tail, r), r_low);
  return {p, (IntVec<T>)shifted - (IntVec<T>)magic};
}

template <class T>
NVPFLOW_INLINE Vec<T> exp(Vec<T> x) {
  x = at_least<T>(at_most<T>(x, Simd<T>::kExpHigh), Simd<T>::kExpLow);
  const ExpParts<T> parts = exp_parts<T>(x);
  // In two steps, so that results near both ends of the range neither overflow early nor round twice.
  const IntVec<T> half = parts.n >> 1;
  const Vec<T> scale = power_of_two<T>(half);
  return fma(parts.p, scale, scale) * power_of_two<T>(parts.n - half);
}

/// e^x - 1 for x <= 2 kTanhHigh.
template <class T>
NVPFLOW_INLINE Vec<T> expm1_bounded(Vec<T> x) {
  const ExpParts<T> parts = exp_parts<T>(at_least<T>(x, Simd<T>::kExpm1Low));
  const Vec<T> scale = power_of_two<T>(parts.n);
  return fma(parts.p, scale, scale - T(1));
}

template <class T>
NVPFLOW_INLINE Vec<T> tanh(Vec<T> x) {
  const Vec<T> magnitude = at_most<T>(absolute<T>(x), Simd<T>::kTanhHigh);
  const Vec<T> e = expm1_bounded<T>(magnitude + magnitude);
  return copy_sign<T>(e / (e + T(2)), x);
}

template <class T>
NVPFLOW_INLINE Vec<T> sigmoid(Vec<T> x) {
  const Vec<T> e = exp<T>(-absolute<T>(x));
  const Vec<T> numerator = x < T(0) ? e : set1(T(1));
  return numerator / (e + T(1));
}

/// log(1 + e) for e in [0, 1], by 2 atanh(e / (2 + e)).
template <class T>
NVPFLOW_INLINE Vec<T> log1p_unit(Vec<T> e) {
  const Vec<T> s = e / (e + T(2));
  const Vec<T> w = s * s;
  const Vec<T> twice = s + s;
  return fma(twice * w, NVPFLOW_COEFFICIENTS(T, kAtanhTailWide, w), twice);
}

template <class T>
NVPFLOW_INLINE Vec<T> softplus(Vec<T> x) {
  const Vec<T> positive = x > T(0) ? x : set1(T(0));
  return positive + log1p_unit<T>(exp<T>(-absolute<T>(x)));
}

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

/// Upper tail Q(|x|) of the standard normal and exp(-x^2 / 2), by Mills' ratio in (|x| - 4) / (|x| + 4).
template <class T>
struct NormalTail {
  Vec<T> q;
  Vec<T> bell;
};

template <class T>
NVPFLOW_INLINE NormalTail<T> normal_tail(Vec<T> x) {
  const Vec<T> a = at_most<T>(absolute<T>(x), Simd<T>::kTailHigh);
  const Vec<T> h = a * a;
  Vec<T> bell = exp<T>(h * T(-0.5));
  bell = fma(bell, product_error<T>(a, a, h) * T(-0.5), bell);
  const Vec<T> y = (a - T(4)) / (a + T(4));
  return {bell * (NVPFLOW_COEFFICIENTS(T, kMills, y) / (a + T(4))), bell};
}

/// x Phi(x), the exact form (Hendrycks and Gimpel 2016).
template <class T>
NVPFLOW_INLINE Vec<T> gelu(Vec<T> x) {
  const Vec<T> q = normal_tail<T>(x).q;
  return x > T(0) ? fma(-x, q, x) : x * q;
}

template <class T>
NVPFLOW_INLINE Vec<T> gelu_derivative(Vec<T> x) {
  constexpr T kInverseRootTwoPi = static_cast<T>(0.39894228040143267794);
  const NormalTail<T> tail = normal_tail<T>(x);
  const Vec<T> cdf = x > T(0) ? T(1) - tail.q : tail.q;
  return fma(x, tail.bell * kInverseRootTwoPi, cdf);
}

template <class T>
NVPFLOW_INLINE Vec<T> silu_derivative(Vec<T> x) {
  const Vec<T> s = sigmoid<T>(x);
  return fma(x * s, T(1) - s, s);
}

template <class T>
NVPFLOW_INLINE Vec<T> elu(Vec<T> x) {
  return x > T(0) ? x : expm1_bounded<T>(at_most<T>(x, T(0)));
}

/// log x for normal positive x.
template <class T>
NVPFLOW_INLINE Vec<T> log(Vec<T> x) {
  using Int = typename Simd<T>::Int;
  constexpr Int kRootHalf = sizeof(T) == 4 ? Int(0x3f3504f3) : Int(0x3fe6a09e667f3bcdll);
  const IntVec<T> bits = (IntVec<T>)x;
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

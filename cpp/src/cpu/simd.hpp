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

#include "../elementary/coefficients.inl"
#if defined(__AVX512F__)
#include "../elementary/tables.inl"
#endif

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
  static constexpr float kExpLow = -110.0f, kExpHigh = 89.5f;  // beyond: 0, also times x, and inf
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
  static constexpr double kExpLow = -755.0, kExpHigh = 710.5;
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
// The processor's own minimum and maximum return the second operand where one is NaN. Masked as above.
NVPFLOW_INLINE Vec<float> at_most(Vec<float> x, float high) { return _mm512_maskz_min_ps(0xffff, set1(high), x); }
NVPFLOW_INLINE Vec<double> at_most(Vec<double> x, double high) { return _mm512_maskz_min_pd(0xff, set1(high), x); }
NVPFLOW_INLINE Vec<float> at_least(Vec<float> x, float low) { return _mm512_maskz_max_ps(0xffff, set1(low), x); }
NVPFLOW_INLINE Vec<double> at_least(Vec<double> x, double low) { return _mm512_maskz_max_pd(0xff, set1(low), x); }
constexpr bool kHasFma = true;
#elif defined(__AVX2__)
NVPFLOW_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) { return _mm256_fmadd_ps(a, b, c); }
NVPFLOW_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) { return _mm256_fmadd_pd(a, b, c); }
NVPFLOW_INLINE Vec<float> sqrt(Vec<float> a) { return _mm256_sqrt_ps(a); }
NVPFLOW_INLINE Vec<double> sqrt(Vec<double> a) { return _mm256_sqrt_pd(a); }
NVPFLOW_INLINE Vec<float> set1(float a) { return _mm256_set1_ps(a); }
NVPFLOW_INLINE Vec<double> set1(double a) { return _mm256_set1_pd(a); }
// The processor's own minimum and maximum return the second operand where one is NaN.
NVPFLOW_INLINE Vec<float> at_most(Vec<float> x, float high) { return _mm256_min_ps(set1(high), x); }
NVPFLOW_INLINE Vec<double> at_most(Vec<double> x, double high) { return _mm256_min_pd(set1(high), x); }
NVPFLOW_INLINE Vec<float> at_least(Vec<float> x, float low) { return _mm256_max_ps(set1(low), x); }
NVPFLOW_INLINE Vec<double> at_least(Vec<double> x, double low) { return _mm256_max_pd(set1(low), x); }
constexpr bool kHasFma = true;
#elif defined(__SSE2__)
NVPFLOW_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) { return a * b + c; }
NVPFLOW_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) { return a * b + c; }
NVPFLOW_INLINE Vec<float> sqrt(Vec<float> a) { return _mm_sqrt_ps(a); }
NVPFLOW_INLINE Vec<double> sqrt(Vec<double> a) { return _mm_sqrt_pd(a); }
NVPFLOW_INLINE Vec<float> set1(float a) { return _mm_set1_ps(a); }
NVPFLOW_INLINE Vec<double> set1(double a) { return _mm_set1_pd(a); }
NVPFLOW_INLINE Vec<float> at_most(Vec<float> x, float high) { return _mm_min_ps(set1(high), x); }
NVPFLOW_INLINE Vec<double> at_most(Vec<double> x, double high) { return _mm_min_pd(set1(high), x); }
NVPFLOW_INLINE Vec<float> at_least(Vec<float> x, float low) { return _mm_max_ps(set1(low), x); }
NVPFLOW_INLINE Vec<double> at_least(Vec<double> x, double low) { return _mm_max_pd(set1(low), x); }
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
NVPFLOW_INLINE Vec<float> at_most(Vec<float> x, float high) { return x > high ? set1(high) : x; }
NVPFLOW_INLINE Vec<double> at_most(Vec<double> x, double high) { return x > high ? set1(high) : x; }
NVPFLOW_INLINE Vec<float> at_least(Vec<float> x, float low) { return x < low ? set1(low) : x; }
NVPFLOW_INLINE Vec<double> at_least(Vec<double> x, double low) { return x < low ? set1(low) : x; }
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
NVPFLOW_INLINE Vec<float> at_most(Vec<float> x, float high) { return x > high ? set1(high) : x; }
NVPFLOW_INLINE Vec<double> at_most(Vec<double> x, double high) { return x > high ? set1(high) : x; }
NVPFLOW_INLINE Vec<float> at_least(Vec<float> x, float low) { return x < low ? set1(low) : x; }
NVPFLOW_INLINE Vec<double> at_least(Vec<double> x, double low) { return x < low ? set1(low) : x; }
constexpr bool kHasFma = false;
#endif

/// {p[0], p[1], p[0], p[1], ...}
NVPFLOW_INLINE Vec<float> set_pairs(const float* p) {
#if defined(__SSE2__) || defined(__aarch64__)
  double both = 0;  // moved, never computed with
  __builtin_memcpy(&both, p, sizeof both);
  return (Vec<float>)set1(both);
#else
  Vec<float> v;
  for (int l = 0; l < kLanes<float>; ++l) v[l] = p[l % 2];
  return v;
#endif
}
NVPFLOW_INLINE Vec<double> set_pairs(const double* p) {
#if defined(__AVX512F__)
  return _mm512_maskz_broadcast_f64x2(0xff, _mm_loadu_pd(p));  // masked as above
#elif defined(__AVX2__)
  return _mm256_set_pd(p[1], p[0], p[1], p[0]);
#else
  Vec<double> v;
  for (int l = 0; l < kLanes<double>; ++l) v[l] = p[l % 2];
  return v;
#endif
}

// ---- memory ------------------------------------------------------------------------------------------------------

template <class T>
NVPFLOW_INLINE Vec<T> load(const T* p) {
  Vec<T> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

/// Pairs of bfloat16 numbers, which are the upper halves of float32 numbers.
NVPFLOW_INLINE void load_pairs(const uint32_t* p, Vec<float>& first, Vec<float>& second) {
  typedef uint32_t Words __attribute__((vector_size(kVectorBytes)));
  Words words;
  __builtin_memcpy(&words, p, sizeof words);
  first = (Vec<float>)(words << 16);
  second = (Vec<float>)(words & 0xffff0000u);
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

// ---- vectors in step ---------------------------------------------------------------------------------------------

/// Two vectors, or two such pairs, that go through a formula in step. A formula such as exp is one long chain of
/// operations, each of which waits for the one before; the processor's window holds too few vectors' chains to fill its
/// units. `V` below is a vector or pairs of pairs of them.
template <class V>
struct Pair {
  V a, b;
};

template <class Y>
NVPFLOW_INLINE Y first(Y y) {
  return y;
}
template <class Y>
NVPFLOW_INLINE Y second(Y y) {
  return y;
}
template <class V>
NVPFLOW_INLINE V first(Pair<V> y) {
  return y.a;
}
template <class V>
NVPFLOW_INLINE V second(Pair<V> y) {
  return y.b;
}

// y: a pair as well, or one vector or number for both.
template <class V, class Y>
NVPFLOW_INLINE Pair<V> operator+(Pair<V> x, Y y) {
  return {x.a + first(y), x.b + second(y)};
}
template <class V, class Y>
NVPFLOW_INLINE Pair<V> operator-(Pair<V> x, Y y) {
  return {x.a - first(y), x.b - second(y)};
}
template <class V, class Y>
NVPFLOW_INLINE Pair<V> operator*(Pair<V> x, Y y) {
  return {x.a * first(y), x.b * second(y)};
}
template <class V, class Y>
NVPFLOW_INLINE Pair<V> operator/(Pair<V> x, Y y) {
  return {x.a / first(y), x.b / second(y)};
}
template <class V>
NVPFLOW_INLINE Pair<V> operator-(Pair<V> x) {
  return {-x.a, -x.b};
}
template <class V>
NVPFLOW_INLINE Pair<V> operator-(float x, Pair<V> y) {
  return {x - y.a, x - y.b};
}
template <class V>
NVPFLOW_INLINE Pair<V> operator-(double x, Pair<V> y) {
  return {x - y.a, x - y.b};
}
template <class V>
NVPFLOW_INLINE Pair<V> operator>>(Pair<V> x, int n) {
  return {x.a >> n, x.b >> n};
}
template <class V, class Y, class Z>
NVPFLOW_INLINE Pair<V> fma(Pair<V> x, Y y, Z z) {
  return {fma(x.a, first(y), first(z)), fma(x.b, second(y), second(z))};
}
template <class V, class T>
NVPFLOW_INLINE Pair<V> at_most(Pair<V> x, T high) {
  return {at_most(x.a, high), at_most(x.b, high)};
}
template <class V, class T>
NVPFLOW_INLINE Pair<V> at_least(Pair<V> x, T low) {
  return {at_least(x.a, low), at_least(x.b, low)};
}

/// Vectors in V.
template <class V>
constexpr int kVectors = 1;
template <class V>
constexpr int kVectors<Pair<V>> = 2 * kVectors<V>;

/// The vectors of V at p, p + stride, p + 2 stride, ...; of each the first n elements (all of them where n >= lanes).
template <class T, class V>
NVPFLOW_INLINE V load_steps(const T* p, int64_t stride, int64_t n) {
  if constexpr (kVectors<V> == 1) {
    return load_upto<T>(p, n);
  } else {
    using Half = decltype(V::a);
    return {load_steps<T, Half>(p, stride, n), load_steps<T, Half>(p + kVectors<Half> * stride, stride, n)};
  }
}
template <class T, class V>
NVPFLOW_INLINE void store_steps(T* p, int64_t stride, V v, int64_t n) {
  if constexpr (kVectors<V> == 1) {
    store_upto<T>(p, v, n);
  } else {
    store_steps<T>(p, stride, v.a, n);
    store_steps<T>(p + kVectors<V> / 2 * stride, stride, v.b, n);
  }
}

// ---- elementary functions ----------------------------------------------------------------------------------------
// NaN goes through all of them: at_most and at_least keep it.

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

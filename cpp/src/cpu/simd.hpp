// Vectors of the instruction set this file is compiled for: their arithmetic, and their way from and to memory.
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
NVPFLOW_INLINE Vec<float> larger(Vec<float> a, Vec<float> b) { return _mm512_maskz_max_ps(0xffff, a, b); }
NVPFLOW_INLINE Vec<double> larger(Vec<double> a, Vec<double> b) { return _mm512_maskz_max_pd(0xff, a, b); }
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
NVPFLOW_INLINE Vec<float> larger(Vec<float> a, Vec<float> b) { return _mm256_max_ps(a, b); }
NVPFLOW_INLINE Vec<double> larger(Vec<double> a, Vec<double> b) { return _mm256_max_pd(a, b); }
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

#if !defined(__AVX512F__) && !defined(__AVX2__)
NVPFLOW_INLINE Vec<float> larger(Vec<float> a, Vec<float> b) { return a > b ? a : b; }
NVPFLOW_INLINE Vec<double> larger(Vec<double> a, Vec<double> b) { return a > b ? a : b; }
#endif

/// {p[0], p[1], p[0], p[1], ...}
NVPFLOW_INLINE Vec<float> set_pairs(const float* p) {
#if defined(__SSE2__) || defined(__aarch64__)
  double both = 0;  // moved, never computed with
  __builtin_memcpy(&both, p, sizeof both);
  return (Vec<float>)set1(both);
#else
  Vec<float> v = {};
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
  Vec<double> v = {};  // or g++ -O1 takes it for uninitialized
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

}  // namespace
}  // namespace nvpflow::cpu

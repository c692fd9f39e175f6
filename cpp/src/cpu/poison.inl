// KERNEL: rows that came in with NaN or inf, or whose results hold one.
//
// Finite rows never give NaN, which stays with rows that came in with NaN or inf. A number beyond the format is
// infinite, and so is one that got lost on the way, as inf - inf; a log-determinant that got lost is such that the
// density of the row is 0.
#pragma once

#include <stdint.h>

#include "kernels.hpp"
#include "simd.hpp"

namespace nvpflow::cpu {
namespace {

/// poison[rows] = 0, or NaN for a row that holds NaN or inf. Returns whether any row does.
template <class T>
bool find_poison(const T* state, int64_t columns, T* poison, int64_t rows) {
  IntVec<T> any = {};
  for (int64_t r = 0; r < rows; r += kLanes<T>) {
    Vec<T> sum = {};
    for (int64_t j = 0; j < columns; ++j) sum = fma(load<T>(state + j * rows + r), Vec<T>{}, sum);
    store<T>(poison + r, sum);
    any |= sum != sum;
  }
  typename Simd<T>::Int found = 0;
  for (int l = 0; l < kLanes<T>; ++l) found |= any[l];
  return found != 0;
}

/// Every number of a poisoned row becomes NaN; other rows keep their bits.
template <class T>
void spread_poison(const T* poison, T* values, int64_t features, int64_t rows) {
  for (int64_t j = 0; j < features; ++j) {
    for (int64_t r = 0; r < rows; r += kLanes<T>) {
      const Vec<T> p = load<T>(poison + r);
      store<T>(values + j * rows + r, p != p ? p : load<T>(values + j * rows + r));
    }
  }
}

template <class T>
constexpr T kNaN = static_cast<T>(__builtin_nan(""));
template <class T>
constexpr T kInfinity = static_cast<T>(__builtin_inf());

template <class T>
NVPFLOW_INLINE bool is_finite(T x) {
  return x - x == T(0);
}

/// Row r of the input of a call that has one.
template <class T, class Call>
NVPFLOW_INLINE const T* input_row(const Call& call, int64_t r, int64_t features) {
  return call.in + (call.index == nullptr ? r : call.index[r]) * features;
}

template <class T, class Call>
bool input_is_finite(const Call& call, int64_t r, int64_t features) {
  const T* row = input_row<T>(call, r, features);
  bool finite = true;
  for (int64_t j = 0; j < features; ++j) finite &= is_finite(row[j]);
  return finite;
}

template <class T>
NVPFLOW_INLINE T settled(T value) {
  return __builtin_isnan(value) ? kInfinity<T> : value;
}

template <class T>
NVPFLOW_INLINE T settled_log_det(T value, bool inverse) {
  if (is_finite(value)) return value;
  return inverse ? kInfinity<T> : -kInfinity<T>;
}

/// Settles a row [features], its numbers `step` apart, whose results hold NaN or inf, or whose context does. log_det:
/// null if not wanted.
template <class T>
NVPFLOW_NOINLINE void settle_row(const TransformCall<T>& call, bool context_is_finite, int64_t row, int64_t features,
                                 T* state, int64_t step, T* log_det) {
  const bool finite = context_is_finite && (call.in == nullptr || input_is_finite<T>(call, row, features));
  for (int64_t j = 0; j < features; ++j, state += step) *state = finite ? settled<T>(*state) : kNaN<T>;
  if (log_det != nullptr) *log_det = finite ? settled_log_det<T>(*log_det, call.inverse) : kNaN<T>;
}

}  // namespace
}  // namespace nvpflow::cpu

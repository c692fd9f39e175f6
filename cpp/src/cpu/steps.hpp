// Several vectors that go through a formula in step, as one number of a kind of its own.
#pragma once

#include <stdint.h>

#include "simd.hpp"

namespace nvpflow::cpu {
namespace {

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
NVPFLOW_INLINE Pair<V> operator/(float x, Pair<V> y) {
  return {x / y.a, x / y.b};
}
template <class V>
NVPFLOW_INLINE Pair<V> operator/(double x, Pair<V> y) {
  return {x / y.a, x / y.b};
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

// Comparisons with a number, and the choice by their result.
template <class V, class T>
NVPFLOW_INLINE auto operator<(Pair<V> x, T y) {
  return Pair<decltype(x.a < y)>{x.a < y, x.b < y};
}
template <class V, class T>
NVPFLOW_INLINE auto operator>(Pair<V> x, T y) {
  return Pair<decltype(x.a > y)>{x.a > y, x.b > y};
}
template <class T>
NVPFLOW_INLINE Vec<T> select(IntVec<T> where, Vec<T> yes, Vec<T> no) {
  return where ? yes : no;
}
template <class T, class I, class Y, class Z>
NVPFLOW_INLINE auto select(Pair<I> where, Y yes, Z no) {
  using V = decltype(select<T>(where.a, first(yes), first(no)));
  return Pair<V>{select<T>(where.a, first(yes), first(no)), select<T>(where.b, second(yes), second(no))};
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

}  // namespace
}  // namespace nvpflow::cpu

// KERNEL: rows on their way into a tile and back, which is transposed: feature-major, X[feature][row].
#pragma once

#include <stdint.h>

#include "blocks.hpp"
#include "kernels.hpp"
#include "simd.hpp"

namespace nvpflow::cpu {
namespace {

// Rows of shuffled data that are fetched before they are needed, for they come from afar and in no order that a
// processor could foresee, and the cache lines of each: of more it fetches the rest by itself.
constexpr int64_t kGatherAhead = 16, kFetchedLines = 4;

/// 16 bytes of consecutive elements: the unit of the transposes on every instruction set.
template <class T>
struct Quad {
  static constexpr int n = 16 / static_cast<int>(sizeof(T));
  typedef T V __attribute__((vector_size(16)));
  typedef typename Simd<T>::Int I __attribute__((vector_size(16)));
};

/// The named elements of a and b, counted through both.
template <class T, int... elements>
NVPFLOW_INLINE typename Quad<T>::V shuffle(typename Quad<T>::V a, typename Quad<T>::V b) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, elements...);
#else  // g++ 11 has only the older name
  return __builtin_shuffle(a, b, typename Quad<T>::I{elements...});
#endif
}

/// in[Q rows][Q] with strides to out(q)[Q rows].
template <class T, class Out>
NVPFLOW_INLINE void transpose_quad(const T* const (&in)[Quad<T>::n], Out out) {
  using V = typename Quad<T>::V;
  constexpr int Q = Quad<T>::n;
  V a[Q];
  for (int q = 0; q < Q; ++q) __builtin_memcpy(&a[q], in[q], sizeof(V));
  V b[Q];
  if constexpr (Q == 4) {
    const V t0 = shuffle<T, 0, 4, 1, 5>(a[0], a[1]), t1 = shuffle<T, 0, 4, 1, 5>(a[2], a[3]);
    const V t2 = shuffle<T, 2, 6, 3, 7>(a[0], a[1]), t3 = shuffle<T, 2, 6, 3, 7>(a[2], a[3]);
    b[0] = shuffle<T, 0, 1, 4, 5>(t0, t1);
    b[1] = shuffle<T, 2, 3, 6, 7>(t0, t1);
    b[2] = shuffle<T, 0, 1, 4, 5>(t2, t3);
    b[3] = shuffle<T, 2, 3, 6, 7>(t2, t3);
  } else {
    b[0] = shuffle<T, 0, 2>(a[0], a[1]);
    b[1] = shuffle<T, 1, 3>(a[0], a[1]);
  }
  for (int q = 0; q < Q; ++q) __builtin_memcpy(out(q), &b[q], sizeof(V));
}

/// The rows of a tile that hold the columns of an array.
struct InOrder {
  NVPFLOW_INLINE int64_t operator()(int64_t column) const { return column; }
};
struct ByTable {
  const int64_t* place;
  NVPFLOW_INLINE int64_t operator()(int64_t column) const { return place[column]; }
};

/// f(where the columns lie); table: null for their own indices.
template <class F>
NVPFLOW_INLINE void with_place(const int64_t* table, F&& f) {
  if (table == nullptr) return f(InOrder{});
  f(ByTable{table});
}

/// out[place(column)][rows] = in[row][column]; rows `count` and beyond of the tile are zero. row(r): where row r lies.
template <class T, class RowPointer, class Place = InOrder>
NVPFLOW_INLINE void gather_tile(RowPointer row, int64_t count, int64_t columns, T* out, int64_t rows,
                                Place place = {}) {
  constexpr int Q = Quad<T>::n;
  int64_t r = 0;
  for (; r + Q <= count; r += Q) {
    const T* in[Q];
    for (int q = 0; q < Q; ++q) in[q] = row(r + q);
    int64_t j = 0;
    for (; j + Q <= columns; j += Q) {
      transpose_quad<T>(in, [&](int q) __attribute__((always_inline)) { return out + place(j + q) * rows + r; });
      for (int q = 0; q < Q; ++q) in[q] += Q;
    }
    for (; j < columns; ++j) {
      for (int q = 0; q < Q; ++q) out[place(j) * rows + r + q] = *in[q]++;
    }
  }
  for (; r < rows; ++r) {
    const T* in = r < count ? row(r) : nullptr;
    for (int64_t j = 0; j < columns; ++j) out[place(j) * rows + r] = r < count ? in[j] : T(0);
  }
}

/// out[row][column] with stride = in[place(column)][rows], for `count` rows.
template <class T, class Place = InOrder>
void scatter_tile(const T* in, int64_t rows, int64_t count, int64_t columns, T* out, int64_t stride, Place place = {}) {
  constexpr int Q = Quad<T>::n;
  int64_t j = 0;
  for (; j + Q <= columns; j += Q) {
    int64_t r = 0;
    for (; r + Q <= count; r += Q) {
      const T* from[Q];
      for (int q = 0; q < Q; ++q) from[q] = in + place(j + q) * rows + r;
      transpose_quad<T>(from, [&](int q) __attribute__((always_inline)) { return out + (r + q) * stride + j; });
    }
    for (; r < count; ++r) {
      for (int q = 0; q < Q; ++q) out[r * stride + j + q] = in[place(j + q) * rows + r];
    }
  }
  for (; j < columns; ++j) {
    for (int64_t r = 0; r < count; ++r) out[r * stride + j] = in[place(j) * rows + r];
  }
}

template <class T, class Place = InOrder>
void load_tile(const T* in, const int64_t* index, int64_t first, int64_t count, int64_t columns, T* out, int64_t rows,
               Place place = {}) {
  if (index != nullptr) {
    const auto row = [=](int64_t r) { return in + index[first + r] * columns; };
    const auto fetch = [=](int64_t r) {
      constexpr int64_t kLine = 64 / sizeof(T);
      const int64_t fetched = smaller(columns, kFetchedLines * kLine);
      for (int64_t j = 0; j < fetched; j += kLine) __builtin_prefetch(row(r) + j);
      __builtin_prefetch(row(r) + fetched - 1);  // rows begin anywhere in a line
    };
    for (int64_t r = 0; r < smaller(count, kGatherAhead); ++r) fetch(r);
    const auto fetching = [=](int64_t r) {
      if (r + kGatherAhead < count) fetch(r + kGatherAhead);
      return row(r);
    };
    gather_tile<T>(fetching, count, columns, out, rows, place);
  } else {
    gather_tile<T>([=](int64_t r) { return in + (first + r) * columns; }, count, columns, out, rows, place);
  }
}

}  // namespace
}  // namespace nvpflow::cpu

// KERNEL: a coupling's features of a tile or of a few rows: where they lie, or, if they do not follow each other, a
// copy of them.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "kernels.hpp"
#include "scratch.hpp"
#include "simd.hpp"

namespace nvpflow::cpu {
namespace {

/// The part of a tile [D][rows], or its copy in `copy` [count][rows].
template <class T>
NVPFLOW_INLINE T* take_features(const FeatureRows& part, T* state, T* copy, int64_t rows) {
  if (part.index == nullptr) return state + part.begin * rows;
  for (int64_t j = 0; j < part.count; ++j) {
    __builtin_memcpy(copy + j * rows, state + part.index[j] * rows, static_cast<size_t>(rows) * sizeof(T));
  }
  return copy;
}

/// Puts back what take_features copied.
template <class T>
NVPFLOW_INLINE void put_features(const FeatureRows& part, const T* taken, T* state, int64_t rows) {
  if (part.index == nullptr) return;
  for (int64_t j = 0; j < part.count; ++j) {
    __builtin_memcpy(state + part.index[j] * rows, taken + j * rows, static_cast<size_t>(rows) * sizeof(T));
  }
}

/// The part of a few rows, [rows][stride] from `first` on.
template <class T>
struct RowPart {
  T* first;
  int64_t stride;
};

/// As above of a few rows; copy: [rows][row_stride of the part], zero behind the part.
template <class T>
NVPFLOW_INLINE RowPart<T> take_features(const FeatureRows& part, const RowState<T>& s, T* copy) {
  if (part.index == nullptr) return {s.state + part.begin, s.stride};
  const int64_t stride = row_stride<T>(part.count);
  for (int64_t r = 0; r < s.rows; ++r) {
    T* to = copy + r * stride;
    for (int64_t j = part.count; j < stride; ++j) to[j] = T(0);
    for (int64_t j = 0; j < part.count; ++j) to[j] = s.state[r * s.stride + part.index[j]];
  }
  return {copy, stride};
}

template <class T>
NVPFLOW_INLINE void put_features(const FeatureRows& part, const RowPart<T>& taken, const RowState<T>& s) {
  if (part.index == nullptr) return;
  for (int64_t r = 0; r < s.rows; ++r) {
    for (int64_t j = 0; j < part.count; ++j) {
      s.state[r * s.stride + part.index[j]] = taken.first[r * taken.stride + j];
    }
  }
}

}  // namespace
}  // namespace nvpflow::cpu

// How numbers lie in a scratch or on a tape: whole vectors, the distances of rows, consecutive parts; the state of
// rows.
#pragma once

#include <stdint.h>

#include "round_up.hpp"
#include "simd.hpp"

namespace nvpflow::cpu {
namespace {

template <class T>
NVPFLOW_INLINE int64_t padded(int64_t n) {
  return round_up(n, kLanes<T>);
}

/// Distance between rows of n numbers: whole vectors, and never a multiple of 4096 bytes, or the rows of a block would
/// fight for the same few places of the first-level cache.
template <class T>
NVPFLOW_INLINE int64_t row_stride(int64_t n) {
  const int64_t stride = padded<T>(n);
  return stride % static_cast<int64_t>(4096 / sizeof(T)) == 0 ? stride + kLanes<T> : stride;
}

/// Hands out consecutive parts of one piece of memory; without memory it only counts them.
template <class T>
struct Carver {
  T* base;
  int64_t used = 0;

  T* take(int64_t count) {
    T* part = base == nullptr ? nullptr : base + used;
    used += count;
    return part;
  }
};

/// The context of rows on their way through the flow: feature-major in a tile, row-major of a few rows; or folded.
template <class T>
struct StateContext {
  const T* rows = nullptr;  // [C][rows], or [rows][row_stride(C)]
  int64_t stride = 0;       // of a few rows: row_stride(C)
  const T* folded = nullptr;
};

/// Feature-major numbers of a tile on their way through the flow.
template <class T>
struct TileState {
  T* state;    // [D][rows]
  T* log_det;  // [kLanes][rows]: partial sums
  T *buffer0, *buffer1;
  T* gathered;        // [D][rows]; null where Program::gathers is false
  int64_t rows;       // a multiple of the lanes
  T* kept = nullptr;  // [Program::kept_width][rows]
  StateContext<T> context = {};
};

/// Row-major numbers of a few rows on their way through the flow.
template <class T>
struct RowState {
  T* state;  // [rows][stride]
  int64_t stride;
  T* log_det;  // [rows][kLanes]: partial sums
  T *buffer0, *buffer1;
  T* gathered;  // [rows][row_stride(D)]; null where Program::gathers is false
  int64_t rows;
  T* kept = nullptr;  // [rows][row_stride(Program::kept_width)]
  StateContext<T> context = {};
};

}  // namespace
}  // namespace nvpflow::cpu

// The tape of a gradient tile, `rows` rows up to whole vectors: a fixed part, then the part of each layer, in order.
// What a layer keeps is in the file of its kind.
#pragma once

#include <stdint.h>

#include "base.inl"
#include "kernels.hpp"
#include "scratch.hpp"
#include "simd.hpp"

namespace nvpflow::cpu {
namespace {

NVPFLOW_INLINE int64_t units_of(int64_t rows) { return (rows + kGradientUnit - 1) / kGradientUnit; }

/// Elements that so many rows take.
NVPFLOW_INLINE int64_t elements(TapeSize size, int64_t rows) { return size.row * rows + size.unit * units_of(rows); }

/// state [D][rows], partial [kLanes][rows], log_prob [rows], two buffers of rows x max_width, cotangent [D][rows],
/// log_det_cotangent [rows], and, where a coupling gathers its features, a copy of them [D][rows]. With a
/// context the context of the rows and its cotangent, [rows][row_stride(C)]. base: what the base keeps.
template <class T>
struct FixedTape {
  T *state, *partial, *log_prob, *buffer0, *buffer1, *cotangent, *log_det_cotangent, *gathered, *context,
      *context_cotangent, *base, *layers;
  int64_t size;  // elements before `layers`

  FixedTape(const Program<T>& p, T* tape, int64_t rows) {
    Carver<T> carver{tape};
    state = carver.take(p.input_size * rows);
    partial = carver.take(kLanes<T> * rows);
    log_prob = carver.take(rows);
    buffer0 = carver.take(row_stride<T>(p.max_width) * rows);
    buffer1 = carver.take(row_stride<T>(p.max_width) * rows);
    cotangent = carver.take(p.input_size * rows);
    log_det_cotangent = carver.take(rows);
    gathered = carver.take(p.gathers ? p.input_size * rows : 0);
    const int64_t context_row = p.context_size == 0 ? 0 : row_stride<T>(p.context_size);
    context = carver.take(context_row * rows);
    context_cotangent = carver.take(context_row * rows);
    base = carver.take(elements(
        visit_base(p.base, [&]<class Density>(Density) { return Density::tape(p.base, p.input_size); }), rows));
    layers = carver.take(0);
    size = carver.used;
  }
};

template <class T>
int64_t tape_size(const Program<T>& program, int64_t rows) {
  return FixedTape<T>(program, nullptr, rows).size + elements(program.tape, rows);
}

}  // namespace
}  // namespace nvpflow::cpu

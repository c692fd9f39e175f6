// KERNEL: the tape of a gradient tile.
//
// One tile's numbers, in the order below; `rows` is the tile's rows up to whole vectors, widths are up to whole
// vectors where they are the columns of row-major parts:
//   fixed part        state [D][rows], partial [kLanes][rows], log_prob [rows], two buffers of rows x max_width,
//                     cotangent [D][rows], log_det cotangent [rows]
//   per coupling      s, exp(+-s), product [b][rows] each; input [rows][a]; per hidden layer value [rows][H] and, where
//                     kept, argument [rows][H]; cotangents per hidden layer [rows][H], of both heads [rows][2 b]
//   per standardize   output [D][rows]; per unit of rows, sums of the gradients of mean and log_std, [2 D]
#pragma once

#include <stdint.h>

#include "activations.inl"
#include "kernels.hpp"
#include "scratch.hpp"
#include "simd.hpp"

namespace nvpflow::cpu {
namespace {

template <class T>
struct FixedTape {
  T *state, *partial, *log_prob, *buffer0, *buffer1, *cotangent, *log_det_cotangent, *layers;
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
    layers = carver.take(0);
    size = carver.used;
  }
};

/// Elements of a row of hidden layer j: its value and, where kept, its argument.
template <class T>
int64_t hidden_tape(const Layer<T>& layer, int32_t j) {
  return row_stride<T>(layer.dense[j].out) * (keeps_argument(layer.activation) ? 2 : 1);
}

NVPFLOW_INLINE int64_t units_of(int64_t rows) { return (rows + kGradientUnit - 1) / kGradientUnit; }

template <class T>
int64_t layer_tape(const Program<T>& program, const Layer<T>& layer, int64_t rows) {
  if (layer.kind == Kind::standardize) {
    return program.input_size * rows + row_stride<T>(2 * program.input_size) * units_of(rows);
  }
  int64_t n = 3 * layer.b_count + row_stride<T>(layer.a_count);
  for (int32_t j = 0; j < layer.num_dense; ++j) {
    n += row_stride<T>(layer.dense[j].out);
    if (j + 1 < layer.num_dense) n += hidden_tape(layer, j);
  }
  return n * rows;
}

template <class T>
int64_t tape_size(const Program<T>& program, int64_t rows) {
  int64_t n = FixedTape<T>(program, nullptr, rows).size;
  for (int64_t k = 0; k < program.num_layers; ++k) n += layer_tape(program, program.layers[k], rows);
  return n;
}

template <class T>
struct CouplingTape {
  T *s, *scale, *product;  // product: d(output) / d(s)
  T* input;
  T* hidden;      // values and arguments of the hidden layers, one after the other
  T* cotangents;  // of the outputs of the dense layers

  CouplingTape(const Layer<T>& layer, T* tape, int64_t rows) {
    s = tape;
    scale = s + layer.b_count * rows;
    product = scale + layer.b_count * rows;
    input = product + layer.b_count * rows;
    hidden = input + row_stride<T>(layer.a_count) * rows;
    cotangents = hidden;
    for (int32_t j = 0; j + 1 < layer.num_dense; ++j) cotangents += hidden_tape(layer, j) * rows;
  }

  T* value(const Layer<T>& layer, int32_t j, int64_t rows) const {
    T* p = hidden;
    for (int32_t i = 0; i < j; ++i) p += hidden_tape(layer, i) * rows;
    return p;
  }
  T* argument(const Layer<T>& layer, int32_t j, int64_t rows) const {
    T* p = value(layer, j, rows);
    return keeps_argument(layer.activation) ? p + row_stride<T>(layer.dense[j].out) * rows : p;
  }
  /// What dense layer j reads.
  const T* input_of(const Layer<T>& layer, int32_t j, int64_t rows) const {
    return j == 0 ? input : value(layer, j - 1, rows);
  }
  T* cotangent(const Layer<T>& layer, int32_t j, int64_t rows) const {
    T* p = cotangents;
    for (int32_t i = 0; i < j; ++i) p += row_stride<T>(layer.dense[i].out) * rows;
    return p;
  }
};

template <class T>
T* layer_tape_at(const Program<T>& program, int64_t layer, T* layers, int64_t rows) {
  for (int64_t k = 0; k < layer; ++k) layers += layer_tape(program, program.layers[k], rows);
  return layers;
}

}  // namespace
}  // namespace nvpflow::cpu

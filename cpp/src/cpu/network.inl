// KERNEL: the network of a coupling: hidden layers and the head behind them, on a tile, on a few rows, and there and
// back with a tape.
#pragma once

#include <stdint.h>

#include "activations.inl"
#include "blocks.hpp"
#include "dense_few.inl"
#include "dense_outer.inl"
#include "dense_rows.inl"
#include "dense_tile.inl"
#include "hidden_and_head.inl"
#include "kernels.hpp"
#include "scratch.hpp"
#include "simd.hpp"
#include "tape.inl"

namespace nvpflow::cpu {
namespace {

/// The conditioner in one kernel, where there is one for it. Returns whether it ran.
template <class T>
bool conditioner_at_once(const Layer<T>& layer, const T* x, T* y, int64_t rows) {
  if constexpr (kHasHiddenHead<T>) {
    if (layer.num_dense != 2 || layer.activation != Act::relu) return false;
    const Dense<T>&hidden = layer.dense[0], &head = layer.dense[1];
    if (!head.wide_blocks || head.in % kHeadUnits != 0 || head.segment % kHeadUnits != 0) return false;
    return hidden_and_head_of<T>(hidden, head, x, y, rows);
  } else {
    return false;
  }
}

/// The conditioner on a tile: x is its input [a_count][rows]; returns [u_s, t] [2 b_count][rows], in one of the
/// buffers.
template <class T>
const T* conditioner_tile(const Layer<T>& layer, const T* x, T* buffer0, T* buffer1, int64_t rows) {
  if (conditioner_at_once<T>(layer, x, buffer0, rows)) return buffer0;
  for (int32_t j = 0; j < layer.num_dense; ++j) {
    const bool head = j + 1 == layer.num_dense;
    T* y = j % 2 == 0 ? buffer0 : buffer1;
    const Act act = head ? Act::none : layer.activation;
    dense_tile<T>(layer.dense[j], x, y, rows, act);
    if (needs_pass(act)) activate<T>(act, y, y, layer.dense[j].out * rows);
    x = y;
  }
  return x;
}

/// Row-major numbers of a few rows on their way through the flow.
template <class T>
struct RowState {
  T* state;  // [rows][stride]
  int64_t stride;
  T* log_det;  // [rows][kLanes]: partial sums
  T *buffer0, *buffer1;
  int64_t rows;
};

template <class T>
const T* conditioner_rows(const Layer<T>& layer, const RowState<T>& s) {
  const T* x = s.state + layer.a_begin;
  int64_t stride = s.stride;
  for (int32_t j = 0; j < layer.num_dense; ++j) {
    const Dense<T>& d = layer.dense[j];
    const Act act = j + 1 == layer.num_dense ? Act::none : layer.activation;
    const int64_t y_stride = row_stride<T>(d.out);
    T* y = j % 2 == 0 ? s.buffer0 : s.buffer1;
    if (d.narrow == nullptr) {
      dense_few_rows<T>(FullWeights<T>{d}, x, stride, y, y_stride, s.rows, act);
    } else if constexpr (sizeof(T) == 4) {
      dense_few_rows<T>(NarrowWeights{d}, x, stride, y, y_stride, s.rows, act);
    }
    if (needs_pass(act)) activate<T>(act, y, y, s.rows * y_stride);
    x = y;
    stride = y_stride;
  }
  return x;
}

/// The conditioner on `count` rows, row-major from the tape's input to [u_s, t] [count][2 b] in `head`.
template <class T>
void conditioner_taped(const Layer<T>& layer, const CouplingTape<T>& keep, T* head, int64_t count, int64_t rows) {
  for (int32_t j = 0; j < layer.num_dense; ++j) {
    const Dense<T>& d = layer.dense[j];
    const bool last = j + 1 == layer.num_dense;
    const Act act = last ? Act::none : layer.activation;
    const int64_t stride = row_stride<T>(d.out);
    T* y = last ? head : keep.argument(layer, j, rows);
    dense_rows<T>(d, keep.input_of(layer, j, rows), row_stride<T>(d.in), y, stride, count, act);
    if (needs_pass(act)) activate<T>(act, y, keep.value(layer, j, rows), count * stride);
  }
}

template <class T>
void coupling_weight_gradient(const Layer<T>& layer, int32_t j, int64_t first, int64_t last, const TileTapes<T>& tapes,
                              T* gradient, bool add) {
  const int64_t rows = tapes.rows;
  const CouplingTape<T> keep(layer, const_cast<T*>(tapes.first), rows);
  const Dense<T>& d = layer.dense[j];
  const bool heads = j + 1 == layer.num_dense;
  const DenseGradient& one = layer.gradients[j];
  const DenseGradient& two = layer.gradients[heads ? j + 1 : j];
  const int64_t n[2] = {one.out, heads ? two.out : 0};
  const OuterProduct<T> p = {keep.input_of(layer, j, rows),
                             row_stride<T>(d.in),
                             keep.cotangent(layer, j, rows),
                             row_stride<T>(d.out),
                             tapes.count,
                             rows,
                             tapes.stride,
                             d.out};
  outer_product<T>(p, first, last,
                   {{{gradient + one.kernel_offset, gradient + two.kernel_offset}, {n[0], n[1]}, add},
                    {{gradient + one.bias_offset, gradient + two.bias_offset}, {n[0], n[1]}, add}});
}

/// The layer without a bias whose inputs are the outputs of `d`, and whose outputs its inputs.
template <class T>
NVPFLOW_INLINE Dense<T> exchanged(const Dense<T>& d) {
  Dense<T> layer;
  layer.weights = d.transposed;
  layer.in = d.out;
  layer.out = d.in;
  layer.segment = d.out;
  layer.far = d.far;
  layer.wide_blocks = d.wide_blocks;
  return layer;
}

/// Cotangent of the input of dense layer j, W times that of its output, both row-major; where the input is a hidden
/// layer's value, of that layer's argument.
template <class T>
void dense_backward(const Layer<T>& layer, const CouplingTape<T>& keep, int32_t j, const T* g_out, T* g_in,
                    int64_t count, int64_t rows) {
  const Dense<T>& d = layer.dense[j];
  const Dense<T> transposed = exchanged(d);
  const int64_t out_stride = row_stride<T>(d.out), in_stride = row_stride<T>(d.in);
  if (d.paired) return dense_rows_paired<T>(d, g_out, out_stride, g_in, count);
  if (j == 0) return dense_rows<T>(transposed, g_out, out_stride, g_in, in_stride, count, Act::none);
  const T* value = keep.value(layer, j - 1, rows);
  if (layer.activation == Act::relu) {
    const auto finish = [=](int64_t row, int64_t unit, Vec<T> g) __attribute__((always_inline)) {
      const Vec<T> derivative = activation_derivative<T>(Act::relu, load<T>(value + row * in_stride + unit), Vec<T>{});
      return g * derivative;  // not a selection: NaN must stay
    };
    return dense_rows_finish<T>(transposed, g_out, out_stride, g_in, in_stride, count, finish);
  }
  dense_rows<T>(transposed, g_out, out_stride, g_in, in_stride, count, Act::none);
  const T* argument = keep.argument(layer, j - 1, rows);
  for (int64_t i = 0; i < count * in_stride; i += kLanes<T>) {
    const Vec<T> derivative = activation_derivative<T>(layer.activation, load<T>(value + i), load<T>(argument + i));
    store<T>(g_in + i, load<T>(g_in + i) * derivative);
  }
}

}  // namespace
}  // namespace nvpflow::cpu

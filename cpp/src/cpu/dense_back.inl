// KERNEL: a dense layer on the way back: the cotangents of its inputs from those of its outputs, row-major, and where
// the gradients of its weights go.
#pragma once

#include <stdint.h>

#include "activations.inl"
#include "dense_outer.inl"
#include "dense_rows.inl"
#include "kernels.hpp"
#include "scratch.hpp"
#include "simd.hpp"
#include "tile.inl"

namespace nvpflow::cpu {
namespace {

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

/// g_in = W g_out; of a first layer that is paired, in its two parts.
template <class T>
void dense_back(const Dense<T>& d, const T* g_out, T* g_in, int64_t count) {
  if (d.paired) return dense_rows_paired<T>(d, g_out, row_stride<T>(d.out), g_in, count);
  dense_rows<T>(exchanged(d), g_out, row_stride<T>(d.out), g_in, row_stride<T>(d.in), count, Act::none);
}

/// Times the derivative of the activation, of which `value` or `argument` are kept: keeps_argument.
template <class T>
void activation_back(Act act, const T* value, const T* argument, T* g, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes<T>) {
    const Vec<T> derivative = activation_derivative<T>(act, load<T>(value + i), load<T>(argument + i));
    store<T>(g + i, load<T>(g + i) * derivative);
  }
}

/// dense_back of a layer whose inputs are the values of an activation, to the cotangents of its arguments.
template <class T>
void dense_back(const Dense<T>& d, Act act, const T* value, const T* argument, const T* g_out, T* g_in, int64_t count) {
  const int64_t in_stride = row_stride<T>(d.in);
  if (act == Act::relu) {
    const auto finish = [=](int64_t row, int64_t unit, Vec<T> g) __attribute__((always_inline)) {
      const Vec<T> derivative = activation_derivative<T>(Act::relu, load<T>(value + row * in_stride + unit), Vec<T>{});
      return g * derivative;  // not a selection: NaN must stay
    };
    return dense_rows_finish<T>(exchanged(d), g_out, row_stride<T>(d.out), g_in, in_stride, count, finish);
  }
  dense_back<T>(d, g_out, g_in, count);
  activation_back<T>(act, value, argument, g_in, count * in_stride);
}

/// The cotangent of a network's inputs, from that of the outputs of its first layer, is added to a [in][rows]. by_row,
/// by_feature: scratch.
template <class T>
void add_input_cotangent(const Dense<T>& d, const T* g_out, T* by_row, T* by_feature, T* a, int64_t count,
                         int64_t rows) {
  const int64_t stride = row_stride<T>(d.in);
  dense_back<T>(d, g_out, by_row, count);
  const int64_t parts = d.paired ? 2 : 1;  // of each input's cotangent
  gather_tile<T>([&](int64_t r) { return by_row + r * stride; }, count, parts * d.in, by_feature, rows);
  const T* g = by_feature;
  for (int64_t i = 0; i < d.in; ++i, a += rows, g += parts * rows) {
    for (int64_t r = 0; r < rows; r += kLanes<T>) {
      const Vec<T> sum = parts == 2 ? load<T>(g + r) + load<T>(g + rows + r) : load<T>(g + r);
      store<T>(a + r, load<T>(a + r) + sum);
    }
  }
}

/// Adds the cotangent of the context [count][row_stride(C)], from that of the outputs of a first layer. d: what reads
/// the context.
template <class T>
void add_context_cotangent(const Dense<T>& d, const T* g_out, T* scratch, T* context_cotangent, int64_t count) {
  dense_back<T>(d, g_out, scratch, count);
  const int64_t size = count * row_stride<T>(d.in);
  for (int64_t i = 0; i < size; i += kLanes<T>) {
    store<T>(context_cotangent + i, load<T>(context_cotangent + i) + load<T>(scratch + i));
  }
}

/// The gradient of a dense layer, inputs [first, last), and of its bias with the first of them, from its inputs x and
/// its outputs' cotangents g on the first tape. to: where it goes, of the heads several.
template <class T>
void dense_gradient(const Dense<T>& d, const DenseGradient* to, const T* x, const T* g, int64_t first, int64_t last,
                    const TileTapes<T>& tapes, T* gradient, bool add) {
  DenseColumns<T> columns = {{{}, {}, add}, {{}, {}, add}};
  int64_t outputs = 0;
  for (int part = 0; part < kMaxHeads && outputs < d.out; outputs += to[part].out, ++part) {
    columns.kernel.to[part] = gradient + to[part].kernel_offset;
    columns.kernel.n[part] = to[part].out;
    if (to[part].bias_offset < 0) continue;
    columns.bias.to[part] = gradient + to[part].bias_offset;
    columns.bias.n[part] = to[part].out;
  }
  const OuterProduct<T> p = {
      x, row_stride<T>(d.in), g, row_stride<T>(d.out), tapes.count, tapes.rows, tapes.stride, tapes.stride, d.out};
  outer_product<T>(p, first, last, columns);
}

}  // namespace
}  // namespace nvpflow::cpu

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
#include "tile.inl"

namespace nvpflow::cpu {
namespace {

/// The network in one kernel, where there is one for it. Returns whether it ran.
template <class T>
bool network_at_once(const Network<T>& net, const T* x, T* y, int64_t rows) {
  if constexpr (kHasHiddenHead<T>) {
    if (net.num_dense != 2 || net.activation != Act::relu) return false;
    const Dense<T>&hidden = net.dense[0], &head = net.dense[1];
    if (!head.wide_blocks || head.in % kHeadUnits != 0 || head.segment % kHeadUnits != 0) return false;
    return hidden_and_head_of<T>(hidden, head, x, y, rows);
  } else {
    return false;
  }
}

/// The network on a tile: x is its input [in][rows]; returns the head's outputs [out][rows], in one of the
/// buffers.
template <class T>
const T* network_tile(const Network<T>& net, const T* x, T* buffer0, T* buffer1, int64_t rows) {
  if (network_at_once<T>(net, x, buffer0, rows)) return buffer0;
  for (int32_t j = 0; j < net.num_dense; ++j) {
    const bool head = j + 1 == net.num_dense;
    T* y = j % 2 == 0 ? buffer0 : buffer1;
    const Act act = head ? Act::none : net.activation;
    dense_tile<T>(net.dense[j], x, y, rows, act);
    if (needs_pass(act)) activate<T>(act, y, y, net.dense[j].out * rows);
    x = y;
  }
  return x;
}

/// The network on a few rows; x is its input [rows][stride]; returns the head's outputs [rows][out], in one of the
/// buffers.
template <class T>
const T* network_rows(const Network<T>& net, const T* x, int64_t stride, const RowState<T>& s) {
  for (int32_t j = 0; j < net.num_dense; ++j) {
    const Dense<T>& d = net.dense[j];
    const Act act = j + 1 == net.num_dense ? Act::none : net.activation;
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

/// Elements of a row of hidden layer j: its value and, where kept, its argument.
template <class T>
int64_t hidden_tape(const Network<T>& net, int32_t j) {
  return row_stride<T>(net.dense[j].out) * (keeps_argument(net.activation) ? 2 : 1);
}

/// Elements of a row of a network's tape.
template <class T>
int64_t network_tape(const Network<T>& net) {
  int64_t n = row_stride<T>(net.dense[0].in);
  for (int32_t j = 0; j < net.num_dense; ++j) {
    n += row_stride<T>(net.dense[j].out);
    if (j + 1 < net.num_dense) n += hidden_tape(net, j);
  }
  return n;
}

/// What a network keeps for the way back, row-major: input [rows][in]; per hidden layer value [rows][H] and, where
/// kept, argument [rows][H]; cotangents per hidden layer [rows][H], of the head [rows][out]. Columns are up to whole
/// vectors.
template <class T>
struct NetworkTape {
  T* input;
  T* hidden;      // values and arguments of the hidden layers, one after the other
  T* cotangents;  // of the outputs of the dense layers

  NetworkTape(const Network<T>& net, T* tape, int64_t rows) {
    input = tape;
    hidden = input + row_stride<T>(net.dense[0].in) * rows;
    cotangents = hidden;
    for (int32_t j = 0; j + 1 < net.num_dense; ++j) cotangents += hidden_tape(net, j) * rows;
  }

  T* value(const Network<T>& net, int32_t j, int64_t rows) const {
    T* p = hidden;
    for (int32_t i = 0; i < j; ++i) p += hidden_tape(net, i) * rows;
    return p;
  }
  T* argument(const Network<T>& net, int32_t j, int64_t rows) const {
    T* p = value(net, j, rows);
    return keeps_argument(net.activation) ? p + row_stride<T>(net.dense[j].out) * rows : p;
  }
  /// What dense layer j reads.
  const T* input_of(const Network<T>& net, int32_t j, int64_t rows) const {
    return j == 0 ? input : value(net, j - 1, rows);
  }
  T* cotangent(const Network<T>& net, int32_t j, int64_t rows) const {
    T* p = cotangents;
    for (int32_t i = 0; i < j; ++i) p += row_stride<T>(net.dense[i].out) * rows;
    return p;
  }
};

/// The network on `count` rows, row-major from the tape's input to the head's outputs [count][out] in `head`.
template <class T>
void network_taped(const Network<T>& net, const NetworkTape<T>& keep, T* head, int64_t count, int64_t rows) {
  for (int32_t j = 0; j < net.num_dense; ++j) {
    const Dense<T>& d = net.dense[j];
    const bool last = j + 1 == net.num_dense;
    const Act act = last ? Act::none : net.activation;
    const int64_t stride = row_stride<T>(d.out);
    T* y = last ? head : keep.argument(net, j, rows);
    dense_rows<T>(d, keep.input_of(net, j, rows), row_stride<T>(d.in), y, stride, count, act);
    if (needs_pass(act)) activate<T>(act, y, keep.value(net, j, rows), count * stride);
  }
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
void dense_backward(const Network<T>& net, const NetworkTape<T>& keep, int32_t j, const T* g_out, T* g_in,
                    int64_t count, int64_t rows) {
  const Dense<T>& d = net.dense[j];
  const Dense<T> transposed = exchanged(d);
  const int64_t out_stride = row_stride<T>(d.out), in_stride = row_stride<T>(d.in);
  if (d.paired) return dense_rows_paired<T>(d, g_out, out_stride, g_in, count);
  if (j == 0) return dense_rows<T>(transposed, g_out, out_stride, g_in, in_stride, count, Act::none);
  const T* value = keep.value(net, j - 1, rows);
  if (net.activation == Act::relu) {
    const auto finish = [=](int64_t row, int64_t unit, Vec<T> g) __attribute__((always_inline)) {
      const Vec<T> derivative = activation_derivative<T>(Act::relu, load<T>(value + row * in_stride + unit), Vec<T>{});
      return g * derivative;  // not a selection: NaN must stay
    };
    return dense_rows_finish<T>(transposed, g_out, out_stride, g_in, in_stride, count, finish);
  }
  dense_rows<T>(transposed, g_out, out_stride, g_in, in_stride, count, Act::none);
  const T* argument = keep.argument(net, j - 1, rows);
  for (int64_t i = 0; i < count * in_stride; i += kLanes<T>) {
    const Vec<T> derivative = activation_derivative<T>(net.activation, load<T>(value + i), load<T>(argument + i));
    store<T>(g_in + i, load<T>(g_in + i) * derivative);
  }
}

/// From the cotangent of the head's outputs, head [out][rows], to those of all dense layers' outputs, on the tape. With
/// input_cotangent [in][rows], that of the inputs is added to it; then head and buffer serve as scratch.
template <class T>
void network_backward(const Network<T>& net, const NetworkTape<T>& keep, T* head, T* buffer, T* input_cotangent,
                      int64_t count, int64_t rows) {
  const int32_t last = net.num_dense - 1;
  const int64_t a_stride = row_stride<T>(net.dense[0].in), head_stride = row_stride<T>(net.dense[last].out);
  scatter_tile<T>(head, rows, count, net.dense[last].out, keep.cotangent(net, last, rows), head_stride);
  for (int32_t j = last; j > 0; --j) {
    dense_backward<T>(net, keep, j, keep.cotangent(net, j, rows), keep.cotangent(net, j - 1, rows), count, rows);
  }
  if (input_cotangent == nullptr) return;
  T* by_row = head;
  T* g = buffer;
  dense_backward<T>(net, keep, 0, keep.cotangent(net, 0, rows), by_row, count, rows);
  const int64_t parts = net.dense[0].paired ? 2 : 1;  // of each input's cotangent
  gather_tile<T>([&](int64_t r) { return by_row + r * a_stride; }, count, parts * net.dense[0].in, g, rows);
  T* a = input_cotangent;
  for (int64_t i = 0; i < net.dense[0].in; ++i, a += rows, g += parts * rows) {
    for (int64_t r = 0; r < rows; r += kLanes<T>) {
      const Vec<T> sum = parts == 2 ? load<T>(g + r) + load<T>(g + rows + r) : load<T>(g + r);
      store<T>(a + r, load<T>(a + r) + sum);
    }
  }
}

/// Of dense layer j, inputs [first, last), and of its bias with the first of them. tapes: of the network.
template <class T>
void network_weight_gradient(const Network<T>& net, int32_t j, int64_t first, int64_t last, const TileTapes<T>& tapes,
                             T* gradient, bool add) {
  const int64_t rows = tapes.rows;
  const NetworkTape<T> keep(net, const_cast<T*>(tapes.first), rows);
  const Dense<T>& d = net.dense[j];
  const bool heads = j + 1 == net.num_dense && net.num_heads > 1;
  const DenseGradient& one = net.gradients[j];
  const DenseGradient& two = net.gradients[heads ? j + 1 : j];
  const int64_t n[2] = {one.out, heads ? two.out : 0};
  const OuterProduct<T> p = {keep.input_of(net, j, rows),
                             row_stride<T>(d.in),
                             keep.cotangent(net, j, rows),
                             row_stride<T>(d.out),
                             tapes.count,
                             rows,
                             tapes.stride,
                             d.out};
  outer_product<T>(p, first, last,
                   {{{gradient + one.kernel_offset, gradient + two.kernel_offset}, {n[0], n[1]}, add},
                    {{gradient + one.bias_offset, gradient + two.bias_offset}, {n[0], n[1]}, add}});
}

}  // namespace
}  // namespace nvpflow::cpu

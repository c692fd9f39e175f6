// KERNEL: a multilayer perceptron, hidden layers and the head behind them: on a tile, on a few rows, and there and back
// with a tape.
#pragma once

#include <stdint.h>

#include "activations.inl"
#include "dense_back.inl"
#include "dense_few.inl"
#include "dense_rows.inl"
#include "dense_tile.inl"
#include "first_layer.inl"
#include "hidden_and_head.inl"
#include "kernels.hpp"
#include "layer_norm.inl"
#include "scratch.hpp"
#include "simd.hpp"

namespace nvpflow::cpu {
namespace {

/// The network in one kernel, where there is one for it. Returns whether it ran.
template <class T>
bool mlp_at_once(const Network<T>& net, const T* x, T* y, int64_t rows) {
  if constexpr (kHasHiddenHead<T>) {
    if (net.num_dense != 2 || net.activation != Act::relu || net.layer_norm) return false;
    if (net.context != nullptr) return false;
    const Dense<T>&hidden = net.dense[0], &head = net.dense[1];
    if (!head.wide_blocks || head.in % kHeadUnits != 0 || head.segment % kHeadUnits != 0) return false;
    return hidden_and_head_of<T>(hidden, head, x, y, rows);
  } else {
    return false;
  }
}

/// network_tile.
template <class T>
const T* mlp_tile(const Network<T>& net, const T* x, const StateContext<T>& context, T* buffer0, T* buffer1,
                  int64_t rows) {
  if (mlp_at_once<T>(net, x, buffer0, rows)) return buffer0;
  for (int32_t j = 0; j < net.num_dense; ++j) {
    const bool head = j + 1 == net.num_dense;
    T* y = j % 2 == 0 ? buffer0 : buffer1;
    const Act act = head ? Act::none : net.activation;
    if (j == 0) {
      first_tile<T>(net, x, context, y, rows, act);
    } else {
      dense_tile<T>(net.dense[j], x, y, rows, act);
    }
    if (needs_pass(act)) activate<T>(act, y, y, net.dense[j].out * rows);
    if (net.layer_norm && !head) layer_norm_tile<T>(y, net.dense[j].out, rows);
    x = y;
  }
  return x;
}

/// network_rows. plain: of a plain layer.
template <class T, bool plain = false>
NVPFLOW_INLINE const T* mlp_rows(const Network<T>& net, const T* x, int64_t stride, const RowState<T>& s) {
  for (int32_t j = 0; j < net.num_dense; ++j) {
    const Dense<T>& d = net.dense[j];
    const bool head = j + 1 == net.num_dense;
    const Act act = head ? Act::none : net.activation;
    const int64_t y_stride = row_stride<T>(d.out);
    T* y = j % 2 == 0 ? s.buffer0 : s.buffer1;
    if (!plain && j == 0 && net.context != nullptr) {
      context_layer_rows<T>(net, x, stride, y, y_stride, s, act);
    } else if constexpr (plain) {
      dense_few_inlined<T>(d, x, stride, y, y_stride, s.rows, act);
    } else {
      dense_few<T>(d, x, stride, y, y_stride, s.rows, act);
    }
    if (needs_pass(act)) activate<T>(act, y, y, s.rows * y_stride);
    if (!plain && net.layer_norm && !head) layer_norm_rows<T>(y, y, d.out, y_stride, s.rows, nullptr);
    x = y;
    stride = y_stride;
  }
  return x;
}

/// What a network keeps for the way back, row-major: input [rows][in]; of each hidden layer what the next layer reads
/// [rows][H] and, where the way back needs it, what that was made from [rows][H]: the activation's argument, or, with
/// layer_norm, its value, and 1 / the standard deviations [rows]; cotangents of each hidden layer [rows][H], of the
/// head [rows][out]. Columns are up to whole vectors.
template <class T>
struct MlpTape {
  T* input;
  T* hidden;      // of the hidden layers, one after the other
  T* cotangents;  // of the outputs of the dense layers

  /// Hidden layers keep more than what the next layer reads.
  static bool keeps_two(const Network<T>& net) { return net.layer_norm || keeps_argument(net.activation); }
  /// Elements of a row of hidden layer j.
  static int64_t hidden_size(const Network<T>& net, int32_t j) {
    return row_stride<T>(net.dense[j].out) * (keeps_two(net) ? 2 : 1) + (net.layer_norm ? 1 : 0);
  }

  static TapeSize size(const Network<T>& net) {
    int64_t n = row_stride<T>(net.dense[0].in);
    for (int32_t j = 0; j < net.num_dense; ++j) {
      n += row_stride<T>(net.dense[j].out);
      if (j + 1 < net.num_dense) n += hidden_size(net, j);
    }
    return {n, 0};
  }

  MlpTape(const Network<T>& net, T* tape, int64_t rows) {
    input = tape;
    hidden = input + row_stride<T>(net.dense[0].in) * rows;
    cotangents = hidden;
    for (int32_t j = 0; j + 1 < net.num_dense; ++j) cotangents += hidden_size(net, j) * rows;
  }

  /// What the layer behind hidden layer j reads.
  T* value(const Network<T>& net, int32_t j, int64_t rows) const {
    T* p = hidden;
    for (int32_t i = 0; i < j; ++i) p += hidden_size(net, i) * rows;
    return p;
  }
  /// The activation's argument, or its value; value() where nothing else is kept.
  T* before(const Network<T>& net, int32_t j, int64_t rows) const {
    T* p = value(net, j, rows);
    return keeps_two(net) ? p + row_stride<T>(net.dense[j].out) * rows : p;
  }
  /// With layer_norm: 1 / the standard deviations.
  T* factors(const Network<T>& net, int32_t j, int64_t rows) const {
    return value(net, j, rows) + 2 * row_stride<T>(net.dense[j].out) * rows;
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

/// The network on `count` rows, row-major from the tape's input to the head's outputs [count][out] in `head`. context:
/// [count][row_stride(C)].
template <class T>
void mlp_taped(const Network<T>& net, const MlpTape<T>& keep, const T* context, T* head, int64_t count, int64_t rows) {
  for (int32_t j = 0; j < net.num_dense; ++j) {
    const Dense<T>& d = net.dense[j];
    const bool last = j + 1 == net.num_dense;
    const Act act = last ? Act::none : net.activation;
    const int64_t stride = row_stride<T>(d.out);
    T* y = last ? head : keep.before(net, j, rows);
    if (j == 0) {
      first_many_rows<T>(net, keep.input, context, y, stride, count, act);
    } else {
      dense_rows<T>(d, keep.input_of(net, j, rows), row_stride<T>(d.in), y, stride, count, act);
    }
    if (last) break;
    T* value = keep.value(net, j, rows);
    T* activated = net.layer_norm && !keeps_argument(act) ? y : value;
    if (needs_pass(act)) activate<T>(act, y, activated, count * stride);
    if (net.layer_norm) {
      layer_norm_rows<T>(activated, value, d.out, stride, count, keep.factors(net, j, rows));
    }
  }
}

/// From the cotangent of the outputs of dense layer j > 0 to that of the layer's before it.
template <class T>
void mlp_back(const Network<T>& net, const MlpTape<T>& keep, int32_t j, int64_t count, int64_t rows) {
  const Dense<T>& d = net.dense[j];
  const T *g_out = keep.cotangent(net, j, rows), *value = keep.value(net, j - 1, rows);
  const T* before = keep.before(net, j - 1, rows);
  T* g_in = keep.cotangent(net, j - 1, rows);
  if (!net.layer_norm) return dense_back<T>(d, net.activation, value, before, g_out, g_in, count);
  const int64_t stride = row_stride<T>(d.in);
  dense_back<T>(d, g_out, g_in, count);
  layer_norm_backward<T>(value, keep.factors(net, j - 1, rows), g_in, d.in, stride, count);
  activation_back<T>(net.activation, before, before, g_in, count * stride);
}

/// From the cotangent of the head's outputs to those of the other layers'.
template <class T>
void mlp_backward(const Network<T>& net, const MlpTape<T>& keep, int64_t count, int64_t rows) {
  for (int32_t j = net.num_dense - 1; j > 0; --j) mlp_back<T>(net, keep, j, count, rows);
}

}  // namespace
}  // namespace nvpflow::cpu

// KERNEL: the gates of residual blocks, sigmoid(W c + b) of the context c, which scale what a block adds to h: by rows,
// or of one context for all rows, whose gates are numbers in its folded form.
#pragma once

#include <stdint.h>

#include "activations.inl"
#include "dense_few.inl"
#include "dense_rows.inl"
#include "dense_tile.inl"
#include "kernels.hpp"
#include "scratch.hpp"
#include "simd.hpp"

namespace nvpflow::cpu {
namespace {

/// to = h + change.
template <class T>
void add_change(const T* h, const T* change, T* to, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes<T>) store<T>(to + i, load<T>(h + i) + load<T>(change + i));
}

/// to = h + change gate.
template <class T>
void add_gated(const T* h, const T* change, const T* gate, T* to, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes<T>) {
    store<T>(to + i, fma(load<T>(change + i), load<T>(gate + i), load<T>(h + i)));
  }
}

/// Where a block's gates lie among those of all blocks.
template <class T>
NVPFLOW_INLINE int64_t gate_offset(const Network<T>& net, int32_t block) {
  return block * padded<T>(net.dense[0].out);
}

/// The gates of one context row [C], of all blocks one after the other.
template <class T>
void fold_gates(const Network<T>& net, int32_t blocks, const T* context, T* folded) {
  const int64_t width = padded<T>(net.dense[0].out);
  for (int32_t block = 0; block < blocks; ++block) {
    const Dense<T>& gate = net.gates[block];
    T* to = folded + gate_offset(net, block);
    dense_few<T>(gate, context, row_stride<T>(gate.in), to, width, 1, Act::none);
    activate<T>(Act::sigmoid, to, to, width);
  }
}

/// h += change, times the gates where there are any, on a tile; gate: scratch.
template <class T>
void leave_block_tile(const Network<T>& net, int32_t block, const StateContext<T>& context, const T* change, T* gate,
                      T* h, int64_t rows) {
  const int64_t width = net.dense[0].out;
  if (net.gates == nullptr) return add_change<T>(h, change, h, width * rows);
  if (context.folded == nullptr) {
    dense_tile<T>(net.gates[block], context.rows, gate, rows, Act::none);
    activate<T>(Act::sigmoid, gate, gate, width * rows);
    return add_gated<T>(h, change, gate, h, width * rows);
  }
  const T* gates = context.folded + net.gate_fold + gate_offset(net, block);
  for (int64_t j = 0; j < width; ++j) {
    const Vec<T> of_unit = set1(gates[j]);
    for (int64_t i = j * rows; i < (j + 1) * rows; i += kLanes<T>) {
      store<T>(h + i, fma(load<T>(change + i), of_unit, load<T>(h + i)));
    }
  }
}

/// The same of a few rows, `stride` apart.
template <class T>
void leave_block_rows(const Network<T>& net, int32_t block, const StateContext<T>& context, const T* change, T* gate,
                      T* h, int64_t stride, int64_t rows) {
  if (net.gates == nullptr) return add_change<T>(h, change, h, rows * stride);
  if (context.folded == nullptr) {
    dense_few<T>(net.gates[block], context.rows, context.stride, gate, stride, rows, Act::none);
    activate<T>(Act::sigmoid, gate, gate, rows * stride);
    return add_gated<T>(h, change, gate, h, rows * stride);
  }
  const int64_t width = padded<T>(net.dense[0].out);
  const T* gates = context.folded + net.gate_fold + gate_offset(net, block);
  for (int64_t r = 0; r < rows; ++r, change += stride, h += stride) add_gated<T>(h, change, gates, h, width);
}

/// The same of `count` rows, which leave the gates in `gate`; context: [count][row_stride(C)].
template <class T>
void leave_block_taped(const Network<T>& net, int32_t block, const T* context, const T* h, const T* change, T* gate,
                       T* to, int64_t stride, int64_t count) {
  if (net.gates == nullptr) return add_change<T>(h, change, to, count * stride);
  const Dense<T>& d = net.gates[block];
  dense_rows<T>(d, context, row_stride<T>(d.in), gate, stride, count, Act::none);
  activate<T>(Act::sigmoid, gate, gate, count * stride);
  add_gated<T>(h, change, gate, to, count * stride);
}

/// From the cotangent g of h behind a block to those of the change and of the gates' arguments.
template <class T>
void gate_backward(const T* g, const T* change, const T* gate, T* of_change, T* of_gate, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes<T>) {
    const Vec<T> scaled = load<T>(g + i) * load<T>(gate + i);
    store<T>(of_change + i, scaled);
    store<T>(of_gate + i, scaled * load<T>(change + i) * (T(1) - load<T>(gate + i)));
  }
}

}  // namespace
}  // namespace nvpflow::cpu

// KERNEL: the first dense layer of a network, which reads [x_a, c]: what the context makes comes first, by rows or as a
// bias, and what the features make is added to it.
#pragma once

#include <stdint.h>

#include "dense_few.inl"
#include "dense_rows.inl"
#include "dense_tile.inl"
#include "kernels.hpp"
#include "scratch.hpp"
#include "simd.hpp"

namespace nvpflow::cpu {
namespace {

/// The part that reads the features: it adds to what is in its output, or has the folded context for a bias.
template <class T>
NVPFLOW_INLINE Dense<T> after_context(const Network<T>& net, const T* folded) {
  Dense<T> first = net.dense[0];
  first.bias = folded == nullptr ? nullptr : folded + net.fold;
  first.adds = folded == nullptr;
  return first;
}

template <class T>
NVPFLOW_NOINLINE void context_layer_tile(const Network<T>& net, const T* x, const StateContext<T>& context, T* y,
                                         int64_t rows, Act act) {
  if (context.folded == nullptr) dense_tile<T>(*net.context, context.rows, y, rows, Act::none);
  dense_tile<T>(after_context(net, context.folded), x, y, rows, act);
}

/// dense_tile of the first layer.
template <class T>
NVPFLOW_INLINE void first_tile(const Network<T>& net, const T* x, const StateContext<T>& context, T* y, int64_t rows,
                               Act act) {
  if (net.context != nullptr) return context_layer_tile<T>(net, x, context, y, rows, act);
  dense_tile<T>(net.dense[0], x, y, rows, act);
}

template <class T>
NVPFLOW_NOINLINE void context_layer_rows(const Network<T>& net, const T* x, int64_t stride, T* y, int64_t y_stride,
                                         const RowState<T>& s, Act act) {
  const StateContext<T>& c = s.context;
  if (c.folded == nullptr) dense_few<T>(*net.context, c.rows, c.stride, y, y_stride, s.rows, Act::none);
  dense_few<T>(after_context(net, c.folded), x, stride, y, y_stride, s.rows, act);
}

/// dense_few of the first layer.
template <class T>
NVPFLOW_INLINE void first_rows(const Network<T>& net, const T* x, int64_t stride, T* y, int64_t y_stride,
                               const RowState<T>& s, Act act) {
  if (net.context != nullptr) return context_layer_rows<T>(net, x, stride, y, y_stride, s, act);
  dense_few<T>(net.dense[0], x, stride, y, y_stride, s.rows, act);
}

/// dense_rows of the first layer. x [count][row_stride(in)], context [count][row_stride(C)].
template <class T>
NVPFLOW_INLINE void first_many_rows(const Network<T>& net, const T* x, const T* context, T* y, int64_t y_stride,
                                    int64_t count, Act act) {
  const int64_t stride = row_stride<T>(net.dense[0].in);
  if (net.context == nullptr) return dense_rows<T>(net.dense[0], x, stride, y, y_stride, count, act);
  dense_rows<T>(*net.context, context, row_stride<T>(net.context->in), y, y_stride, count, Act::none);
  dense_rows<T>(after_context<T>(net, nullptr), x, stride, y, y_stride, count, act);
}

}  // namespace
}  // namespace nvpflow::cpu

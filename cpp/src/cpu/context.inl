// KERNEL: the context of rows on its way into a tile or beside a few rows, standardized where the flow does that; and a
// context that is one for all rows, folded into the biases that it makes.
#pragma once

#include <stdint.h>

#include "blocks.hpp"
#include "kernels.hpp"
#include "network.inl"
#include "poison.inl"
#include "scratch.hpp"
#include "simd.hpp"
#include "tile.inl"

namespace nvpflow::cpu {
namespace {

/// The context row of row r of a call.
template <class T>
NVPFLOW_INLINE const T* context_row(const ContextRows<T>& context, int64_t r, int64_t size) {
  if (context.index != nullptr) return context.rows + context.index[r] * size;
  const int64_t row = context.first + r;
  return context.rows + (context.repeat == 1 ? row : row / context.repeat) * size;
}

/// Numbers a .. a + kLanes of a context row, standardized.
template <class T>
NVPFLOW_INLINE Vec<T> standardized(const Program<T>& program, Vec<T> c, int64_t i, int64_t n) {
  if (program.context_mean == nullptr) return c;
  return (c - load_upto<T>(program.context_mean + i, n)) * load_upto<T>(program.context_inverse_std + i, n);
}

/// to [row_stride(C)] = one context row; zero behind it.
template <class T>
void load_context_row(const Program<T>& program, const T* from, T* to) {
  const int64_t size = program.context_size;
  for (int64_t i = 0; i < size; i += kLanes<T>) {
    store<T>(to + i, standardized<T>(program, load_upto<T>(from + i, size - i), i, size - i));
  }
}

/// to [count][row_stride(C)]: the context of rows begin .. begin + count.
template <class T>
void load_context_rows(const Program<T>& program, const ContextRows<T>& context, int64_t begin, int64_t count, T* to) {
  const int64_t stride = row_stride<T>(program.context_size);
  for (int64_t r = 0; r < count; ++r) {
    load_context_row<T>(program, context_row(context, begin + r, program.context_size), to + r * stride);
  }
}

/// to [C][rows]: the same feature-major; zero behind `count`.
template <class T>
void load_context_tile(const Program<T>& program, const ContextRows<T>& context, int64_t begin, int64_t count, T* to,
                       int64_t rows) {
  const int64_t size = program.context_size;
  gather_tile<T>([&](int64_t r) { return context_row(context, begin + r, size); }, count, size, to, rows);
  if (program.context_mean == nullptr) return;
  for (int64_t i = 0; i < size; ++i) {
    const Vec<T> mean = set1(program.context_mean[i]), factor = set1(program.context_inverse_std[i]);
    for (int64_t r = 0; r < rows; r += kLanes<T>) {
      store<T>(to + i * rows + r, (load<T>(to + i * rows + r) - mean) * factor);
    }
  }
}

/// 0, or NaN where the context row holds NaN or inf, which a network may lose.
template <class T>
T context_poison(const T* row, int64_t size) {
  T sum = 0;
  for (int64_t i = 0; i < size; ++i) sum += row[i] * T(0);
  return sum;
}

/// Of row r of a call.
template <class T>
bool context_is_finite(const Program<T>& program, const ContextRows<T>& context, int64_t r) {
  if (program.context_size == 0) return true;
  if (context.rows == nullptr) return context.folded[0] == T(0);
  return context_poison<T>(context_row(context, r, program.context_size), program.context_size) == T(0);
}

/// Adds the context's poison of rows begin .. begin + count to poison [rows]. Returns whether any row has one.
template <class T>
bool add_context_poison(const Program<T>& program, const ContextRows<T>& context, int64_t begin, int64_t count,
                        T* poison) {
  bool any = false;
  for (int64_t r = 0; r < count; ++r) {
    if (context_is_finite<T>(program, context, begin + r)) continue;
    poison[r] = kNaN<T>;
    any = true;
  }
  return any;
}

template <class T>
void fold(const Program<T>& program, const T* context, T* folded, T* scratch) {
  load_context_row<T>(program, context, scratch);
  for (int64_t i = 0; i < kLanes<T>; ++i) folded[i] = context_poison<T>(context, program.context_size);
  for (int64_t k = 0; k < program.num_layers; ++k) {
    const Layer<T>& layer = program.layers[k];
    for (int32_t n = 0; n < layer.num_networks; ++n) {
      const Network<T>& net = layer.network[n];
      const int64_t stride = row_stride<T>(net.context->out);
      dense_few<T>(*net.context, scratch, row_stride<T>(program.context_size), folded + net.fold, stride, 1, Act::none);
      if (net.gates != nullptr) fold_gates<T>(net, residual_blocks(net), scratch, folded + net.gate_fold);
    }
  }
}

}  // namespace
}  // namespace nvpflow::cpu

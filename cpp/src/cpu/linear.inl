// KERNEL: a linear layer, one matrix for all features. Bound: fused multiply-adds, D^2 a row, of a dense layer's
// kernels.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "blocks.hpp"
#include "dense_back.inl"
#include "dense_few.inl"
#include "dense_outer.inl"
#include "dense_tile.inl"
#include "kernels.hpp"
#include "scratch.hpp"
#include "simd.hpp"
#include "tape.inl"
#include "tile.inl"

namespace nvpflow::cpu {
namespace {

/// Kind::linear. The functions of a kind: layers.inl. On the tape: LinearTape. weight_gradient adds to
/// Linear::products; CpuFlow makes gradients of the parameters of them.
template <class T>
struct LinearLayer {
  static void tile(const Layer<T>& layer, bool inverse, const TileState<T>& s);
  static void few_rows(const Layer<T>& layer, bool inverse, const RowState<T>& s);
  static TapeSize tape(const Layer<T>& layer) { return {2 * row_stride<T>(layer.b.count), kLanes<T>}; }
  static void taped(const Layer<T>& layer, bool inverse, const FixedTape<T>& fixed, T* tape, int64_t count,
                    int64_t rows);
  static void backward(const Layer<T>& layer, bool inverse, bool input_wanted, const FixedTape<T>& fixed, T* tape,
                       int64_t count, int64_t rows);
  static int32_t parts(const Layer<T>&) { return 1; }
  static PartSize part(const Layer<T>& layer, int32_t) { return {layer.b.count, layer.b.count}; }
  static void weight_gradient(const Layer<T>& layer, int32_t part, int64_t first, int64_t last,
                              const TileTapes<T>& tapes, T* products, bool);
};

/// Row-major [rows][D], in the order of the features: the numbers on the side of x, and the cotangents on that of y,
/// whichever the layer was given; then, per unit of rows, the sum of the log-determinant's cotangents.
template <class T>
struct LinearTape {
  T *x, *g, *log_det;

  LinearTape(const Layer<T>& layer, T* tape, int64_t rows) {
    x = tape;
    g = x + row_stride<T>(layer.b.count) * rows;
    log_det = g + row_stride<T>(layer.b.count) * rows;
  }
};

/// A dense layer of a linear one, and where the features that it reads lie. backwards: W^-1.
template <class T>
NVPFLOW_INLINE const Dense<T>& dense_of(const Linear<T>& linear, bool backwards) {
  return backwards ? linear.inverse : linear.forward;
}
template <class T>
NVPFLOW_INLINE const int64_t* place_of(const Linear<T>& linear, bool backwards) {
  return backwards ? linear.y_place : linear.x_place;
}

/// The layer on a tile, with no log-determinant; leaves what the dense layer read in `taken` [D][rows].
template <class T>
void multiply_tile(const Linear<T>& linear, bool inverse, T* state, T* taken, int64_t rows) {
  const Dense<T>& dense = dense_of(linear, inverse);
  with_place(place_of(linear, inverse), [&](auto place) {
    for (int64_t j = 0; j < dense.in; ++j) {
      const T *from = state + place(j) * rows, bias = inverse ? linear.forward.bias[place(j)] : T(0);
      T* to = taken + j * rows;
      for (int64_t r = 0; r < rows; r += kLanes<T>) {
        const Vec<T> in = load<T>(from + r);
        store<T>(to + r, inverse ? in - bias : in);
      }
    }
  });
  dense_tile<T>(dense, taken, state, rows, Act::none);
}

template <class T>
void LinearLayer<T>::tile(const Layer<T>& layer, bool inverse, const TileState<T>& s) {
  multiply_tile<T>(*layer.linear, inverse, s.state, s.buffer0, s.rows);
  const T log_det = inverse ? -layer.log_det : layer.log_det;
  for (int64_t r = 0; r < s.rows; r += kLanes<T>) store<T>(s.log_det + r, load<T>(s.log_det + r) + log_det);
}

template <class T>
void LinearLayer<T>::few_rows(const Layer<T>& layer, bool inverse, const RowState<T>& s) {
  const int64_t features = layer.b.count, stride = row_stride<T>(features);
  const Linear<T>& linear = *layer.linear;
  T* taken = s.buffer0;
  with_place(place_of(linear, inverse), [&](auto place) {
    for (int64_t r = 0; r < s.rows; ++r) {
      const T* from = s.state + r * s.stride;
      T* to = taken + r * stride;
      for (int64_t j = 0; j < features; ++j) {
        to[j] = inverse ? from[place(j)] - linear.forward.bias[place(j)] : from[place(j)];
      }
    }
  });
  dense_few_rows<T>(FullWeights<T>{dense_of(linear, inverse)}, taken, stride, s.state, s.stride, s.rows, Act::none);
  for (int64_t r = 0; r < s.rows; ++r) s.log_det[r * kLanes<T>] += inverse ? -layer.log_det : layer.log_det;
}

/// Row-major, in the order of the features.
template <class T>
void keep_rows(const T* tile, const int64_t* place, int64_t features, int64_t count, int64_t rows, T* to) {
  with_place(place, [&](auto at) { scatter_tile<T>(tile, rows, count, features, to, row_stride<T>(features), at); });
}

template <class T>
void LinearLayer<T>::taped(const Layer<T>& layer, bool inverse, const FixedTape<T>& fixed, T* tape, int64_t count,
                           int64_t rows) {
  const LinearTape<T> keep(layer, tape, rows);
  tile(layer, inverse, {fixed.state, fixed.partial, fixed.buffer0, fixed.buffer1, nullptr, rows});
  const T* x = inverse ? fixed.state : fixed.buffer0;
  keep_rows<T>(x, inverse ? layer.linear->x_place : nullptr, layer.b.count, count, rows, keep.x);
}

template <class T>
void LinearLayer<T>::backward(const Layer<T>& layer, bool inverse, bool input_wanted, const FixedTape<T>& fixed,
                              T* tape, int64_t count, int64_t rows) {
  const int64_t features = layer.b.count;
  const Linear<T>& linear = *layer.linear;
  const LinearTape<T> keep(layer, tape, rows);
  for (int64_t r = 0; r < count; r += kGradientUnit) {
    T sum = 0;
    for (int64_t i = r; i < smaller(r + kGradientUnit, count); ++i) sum += fixed.log_det_cotangent[i];
    keep.log_det[r / kGradientUnit * kLanes<T>] = sum;
  }
  if (!inverse) keep_rows<T>(fixed.cotangent, linear.y_place, features, count, rows, keep.g);
  if (!inverse && !input_wanted) return;
  T* g = fixed.buffer0;
  Dense<T> transposed = exchanged<T>(dense_of(linear, inverse));
  transposed.bias = linear.inverse.bias;  // zeros; without any, dense_tile adds to what is in g
  dense_tile<T>(transposed, fixed.cotangent, g, rows, Act::none);
  if (inverse) keep_rows<T>(g, nullptr, features, count, rows, keep.g);
  with_place(place_of(linear, inverse), [&](auto place) {
    for (int64_t j = 0; j < features; ++j) {
      __builtin_memcpy(fixed.cotangent + place(j) * rows, g + j * rows, static_cast<size_t>(rows) * sizeof(T));
    }
  });
}

/// Inputs [first, last) of the matrix: features on the side of x.
template <class T>
void LinearLayer<T>::weight_gradient(const Layer<T>& layer, int32_t, int64_t first, int64_t last,
                                     const TileTapes<T>& tapes, T* products, bool) {
  const int64_t features = layer.b.count, stride = row_stride<T>(features);
  const LinearTape<T> keep(layer, const_cast<T*>(tapes.first), tapes.rows);
  const OuterProduct<T> p = {keep.x,     stride,       keep.g,       stride,  tapes.count,
                             tapes.rows, tapes.stride, tapes.stride, features};
  T* kernel = products + layer.linear->products;
  T* bias = kernel + features * features;
  outer_product<T>(p, first, last, {{{kernel, kernel}, {features, 0}, true}, {{bias, bias}, {features, 0}, true}});
  if (first > 0) return;
  T& log_det = bias[features];
  for (int64_t row = 0; row < tapes.count; row += kGradientUnit) {
    const T* tape = keep.log_det + row / tapes.rows * tapes.stride;
    log_det += tape[row % tapes.rows / kGradientUnit * kLanes<T>];
  }
}

}  // namespace
}  // namespace nvpflow::cpu

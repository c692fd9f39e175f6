// KERNEL: a layer that scales and shifts each feature by itself: standardize, and backwards actnorm.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "blocks.hpp"
#include "kernels.hpp"
#include "scratch.hpp"
#include "simd.hpp"
#include "tape.inl"

namespace nvpflow::cpu {
namespace {

/// Kind::diagonal, by rows of the tile. The functions of a kind: layers.inl. On the tape: output [D][rows]; per unit of
/// rows, sums of the gradients of mean and log_std, [2 D].
template <class T>
struct DiagonalLayer {
  static void tile(const Layer<T>& layer, bool inverse, const TileState<T>& s);
  static void few_rows(const Layer<T>& layer, bool inverse, const RowState<T>& s);
  static TapeSize tape(const Layer<T>& layer) { return {layer.b.count, row_stride<T>(2 * layer.b.count)}; }
  static void taped(const Layer<T>& layer, bool inverse, const FixedTape<T>& fixed, T* tape, int64_t count,
                    int64_t rows);
  static void backward(const Layer<T>& layer, bool inverse, bool input_wanted, const FixedTape<T>& fixed, T* tape,
                       int64_t count, int64_t rows);
  static int32_t parts(const Layer<T>&) { return 1; }
  static PartSize part(const Layer<T>& layer, int32_t) { return {layer.b.count, 0}; }
  static void weight_gradient(const Layer<T>& layer, int32_t part, int64_t first, int64_t last,
                              const TileTapes<T>& tapes, T* gradient, bool add);
};

template <class T>
void DiagonalLayer<T>::tile(const Layer<T>& layer, bool inverse, const TileState<T>& s) {
  const int64_t features = layer.b.count, rows = s.rows;
  T *state = s.state, *partial = s.log_det;
  for (int64_t j = 0; j < features; ++j) {
    const Vec<T> mean = set1(layer.mean[j]);
    const Vec<T> factor = set1(inverse ? layer.std[j] : layer.inverse_std[j]);
    for (int64_t r = 0; r < rows; r += kLanes<T>) {
      const Vec<T> in = load<T>(state + j * rows + r);
      store<T>(state + j * rows + r, inverse ? fma(in, factor, mean) : (in - mean) * factor);
    }
  }
  const T log_det = inverse ? -layer.log_det : layer.log_det;
  for (int64_t r = 0; r < rows; r += kLanes<T>) store<T>(partial + r, load<T>(partial + r) + log_det);
}

template <class T>
void DiagonalLayer<T>::few_rows(const Layer<T>& layer, bool inverse, const RowState<T>& s) {
  const int64_t features = layer.b.count;
  for (int64_t r = 0; r < s.rows; ++r) {
    T* state = s.state + r * s.stride;
    for (int64_t j = 0; j < features; j += kLanes<T>) {
      const int64_t n = features - j;
      const Vec<T> mean = load_upto<T>(layer.mean + j, n);
      const Vec<T> factor = load_upto<T>((inverse ? layer.std : layer.inverse_std) + j, n);
      const Vec<T> in = load_upto<T>(state + j, n);
      store_upto<T>(state + j, inverse ? fma(in, factor, mean) : (in - mean) * factor, n);
    }
    s.log_det[r * kLanes<T>] += inverse ? -layer.log_det : layer.log_det;
  }
}

template <class T>
void DiagonalLayer<T>::taped(const Layer<T>& layer, bool inverse, const FixedTape<T>& fixed, T* tape, int64_t,
                             int64_t rows) {
  tile(layer, inverse, {fixed.state, fixed.partial, fixed.buffer0, fixed.buffer1, nullptr, rows});
  __builtin_memcpy(tape, fixed.state, static_cast<size_t>(layer.b.count * rows) * sizeof(T));
}

/// Sums of the gradients of mean [D] and log_std [D] over rows [begin, end); tape: the layer's output.
template <class T>
void diagonal_sums(const Layer<T>& layer, bool inverse, const T* tape, const FixedTape<T>& fixed, int64_t begin,
                   int64_t end, int64_t rows, T* sums) {
  const int64_t features = layer.b.count;
  for (int64_t j = 0; j < features; ++j) {
    T g_mean = 0, g_log_std = 0;
    const T* out = tape + j * rows;
    const T* g = fixed.cotangent + j * rows;
    for (int64_t r = begin; r < end; ++r) {
      const T g_log_det = fixed.log_det_cotangent[r];
      if (inverse) {  // out = in * std + mean, log_det = +sum log_std
        g_mean += g[r];
        g_log_std += g[r] * (out[r] - layer.mean[j]) + g_log_det;
      } else {  // out = (in - mean) / std, log_det = -sum log_std
        g_mean -= g[r] * layer.inverse_std[j];
        g_log_std -= g[r] * out[r] + g_log_det;
      }
    }
    sums[j] = g_mean;
    sums[features + j] = g_log_std;
  }
}

template <class T>
void DiagonalLayer<T>::backward(const Layer<T>& layer, bool inverse, bool, const FixedTape<T>& fixed, T* tape,
                                int64_t count, int64_t rows) {
  const int64_t features = layer.b.count;
  T* sums = tape + features * rows;
  for (int64_t r = 0; r < count; r += kGradientUnit, sums += row_stride<T>(2 * features)) {
    diagonal_sums<T>(layer, inverse, tape, fixed, r, smaller(r + kGradientUnit, count), rows, sums);
  }
  for (int64_t j = 0; j < features; ++j) {
    T* g = fixed.cotangent + j * rows;
    const Vec<T> factor = set1(inverse ? layer.std[j] : layer.inverse_std[j]);
    for (int64_t r = 0; r < rows; r += kLanes<T>) store<T>(g + r, load<T>(g + r) * factor);
  }
}

template <class T>
void DiagonalLayer<T>::weight_gradient(const Layer<T>& layer, int32_t, int64_t first, int64_t last,
                                       const TileTapes<T>& tapes, T* gradient, bool add) {
  const int64_t features = layer.b.count, unit_stride = row_stride<T>(2 * features);
  for (int64_t j = first; j < last; ++j) {
    T mean = 0, log_std = 0;
    for (int64_t row = 0; row < tapes.count; row += kGradientUnit) {
      const T* tape = tapes.first + row / tapes.rows * tapes.stride;
      const T* sums = tape + features * tapes.rows + row % tapes.rows / kGradientUnit * unit_stride;
      mean += sums[j];
      log_std += sums[features + j];
    }
    const int64_t feature = layer.feature == nullptr ? j : layer.feature[j];
    T* to_mean = gradient + layer.mean_offset + feature;
    T* to_log_std = gradient + layer.log_std_offset + feature;
    *to_mean = add ? *to_mean + mean : mean;
    *to_log_std = add ? *to_log_std + log_std : log_std;
  }
}

}  // namespace
}  // namespace nvpflow::cpu

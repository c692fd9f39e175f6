// KERNEL: a layer of rational-quadratic splines, one for each transformed feature: a coupling, whose network says what
// they are, or an element spline, where they are the same for all rows.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "blocks.hpp"
#include "features.inl"
#include "kernels.hpp"
#include "network.inl"
#include "scratch.hpp"
#include "simd.hpp"
#include "spline_point.inl"
#include "tape.inl"
#include "tile.inl"

namespace nvpflow::cpu {
namespace {

/// Kind::spline. The functions of a kind: layers.inl. On the tape: SplineLayerTape.
template <class T>
struct SplineLayer {
  static void tile(const Layer<T>& layer, bool inverse, const TileState<T>& s);
  static void few_rows(const Layer<T>& layer, bool inverse, const RowState<T>& s);
  static TapeSize tape(const Layer<T>& layer);
  static void taped(const Layer<T>& layer, bool inverse, const FixedTape<T>& fixed, T* tape, int64_t count,
                    int64_t rows);
  static void backward(const Layer<T>& layer, bool inverse, bool input_wanted, const FixedTape<T>& fixed, T* tape,
                       int64_t count, int64_t rows);
  /// Those of the network; the constants are one.
  static int32_t parts(const Layer<T>& layer) { return layer.num_networks > 0 ? network_parts(layer.network[0]) : 1; }
  static PartSize part(const Layer<T>& layer, int32_t index) {
    if (layer.num_networks > 0) return network_part(layer.network[0], index);
    return {num_raw(layer), 0};
  }
  static void weight_gradient(const Layer<T>& layer, int32_t part, int64_t first, int64_t last,
                              const TileTapes<T>& tapes, T* gradient, bool add);

  /// Raw numbers of a row: parameter p of feature j at p n + j.
  static int64_t num_raw(const Layer<T>& layer) { return layer.splines->parameters * layer.b.count; }
};

/// Elements that lie one after the other: x, their raw numbers u, parameter p `distance` p further, and what their
/// log-slopes are added to. Reads whole vectors.
template <class T>
struct SplineElements {
  T *u, *x, *log_det;
  int64_t distance, count;
  bool one_log_det = false;  // each vector is added to the same one
};

template <class T, bool inverse, bool taped>
NVPFLOW_NOINLINE void run_splines(const SplineMap<T>& map, const SplineElements<T>& e, const SplineTape<T>* tape,
                                  int64_t first) {
  constexpr int64_t L = kLanes<T>;
  for (int64_t i = 0; i < e.count; i += L) {
    SplineValue<T> value = spline_value<T, inverse, taped>(map, e.u + i, e.distance, load<T>(e.x + i), tape, first + i);
    if (e.count - i < L) {
      T log_slopes[L];
      store<T>(log_slopes, value.log_slope);
      value.log_slope = load_upto<T>(log_slopes, e.count - i);
    }
    store_upto<T>(e.x + i, value.out, e.count - i);
    T* log_det = e.one_log_det ? e.log_det : e.log_det + i;
    store<T>(log_det, load<T>(log_det) + value.log_slope);
  }
}

template <class T>
NVPFLOW_INLINE void run_splines(const SplineMap<T>& map, bool inverse, const SplineElements<T>& e) {
  inverse ? run_splines<T, true, false>(map, e, nullptr, 0) : run_splines<T, false, false>(map, e, nullptr, 0);
}

/// Elements [features][rows] of a tile, whose partial sums are [kLanes][rows]: as many features as there are partial
/// sums lie beside each other just as the sums do.
template <class T, class Run>
NVPFLOW_INLINE void each_partial(const SplineElements<T>& all, int64_t rows, Run&& run) {
  const int64_t partials = kLanes<T> * rows;
  for (int64_t begin = 0; begin < all.count; begin += partials) {
    const int64_t count = smaller(partials, all.count - begin);
    run(SplineElements<T>{all.u + begin, all.x + begin, all.log_det, all.distance, count}, begin);
  }
}

/// The constants as what a network says, [P n][rows].
template <class T>
void spread_constants(const Layer<T>& layer, T* u, int64_t rows) {
  const int64_t size = SplineLayer<T>::num_raw(layer);
  for (int64_t c = 0; c < size; ++c) {
    const Vec<T> value = set1(layer.splines->constants[c]);
    for (int64_t r = 0; r < rows; r += kLanes<T>) store<T>(u + c * rows + r, value);
  }
}

template <class T>
void SplineLayer<T>::tile(const Layer<T>& layer, bool inverse, const TileState<T>& s) {
  const int64_t size = layer.b.count * s.rows;
  T* u = s.buffer0;
  if (layer.num_networks > 0) {
    const T* a = take_features<T>(layer.a, s.state, s.gathered, s.rows);
    u = const_cast<T*>(network_tile<T>(layer.network[0], a, s.context, s.buffer0, s.buffer1, s.kept, s.rows));
  } else {
    spread_constants<T>(layer, u, s.rows);
  }
  T* b = take_features<T>(layer.b, s.state, s.gathered, s.rows);
  each_partial<T>({u, b, s.log_det, size, size}, s.rows,
                  [&](const SplineElements<T>& e, int64_t) { run_splines<T>(layer.splines->map, inverse, e); });
  put_features<T>(layer.b, b, s.state, s.rows);
}

/// Copies n elements, and whatever follows them to the end of the vector.
template <class T>
NVPFLOW_INLINE void copy_whole(const T* from, T* to, int64_t n) {
  for (int64_t j = 0; j < n; j += kLanes<T>) store<T>(to + j, load<T>(from + j));
}

/// The elements of a few rows, one row after the other, [P][rows n] and [rows n], in one buffer: vectors are full that
/// would hold a row's few features each.
template <class T>
struct PackedElements {
  SplineElements<T> elements;

  /// u: raw numbers [rows][stride]; 0: the same for all rows.
  PackedElements(const Layer<T>& layer, const T* u, int64_t stride, const RowPart<T>& b, int64_t rows, T* buffer) {
    const int64_t n = layer.b.count, count = rows * n, parameters = layer.splines->parameters;
    T* next = buffer;
    for (int64_t p = 0; p < parameters; ++p) {
      for (int64_t r = 0; r < rows; ++r, next += n) copy_whole<T>(u + r * stride + p * n, next, n);
    }
    T *x = next + kLanes<T>, *log_det = x + padded<T>(count);
    for (int64_t r = 0; r < rows; ++r) copy_whole<T>(b.first + r * b.stride, x + r * n, n);
    for (int64_t i = 0; i < count; i += kLanes<T>) store<T>(log_det + i, Vec<T>{});
    elements = {buffer, x, log_det, count, count};
  }

  /// Back to the rows, and to their partial sums [rows][kLanes].
  void put(const RowPart<T>& b, int64_t n, int64_t rows, T* log_det) const {
    constexpr int64_t L = kLanes<T>;
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t j = 0; j < n; j += L) {
        store_upto<T>(b.first + r * b.stride + j, load<T>(elements.x + r * n + j), n - j);
        T* sum = log_det + r * L;
        store<T>(sum, load<T>(sum) + load_upto<T>(elements.log_det + r * n + j, n - j));
      }
    }
  }
};

template <class T>
void SplineLayer<T>::few_rows(const Layer<T>& layer, bool inverse, const RowState<T>& s) {
  const int64_t n = layer.b.count;
  const T* u = layer.splines->constants;
  int64_t stride = 0;
  if (layer.num_networks > 0) {
    const RowPart<T> a = take_features<T>(layer.a, s, s.gathered);
    u = network_rows<T>(layer.network[0], a.first, a.stride, s);
    stride = row_stride<T>(num_raw(layer));
  }
  const RowPart<T> b = take_features<T>(layer.b, s, s.gathered);
  if (s.rows == 1 && layer.num_networks > 0) {
    run_splines<T>(layer.splines->map, inverse, {const_cast<T*>(u), b.first, s.log_det, n, n, true});
  } else {
    const PackedElements<T> packed(layer, u, stride, b, s.rows, u == s.buffer0 ? s.buffer1 : s.buffer0);
    run_splines<T>(layer.splines->map, inverse, packed.elements);
    packed.put(b, n, s.rows, s.log_det);
  }
  put_features<T>(layer.b, b, s);
}

/// Raw numbers [P n][rows], with e of the sizes in their place; the arrays of SplineTape, [n][rows] each; then what the
/// network keeps, or the sums of the constants' cotangents, [P n] per unit of rows.
template <class T>
struct SplineLayerTape {
  T* raw;
  SplineTape<T> splines;
  T* rest;

  static int64_t arrays(const Layer<T>& layer) {
    const SplineMap<T>& map = layer.splines->map;
    return SplineTape<T>::kArrays + (map.squashed ? 2 * map.num_bins : 0);
  }
  static int64_t row(const Layer<T>& layer) { return (layer.splines->parameters + arrays(layer)) * layer.b.count; }

  SplineLayerTape(const Layer<T>& layer, T* tape, int64_t rows)
      : raw(tape),
        splines(tape + SplineLayer<T>::num_raw(layer) * rows, layer.b.count * rows),
        rest(tape + row(layer) * rows) {}
};

template <class T>
TapeSize SplineLayer<T>::tape(const Layer<T>& layer) {
  TapeSize size = {SplineLayerTape<T>::row(layer), 0};
  if (layer.num_networks == 0) return {size.row, row_stride<T>(num_raw(layer))};
  const TapeSize of_network = network_tape(layer.network[0]);
  return {size.row + of_network.row, of_network.unit};
}

template <class T>
void SplineLayer<T>::taped(const Layer<T>& layer, bool inverse, const FixedTape<T>& fixed, T* tape, int64_t count,
                           int64_t rows) {
  const SplineLayerTape<T> keep(layer, tape, rows);
  const int64_t size = layer.b.count * rows, numbers = num_raw(layer), stride = row_stride<T>(numbers);
  if (layer.num_networks > 0) {
    const T* a = take_features<T>(layer.a, fixed.state, fixed.gathered, rows);
    network_taped<T>(layer.network[0], a, fixed.context, keep.rest, fixed.buffer0, count, rows);
    gather_tile<T>([&](int64_t r) { return fixed.buffer0 + r * stride; }, count, numbers, keep.raw, rows);
  } else {
    spread_constants<T>(layer, keep.raw, rows);
  }
  T* b = take_features<T>(layer.b, fixed.state, fixed.gathered, rows);
  each_partial<T>({keep.raw, b, fixed.partial, size, size}, rows, [&](const SplineElements<T>& e, int64_t first) {
    inverse ? run_splines<T, true, true>(layer.splines->map, e, &keep.splines, first)
            : run_splines<T, false, true>(layer.splines->map, e, &keep.splines, first);
  });
  put_features<T>(layer.b, b, fixed.state, rows);
}

/// From the cotangent of the layer's output to that of its input, in place, of b [b][rows]; head [P b][rows] =
/// cotangent of the raw numbers.
template <class T, bool inverse>
NVPFLOW_NOINLINE void splines_backward(const Layer<T>& layer, const SplineLayerTape<T>& keep, const T* g_log_det, T* b,
                                       T* head, int64_t rows) {
  const int64_t size = layer.b.count * rows;
  for (int64_t j = 0; j < size; j += rows) {
    for (int64_t r = 0; r < rows; r += kLanes<T>) {
      const int64_t i = j + r;
      store<T>(b + i, spline_back<T, inverse>(layer.splines->map, keep.raw + i, size, keep.splines, i, load<T>(b + i),
                                              load<T>(g_log_det + r), head + i));
    }
  }
}

/// Sums of the constants' cotangents g [size][rows] over each unit of rows.
template <class T>
void constant_sums(const T* g, int64_t size, int64_t count, int64_t rows, T* sums) {
  for (int64_t begin = 0; begin < count; begin += kGradientUnit, sums += row_stride<T>(size)) {
    const int64_t end = smaller(begin + kGradientUnit, count);
    for (int64_t c = 0; c < size; ++c) {
      Vec<T> sum = {};
      for (int64_t r = begin; r < end; r += kLanes<T>) sum = sum + load_upto<T>(g + c * rows + r, end - r);
      sums[c] = sum_lanes<T>(sum);
    }
  }
}

template <class T>
void SplineLayer<T>::backward(const Layer<T>& layer, bool inverse, bool input_wanted, const FixedTape<T>& fixed,
                              T* tape, int64_t count, int64_t rows) {
  const SplineLayerTape<T> keep(layer, tape, rows);
  T* head = fixed.buffer0;
  T* b = take_features<T>(layer.b, fixed.cotangent, fixed.gathered, rows);
  inverse ? splines_backward<T, true>(layer, keep, fixed.log_det_cotangent, b, head, rows)
          : splines_backward<T, false>(layer, keep, fixed.log_det_cotangent, b, head, rows);
  put_features<T>(layer.b, b, fixed.cotangent, rows);
  if (layer.num_networks == 0) return constant_sums<T>(head, num_raw(layer), count, rows, keep.rest);
  T* a = input_wanted ? take_features<T>(layer.a, fixed.cotangent, fixed.gathered, rows) : nullptr;
  start_network_backward<T>(layer.network[0], head, keep.rest, count, rows);
  network_backward<T>(layer.network[0], keep.rest, fixed.buffer0, fixed.buffer1, a, fixed.context_cotangent, count,
                      rows);
  if (input_wanted) put_features<T>(layer.a, a, fixed.cotangent, rows);
}

template <class T>
void SplineLayer<T>::weight_gradient(const Layer<T>& layer, int32_t part, int64_t first, int64_t last,
                                     const TileTapes<T>& tapes, T* gradient, bool add) {
  const SplineLayerTape<T> keep(layer, const_cast<T*>(tapes.first), tapes.rows);
  if (layer.num_networks > 0) {
    TileTapes<T> of_network = tapes;
    of_network.first = keep.rest;
    return network_weight_gradient<T>(layer.network[0], part, first, last, of_network, gradient, add);
  }
  const Splines<T>& splines = *layer.splines;
  const int64_t unit_stride = row_stride<T>(num_raw(layer));
  int64_t begin = 0;
  for (int of = 0; of < kMaxHeads; begin += splines.size[of], ++of) {
    T* to = gradient + splines.offset[of];
    const int64_t end = smaller(last, begin + splines.size[of]);
    for (int64_t c = first > begin ? first : begin; c < end; ++c) {
      T sum = 0;
      for (int64_t row = 0; row < tapes.count; row += kGradientUnit) {
        const T* sums = keep.rest + row / tapes.rows * tapes.stride;
        sum += sums[row % tapes.rows / kGradientUnit * unit_stride + c];
      }
      to[c - begin] = add ? to[c - begin] + sum : sum;
    }
  }
}

}  // namespace
}  // namespace nvpflow::cpu

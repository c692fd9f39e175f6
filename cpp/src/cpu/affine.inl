// KERNEL: an affine coupling layer: what the network says becomes a scale and a shift of the transformed features.
#pragma once

#include <stdint.h>

#include "blocks.hpp"
#include "elementary.hpp"
#include "kernels.hpp"
#include "network.inl"
#include "scratch.hpp"
#include "simd.hpp"
#include "steps.hpp"
#include "tape.inl"
#include "tile.inl"

namespace nvpflow::cpu {
namespace {

/// Kind::coupling. The functions of a kind: layers.inl.
template <class T>
struct AffineLayer {
  static void tile(const Layer<T>& layer, bool inverse, const TileState<T>& s);
  static void few_rows(const Layer<T>& layer, bool inverse, const RowState<T>& s);
  static TapeSize tape(const Layer<T>& layer) { return {3 * layer.b_count + network_tape(layer), 0}; }
  static void taped(const Layer<T>& layer, bool inverse, const FixedTape<T>& fixed, T* tape, int64_t count,
                    int64_t rows);
  static void backward(const Layer<T>& layer, bool inverse, bool input_wanted, const FixedTape<T>& fixed, T* tape,
                       int64_t count, int64_t rows);
  static int32_t parts(const Layer<T>& layer) { return layer.num_dense; }
  static int64_t part_size(const Layer<T>& layer, int32_t part) { return layer.dense[part].in; }
  static void weight_gradient(const Layer<T>& layer, int32_t part, int64_t first, int64_t last,
                              const TileTapes<T>& tapes, T* gradient, bool add);
};

/// s, exp(+-s) and the product d(output) / d(s), [b][rows] each; then what the network keeps.
template <class T>
struct AffineTape {
  T *s, *scale, *product, *network;

  AffineTape(const Layer<T>& layer, T* tape, int64_t rows) {
    s = tape;
    scale = s + layer.b_count * rows;
    product = scale + layer.b_count * rows;
    network = product + layer.b_count * rows;
  }
};

template <class T, class V>
NVPFLOW_INLINE V log_scale(const Layer<T>& layer, V u) {
  return tanh<T>(u * set1(layer.inverse_bound)) * set1(layer.bound);
}

/// e^s of a log-scale, or of its negative. |s| <= bound, and 1 is what nearly all flows have.
template <class T, class V>
NVPFLOW_INLINE V scale_of(const Layer<T>& layer, V s) {
  return layer.bound <= T(1) ? exp_within_one<T>(s) : exp<T>(s);
}

/// The vectors that the transformed part is taken through in step: what fits in the registers.
#if defined(__AVX512F__)
template <class T>
constexpr auto steps_of() {
  if constexpr (sizeof(T) == 4) {
    return Pair<Pair<Vec<T>>>{};  // short chains, from tables
  } else {
    return Pair<Pair<Pair<Vec<T>>>>{};
  }
}
template <class T>
using Steps = decltype(steps_of<T>());
#else
template <class T>
using Steps = Pair<Vec<T>>;
#endif

/// What a coupling layer does to its transformed part: vectors of it, of u_s and t, and of the partial sums of the
/// log-determinant, each kind with its own distance between one vector and the next.
template <class T>
struct Affine {
  const Layer<T>& layer;
  bool inverse;
  int64_t u_stride, b_stride, log_det_stride;

  /// n: elements of each vector.
  template <class V>
  NVPFLOW_INLINE void apply(const T* u, const T* t, T* b, T* log_det, int64_t n) const {
    const V s = log_scale<T>(layer, load_steps<T, V>(u, u_stride, n));
    const V in = load_steps<T, V>(b, b_stride, n), shift = load_steps<T, V>(t, u_stride, n);
    const V sum = load_steps<T, V>(log_det, log_det_stride, n);
    store_steps<T>(b, b_stride, inverse ? (in - shift) * scale_of<T>(layer, -s) : fma(in, scale_of<T>(layer, s), shift),
                   n);
    store_steps<T>(log_det, log_det_stride, inverse ? sum - s : sum + s, n);
  }
};

template <class T>
void AffineLayer<T>::tile(const Layer<T>& layer, bool inverse, const TileState<T>& s) {
  constexpr int64_t L = kLanes<T>, kStep = kVectors<Steps<T>> * L;
  const int64_t rows = s.rows, size = layer.b_count * rows, partials = L * rows;
  const T* u = network_tile<T>(layer, s.state + layer.a_begin * rows, s.buffer0, s.buffer1, rows);
  const T* t = u + size;
  T* b = s.state + layer.b_begin * rows;
  T* partial = s.log_det;
  const Affine<T> affine = {layer, inverse, L, L, L};
  // As many features as there are partial sums lie beside each other just as the sums do.
  for (int64_t begin = 0; begin < size; begin += partials) {
    const int64_t end = smaller(begin + partials, size);
    T* log_det = partial - begin;
    int64_t i = begin;
    for (; i + kStep <= end; i += kStep) affine.template apply<Steps<T>>(u + i, t + i, b + i, log_det + i, L);
    for (; i < end; i += L) affine.template apply<Vec<T>>(u + i, t + i, b + i, log_det + i, L);
  }
}

template <class T>
void AffineLayer<T>::few_rows(const Layer<T>& layer, bool inverse, const RowState<T>& s) {
  constexpr int64_t L = kLanes<T>, kStep = kVectors<Steps<T>>;
  const int64_t n = layer.b_count, u_stride = row_stride<T>(2 * n);
  const T* u = network_rows<T>(layer, s);
  T* b = s.state + layer.b_begin;
  const Affine<T> affine = {layer, inverse, u_stride, s.stride, L};
  for (int64_t j = 0; j < n; j += L) {
    // Lanes past n hold s = tanh(0) = 0.
    const auto at = [&](int64_t r, auto&& apply) __attribute__((always_inline)) {
      apply(u + r * u_stride + j, u + r * u_stride + n + j, b + r * s.stride + j, s.log_det + r * L, n - j);
    };
    int64_t r = 0;
    for (; r + kStep <= s.rows; r += kStep) {
      at(r, [&](auto... p) __attribute__((always_inline)) { affine.template apply<Steps<T>>(p...); });
    }
    if constexpr (kStep > 4) {
      for (; r + 4 <= s.rows; r += 4) {
        at(r, [&](auto... p) __attribute__((always_inline)) { affine.template apply<Pair<Pair<Vec<T>>>>(p...); });
      }
    }
    for (; r < s.rows; ++r) {
      at(r, [&](auto... p) __attribute__((always_inline)) { affine.template apply<Vec<T>>(p...); });
    }
  }
}

/// Affine that leaves on the tape what the way back needs.
template <class T>
struct TapedAffine {
  const Layer<T>& layer;
  bool inverse;

  template <class V>
  NVPFLOW_INLINE void apply(int64_t i, const T* u, int64_t size, T* b, T* log_det, const AffineTape<T>& keep) const {
    constexpr int64_t L = kLanes<T>;
    const V s = log_scale<T>(layer, load_steps<T, V>(u + i, L, L)), t = load_steps<T, V>(u + size + i, L, L);
    const V in = load_steps<T, V>(b + i, L, L), sum = load_steps<T, V>(log_det + i, L, L);
    const V scale = scale_of<T>(layer, inverse ? -s : s);
    const V out = inverse ? (in - t) * scale : fma(in, scale, t);
    store_steps<T>(log_det + i, L, inverse ? sum - s : sum + s, L);
    store_steps<T>(b + i, L, out, L);
    store_steps<T>(keep.s + i, L, s, L);
    store_steps<T>(keep.scale + i, L, scale, L);
    store_steps<T>(keep.product + i, L, inverse ? -out : in * scale, L);
  }
};

template <class T>
void AffineLayer<T>::taped(const Layer<T>& layer, bool inverse, const FixedTape<T>& fixed, T* tape, int64_t count,
                           int64_t rows) {
  const AffineTape<T> keep(layer, tape, rows);
  const NetworkTape<T> network(layer, keep.network, rows);
  const int64_t n = layer.b_count;
  scatter_tile<T>(fixed.state + layer.a_begin * rows, rows, count, layer.a_count, network.input,
                  row_stride<T>(layer.a_count));
  network_taped<T>(layer, network, fixed.buffer0, count, rows);
  T* head = fixed.buffer1;
  const int64_t stride = row_stride<T>(2 * n);
  gather_tile<T>([&](int64_t r) { return fixed.buffer0 + r * stride; }, count, 2 * n, head, rows);
  const TapedAffine<T> affine = {layer, inverse};
  constexpr int64_t L = kLanes<T>, kStep = kVectors<Steps<T>> * L;
  const int64_t size = n * rows, partials = L * rows;
  T* b = fixed.state + layer.b_begin * rows;
  for (int64_t begin = 0; begin < size; begin += partials) {  // as in tile()
    const int64_t end = smaller(begin + partials, size);
    T* log_det = fixed.partial - begin;
    int64_t i = begin;
    for (; i + kStep <= end; i += kStep) affine.template apply<Steps<T>>(i, head, size, b, log_det, keep);
    for (; i < end; i += L) affine.template apply<Vec<T>>(i, head, size, b, log_det, keep);
  }
}

/// From the cotangent of the layer's output to that of its input, in place; head [2 b][rows] = cotangent of [u_s, t].
template <class T>
void affine_backward(const Layer<T>& layer, bool inverse, const AffineTape<T>& keep, const FixedTape<T>& fixed, T* head,
                     int64_t rows) {
  const int64_t n = layer.b_count;
  T* b = fixed.cotangent + layer.b_begin * rows;
  for (int64_t j = 0; j < n; ++j) {
    for (int64_t r = 0; r < rows; r += kLanes<T>) {
      const int64_t at = j * rows + r;
      const Vec<T> g = load<T>(b + at), g_log_det = load<T>(fixed.log_det_cotangent + r);
      const Vec<T> scaled = g * load<T>(keep.scale + at);
      const Vec<T> tanh_u = load<T>(keep.s + at) * layer.inverse_bound;
      const Vec<T> g_s = fma(g, load<T>(keep.product + at), inverse ? -g_log_det : g_log_det);
      store<T>(b + at, scaled);
      store<T>(head + at, g_s * fma(-tanh_u, tanh_u, set1(T(1))));
      store<T>(head + n * rows + at, inverse ? -scaled : g);
    }
  }
}

template <class T>
void AffineLayer<T>::backward(const Layer<T>& layer, bool inverse, bool input_wanted, const FixedTape<T>& fixed,
                              T* tape, int64_t count, int64_t rows) {
  const AffineTape<T> keep(layer, tape, rows);
  const NetworkTape<T> network(layer, keep.network, rows);
  T* head = fixed.buffer0;
  affine_backward<T>(layer, inverse, keep, fixed, head, rows);
  T* a = input_wanted ? fixed.cotangent + layer.a_begin * rows : nullptr;
  network_backward<T>(layer, network, head, fixed.buffer1, a, count, rows);
}

template <class T>
void AffineLayer<T>::weight_gradient(const Layer<T>& layer, int32_t part, int64_t first, int64_t last,
                                     const TileTapes<T>& tapes, T* gradient, bool add) {
  TileTapes<T> of_network = tapes;
  of_network.first = AffineTape<T>(layer, const_cast<T*>(tapes.first), tapes.rows).network;
  network_weight_gradient<T>(layer, part, first, last, of_network, gradient, add);
}

}  // namespace
}  // namespace nvpflow::cpu

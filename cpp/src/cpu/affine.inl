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

/// state [D][rows] in place; partial [kLanes][rows]: partial sums of the log-determinant.
template <class T>
void coupling_tile(const Layer<T>& layer, bool inverse, T* state, T* partial, T* buffer0, T* buffer1, int64_t rows) {
  constexpr int64_t L = kLanes<T>, kStep = kVectors<Steps<T>> * L;
  const int64_t size = layer.b_count * rows, partials = L * rows;
  const T* u = conditioner_tile<T>(layer, state + layer.a_begin * rows, buffer0, buffer1, rows);
  const T* t = u + size;
  T* b = state + layer.b_begin * rows;
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
void coupling_rows(const Layer<T>& layer, bool inverse, const RowState<T>& s) {
  constexpr int64_t L = kLanes<T>, kStep = kVectors<Steps<T>>;
  const int64_t n = layer.b_count, u_stride = row_stride<T>(2 * n);
  const T* u = conditioner_rows<T>(layer, s);
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
  NVPFLOW_INLINE void apply(int64_t i, const T* u, int64_t size, T* b, T* log_det, const CouplingTape<T>& keep) const {
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
void coupling_forward_taped(const Layer<T>& layer, bool inverse, const FixedTape<T>& fixed, T* tape, int64_t count,
                            int64_t rows) {
  const CouplingTape<T> keep(layer, tape, rows);
  const int64_t n = layer.b_count;
  scatter_tile<T>(fixed.state + layer.a_begin * rows, rows, count, layer.a_count, keep.input,
                  row_stride<T>(layer.a_count));
  conditioner_taped<T>(layer, keep, fixed.buffer0, count, rows);
  T* head = fixed.buffer1;
  const int64_t stride = row_stride<T>(2 * n);
  gather_tile<T>([&](int64_t r) { return fixed.buffer0 + r * stride; }, count, 2 * n, head, rows);
  const TapedAffine<T> affine = {layer, inverse};
  constexpr int64_t L = kLanes<T>, kStep = kVectors<Steps<T>> * L;
  const int64_t size = n * rows, partials = L * rows;
  T* b = fixed.state + layer.b_begin * rows;
  for (int64_t begin = 0; begin < size; begin += partials) {  // as in coupling_tile
    const int64_t end = smaller(begin + partials, size);
    T* log_det = fixed.partial - begin;
    int64_t i = begin;
    for (; i + kStep <= end; i += kStep) affine.template apply<Steps<T>>(i, head, size, b, log_det, keep);
    for (; i < end; i += L) affine.template apply<Vec<T>>(i, head, size, b, log_det, keep);
  }
}

/// From the cotangent of the layer's output to that of its input, in place; head [2 b][rows] = cotangent of [u_s, t].
template <class T>
void affine_backward(const Layer<T>& layer, bool inverse, const CouplingTape<T>& keep, const FixedTape<T>& fixed,
                     T* head, int64_t rows) {
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
void coupling_backward(const Layer<T>& layer, bool inverse, bool input_wanted, T* tape, const FixedTape<T>& fixed,
                       int64_t count, int64_t rows) {
  const CouplingTape<T> keep(layer, tape, rows);
  const int32_t last = layer.num_dense - 1;
  const int64_t a_stride = row_stride<T>(layer.a_count), head_stride = row_stride<T>(layer.dense[last].out);
  affine_backward<T>(layer, inverse, keep, fixed, fixed.buffer0, rows);
  scatter_tile<T>(fixed.buffer0, rows, count, layer.dense[last].out, keep.cotangent(layer, last, rows), head_stride);
  for (int32_t j = last; j > 0; --j) {
    dense_backward<T>(layer, keep, j, keep.cotangent(layer, j, rows), keep.cotangent(layer, j - 1, rows), count, rows);
  }
  if (!input_wanted) return;
  T* g_input = fixed.buffer0;
  T* g = fixed.buffer1;
  dense_backward<T>(layer, keep, 0, keep.cotangent(layer, 0, rows), g_input, count, rows);
  const int64_t parts = layer.dense[0].paired ? 2 : 1;  // of each input's cotangent
  gather_tile<T>([&](int64_t r) { return g_input + r * a_stride; }, count, parts * layer.a_count, g, rows);
  T* a = fixed.cotangent + layer.a_begin * rows;
  for (int64_t i = 0; i < layer.a_count; ++i, a += rows, g += parts * rows) {
    for (int64_t r = 0; r < rows; r += kLanes<T>) {
      const Vec<T> sum = parts == 2 ? load<T>(g + r) + load<T>(g + rows + r) : load<T>(g + r);
      store<T>(a + r, load<T>(a + r) + sum);
    }
  }
}

}  // namespace
}  // namespace nvpflow::cpu

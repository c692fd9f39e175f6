// KERNEL: an affine or additive coupling layer: what the network says becomes a scale and a shift of the transformed
// features, or a shift only.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "blocks.hpp"
#include "features.inl"
#include "kernels.hpp"
#include "log_scale.inl"
#include "network.inl"
#include "scratch.hpp"
#include "simd.hpp"
#include "steps.hpp"
#include "tape.inl"
#include "tile.inl"

namespace nvpflow::cpu {
namespace {

/// Kind::coupling. The functions of a kind: layers.inl. On the tape: AffineTape.
template <class T>
struct AffineLayer {
  static void tile(const Layer<T>& layer, bool inverse, const TileState<T>& s);
  static void few_rows(const Layer<T>& layer, bool inverse, const RowState<T>& s);
  static TapeSize tape(const Layer<T>& layer);
  static void taped(const Layer<T>& layer, bool inverse, const FixedTape<T>& fixed, T* tape, int64_t count,
                    int64_t rows);
  static void backward(const Layer<T>& layer, bool inverse, bool input_wanted, const FixedTape<T>& fixed, T* tape,
                       int64_t count, int64_t rows);
  /// Those of the networks, one after the other.
  static int32_t parts(const Layer<T>& layer) {
    return network_parts(layer.network[0]) + (layer.num_networks > 1 ? network_parts(layer.network[1]) : 0);
  }
  static PartSize part(const Layer<T>& layer, int32_t index) {
    const int32_t of_first = network_parts(layer.network[0]);
    return index < of_first ? network_part(layer.network[0], index) : network_part(layer.network[1], index - of_first);
  }
  static void weight_gradient(const Layer<T>& layer, int32_t part, int64_t first, int64_t last,
                              const TileTapes<T>& tapes, T* gradient, bool add);
};

template <class T>
NVPFLOW_INLINE bool is_additive(const Layer<T>& layer) {
  return layer.scale.function == ScaleFunction::none;
}

/// Of an affine coupling ds / du, exp(+-s) and the product d(output) / d(s), [b][rows] each; then what the networks
/// keep.
template <class T>
struct AffineTape {
  T *slope, *scale, *product, *network[2];

  static int64_t row(const Layer<T>& layer) { return is_additive(layer) ? 0 : 3 * layer.b.count; }

  AffineTape(const Layer<T>& layer, T* tape, int64_t rows) {
    slope = tape;
    scale = slope + layer.b.count * rows;
    product = scale + layer.b.count * rows;
    network[0] = tape + row(layer) * rows;
    network[1] = layer.num_networks > 1 ? after_network(layer.network[0], network[0], rows) : nullptr;
  }
};

template <class T>
TapeSize AffineLayer<T>::tape(const Layer<T>& layer) {
  TapeSize size = {AffineTape<T>::row(layer), 0};
  for (int32_t i = 0; i < layer.num_networks; ++i) {
    const TapeSize of_network = network_tape(layer.network[i]);
    size.row += of_network.row;
    size.unit += of_network.unit;
  }
  return size;
}

/// What the networks say: u [b][rows] and t [b][rows], which are one where the coupling is additive.
template <class T>
struct Heads {
  const T *u, *t;
};

/// Of a tile; a: the conditioning features [a][rows].
template <class T>
NVPFLOW_INLINE Heads<T> heads_tile(const Layer<T>& layer, const T* a, const TileState<T>& s) {
  const int64_t size = layer.b.count * s.rows;
  const T* u = network_tile<T>(layer.network[0], a, s.context, s.buffer0, s.buffer1, s.kept, s.rows);
  if (layer.num_networks == 1) return {u, is_additive(layer) ? u : u + size};
  __builtin_memcpy(s.kept, u, static_cast<size_t>(size) * sizeof(T));
  return {s.kept, network_tile<T>(layer.network[1], a, s.context, s.buffer0, s.buffer1, nullptr, s.rows)};
}

/// The same of a few rows, [rows][stride] each.
template <class T>
struct RowHeads {
  const T *u, *t;
  int64_t stride;
};

template <class T>
NVPFLOW_INLINE RowHeads<T> heads_rows(const Layer<T>& layer, const RowPart<T>& a, const RowState<T>& s) {
  const int64_t n = layer.b.count, heads = is_additive(layer) || layer.num_networks > 1 ? 1 : 2;
  const int64_t stride = row_stride<T>(heads * n);
  const T* u = network_rows<T>(layer.network[0], a.first, a.stride, s);
  if (layer.num_networks == 1) return {u, u + (heads - 1) * n, stride};
  __builtin_memcpy(s.kept, u, static_cast<size_t>(s.rows * stride) * sizeof(T));
  return {s.kept, network_rows<T>(layer.network[1], a.first, a.stride, s), stride};
}

/// The buffer that the heads have left free.
template <class T, class SomeHeads, class State>
NVPFLOW_INLINE T* free_buffer(const Layer<T>& layer, const SomeHeads& heads, const State& s) {
  const T* taken = layer.num_networks > 1 ? heads.t : heads.u;
  return taken == s.buffer0 ? s.buffer1 : s.buffer0;
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
#elif defined(__AVX2__)
template <class T>
using Steps = Pair<Pair<Vec<T>>>;  // they spill, but the processor's window holds too few of them
#else
template <class T>
using Steps = Pair<Vec<T>>;
#endif
/// Known scales leave no chain of operations.
template <class T, class LogScale>
constexpr auto steps_with() {
  if constexpr (LogScale::kIsKnown) {
    return Vec<T>{};
  } else {
    return Steps<T>{};
  }
}
template <class T, class LogScale>
using StepsWith = decltype(steps_with<T, LogScale>());
/// Of a few rows, which are fewer than eight on AVX2.
template <class T, class LogScale>
constexpr auto row_steps_with() {
  if constexpr (kVectorBytes == 32 && !LogScale::kIsKnown) {
    return Pair<Vec<T>>{};
  } else {
    return StepsWith<T, LogScale>{};
  }
}
template <class T, class LogScale>
using RowStepsWith = decltype(row_steps_with<T, LogScale>());

/// What a coupling layer does to its transformed part: vectors of it, of the heads u and t, and of the partial sums of
/// the log-determinant, each kind with its own distance between one vector and the next.
template <class T, class LogScale>
struct Affine {
  const LogScale& g;
  bool inverse;
  int64_t u_stride, t_stride, b_stride, log_det_stride;

  /// n: elements of each vector.
  template <class V>
  NVPFLOW_INLINE void apply(const T* u, const T* t, T* b, T* log_det, int64_t n) const {
    if constexpr (LogScale::kIsZero) {
      const V in = load_steps<T, V>(b, b_stride, n), shift = load_steps<T, V>(t, t_stride, n);
      store_steps<T>(b, b_stride, inverse ? in - shift : in + shift, n);
    } else {
      const auto at = g.template load<V>(u, u_stride, n);
      const V in = load_steps<T, V>(b, b_stride, n), shift = load_steps<T, V>(t, t_stride, n);
      const V sum = load_steps<T, V>(log_det, log_det_stride, n);
      store_steps<T>(b, b_stride, inverse ? (in - shift) * g.scale(at, true) : fma(in, g.scale(at, false), shift), n);
      store_steps<T>(log_det, log_det_stride, inverse ? sum - at.s : sum + at.s, n);
    }
  }
};

template <class T>
void AffineLayer<T>::tile(const Layer<T>& layer, bool inverse, const TileState<T>& s) {
  constexpr int64_t L = kLanes<T>;
  const int64_t rows = s.rows, size = layer.b.count * rows, partials = L * rows;
  const T* a = take_features<T>(layer.a, s.state, s.gathered, rows);
  const Heads<T> heads = heads_tile<T>(layer, a, s);
  const T *u = heads.u, *t = heads.t;
  T* b = take_features<T>(layer.b, s.state, s.gathered, rows);
  T* partial = s.log_det;
  with_log_scale(layer.scale, [&]<class G>(G g) __attribute__((always_inline)) {
    constexpr int64_t kStep = kVectors<StepsWith<T, G>> * L;
    if constexpr (G::kIsKnown) {
      T* known = free_buffer(layer, heads, s);
      g = known_scale<T>(layer.scale, inverse, {u, size, known, known + size, nullptr, size, size, 1});
      u = known;
    }
    const Affine<T, G> affine = {g, inverse, L, L, L, L};
    // As many features as there are partial sums lie beside each other just as the sums do.
    for (int64_t begin = 0; begin < size; begin += partials) {
      const int64_t end = smaller(begin + partials, size);
      T* log_det = partial - begin;
      int64_t i = begin;
      for (; i + kStep <= end; i += kStep) affine.template apply<StepsWith<T, G>>(u + i, t + i, b + i, log_det + i, L);
      for (; i < end; i += L) affine.template apply<Vec<T>>(u + i, t + i, b + i, log_det + i, L);
    }
  });
  put_features<T>(layer.b, b, s.state, rows);
}

/// The transformed part b of a few rows, from its heads.
template <class T, class LogScale>
NVPFLOW_INLINE void affine_rows(const Affine<T, LogScale>& affine, const T* u, const T* t, int64_t t_stride, T* b,
                                int64_t n, const RowState<T>& s) {
  constexpr int64_t L = kLanes<T>, kStep = kVectors<RowStepsWith<T, LogScale>>;
  for (int64_t j = 0; j < n; j += L) {
    const auto at = [&](int64_t r, auto&& apply) __attribute__((always_inline)) {
      apply(u + r * affine.u_stride + j, t + r * t_stride + j, b + r * affine.b_stride + j, s.log_det + r * L, n - j);
    };
    int64_t r = 0;
    for (; r + kStep <= s.rows; r += kStep) {
      at(r, [&](auto... p) __attribute__((always_inline)) { affine.template apply<RowStepsWith<T, LogScale>>(p...); });
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

/// few_rows of a plain layer, its features a and b where they lie or copied.
template <class T>
NVPFLOW_INLINE void plain_rows(const Layer<T>& layer, bool inverse, const RowPart<T>& b, const T* u,
                               const RowState<T>& s) {
  const int64_t n = layer.b.count, stride = row_stride<T>(2 * n);
  const TanhScale<T> g = {layer.scale};
  const Affine<T, TanhScale<T>> affine = {g, inverse, stride, stride, b.stride, kLanes<T>};
  affine_rows<T>(affine, u, u + n, stride, b.first, n, s);
}

/// few_rows of a plain layer whose features follow each other.
template <class T>
NVPFLOW_INLINE void plain_rows(const Layer<T>& layer, bool inverse, const RowState<T>& s) {
  const T* u = mlp_rows<T, /*plain=*/true>(layer.network[0], s.state + layer.a.begin, s.stride, s);
  plain_rows<T>(layer, inverse, {s.state + layer.b.begin, s.stride}, u, s);
}

/// few_rows of a plain layer of any program.
template <class T>
NVPFLOW_NOINLINE void gathering_rows(const Layer<T>& layer, bool inverse, const RowState<T>& s) {
  const RowPart<T> a = take_features<T>(layer.a, s, s.gathered);
  const T* u = mlp_rows<T, /*plain=*/true>(layer.network[0], a.first, a.stride, s);
  const RowPart<T> b = take_features<T>(layer.b, s, s.gathered);
  plain_rows<T>(layer, inverse, b, u, s);
  put_features<T>(layer.b, b, s);
}

/// few_rows of any layer.
template <class T>
NVPFLOW_NOINLINE void general_rows(const Layer<T>& layer, bool inverse, const RowState<T>& s) {
  const int64_t n = layer.b.count;
  const RowPart<T> a = take_features<T>(layer.a, s, s.gathered);
  const RowHeads<T> heads = heads_rows<T>(layer, a, s);
  const RowPart<T> b = take_features<T>(layer.b, s, s.gathered);
  with_log_scale(layer.scale, [&]<class G>(G g) __attribute__((always_inline)) {
    const T* u = heads.u;
    int64_t u_stride = heads.stride;
    if constexpr (G::kIsKnown) {
      T* known = free_buffer(layer, heads, s);
      u_stride = row_stride<T>(2 * padded<T>(n));
      g = known_scale<T>(layer.scale, inverse,
                         {u, heads.stride, known, known + padded<T>(n), nullptr, u_stride, n, s.rows});
      u = known;
    }
    const Affine<T, G> affine = {g, inverse, u_stride, heads.stride, b.stride, kLanes<T>};
    affine_rows<T>(affine, u, heads.t, heads.stride, b.first, n, s);
  });
  put_features<T>(layer.b, b, s);
}

template <class T>
void AffineLayer<T>::few_rows(const Layer<T>& layer, bool inverse, const RowState<T>& s) {
  if (layer.plain) return gathering_rows<T>(layer, inverse, s);
  general_rows<T>(layer, inverse, s);
}

/// Affine that leaves on the tape what the way back needs.
template <class T, class LogScale>
struct TapedAffine {
  const LogScale& g;
  bool inverse;

  template <class V>
  NVPFLOW_INLINE void apply(int64_t i, const T* u, const T* t, T* b, T* log_det, const AffineTape<T>& keep) const {
    constexpr int64_t L = kLanes<T>;
    if constexpr (LogScale::kIsZero) {
      Affine<T, LogScale>{g, inverse, L, L, L, L}.template apply<V>(u + i, t + i, b + i, log_det + i, L);
    } else {
      const auto at = g.template load<V>(u + i, L, L);
      const V shift = load_steps<T, V>(t + i, L, L);
      const V in = load_steps<T, V>(b + i, L, L), sum = load_steps<T, V>(log_det + i, L, L);
      const V scale = g.scale(at, inverse);
      const V out = inverse ? (in - shift) * scale : fma(in, scale, shift);
      store_steps<T>(log_det + i, L, inverse ? sum - at.s : sum + at.s, L);
      store_steps<T>(b + i, L, out, L);
      if constexpr (!LogScale::kIsKnown) {
        store_steps<T>(keep.slope + i, L, g.slope(at), L);
        store_steps<T>(keep.scale + i, L, scale, L);
      }
      store_steps<T>(keep.product + i, L, inverse ? -out : in * scale, L);
    }
  }
};

/// What the networks say, head [heads b][rows].
template <class T>
void taped_heads(const Layer<T>& layer, const AffineTape<T>& keep, const FixedTape<T>& fixed, T* head, int64_t count,
                 int64_t rows) {
  const T* a = take_features<T>(layer.a, fixed.state, fixed.gathered, rows);
  for (int32_t i = 0; i < layer.num_networks; ++i) {
    const Network<T>& net = layer.network[i];
    network_taped<T>(net, a, fixed.context, keep.network[i], fixed.buffer0, count, rows);
    const int64_t out = net.dense[net.num_dense - 1].out, stride = row_stride<T>(out);
    gather_tile<T>([&](int64_t r) { return fixed.buffer0 + r * stride; }, count, out, head, rows);
    head += out * rows;
  }
}

template <class T>
void AffineLayer<T>::taped(const Layer<T>& layer, bool inverse, const FixedTape<T>& fixed, T* tape, int64_t count,
                           int64_t rows) {
  const AffineTape<T> keep(layer, tape, rows);
  T* head = fixed.buffer1;
  taped_heads<T>(layer, keep, fixed, head, count, rows);
  constexpr int64_t L = kLanes<T>;
  const int64_t size = layer.b.count * rows, partials = L * rows;
  const T* t = is_additive(layer) ? head : head + size;
  T* b = take_features<T>(layer.b, fixed.state, fixed.gathered, rows);
  const T* u = head;
  with_log_scale(layer.scale, [&]<class G>(G g) __attribute__((always_inline)) {
    constexpr int64_t kStep = kVectors<StepsWith<T, G>> * L;
    if constexpr (G::kIsKnown) {
      u = fixed.buffer0;
      g = known_scale<T>(layer.scale, inverse, {head, size, fixed.buffer0, keep.scale, keep.slope, size, size, 1});
    }
    const TapedAffine<T, G> affine = {g, inverse};
    for (int64_t begin = 0; begin < size; begin += partials) {  // as in tile()
      const int64_t end = smaller(begin + partials, size);
      T* log_det = fixed.partial - begin;
      int64_t i = begin;
      for (; i + kStep <= end; i += kStep) affine.template apply<StepsWith<T, G>>(i, u, t, b, log_det, keep);
      for (; i < end; i += L) affine.template apply<Vec<T>>(i, u, t, b, log_det, keep);
    }
  });
  put_features<T>(layer.b, b, fixed.state, rows);
}

/// From the cotangent of the layer's output to that of its input, in place, of b [b][rows]; head [heads b][rows] =
/// cotangent of the heads.
template <class T>
void affine_backward(const Layer<T>& layer, bool inverse, const AffineTape<T>& keep, const FixedTape<T>& fixed, T* b,
                     T* head, int64_t rows) {
  const int64_t n = layer.b.count;
  if (is_additive(layer)) {
    for (int64_t at = 0; at < n * rows; at += kLanes<T>) {
      const Vec<T> g = load<T>(b + at);
      store<T>(head + at, inverse ? -g : g);
    }
    return;
  }
  for (int64_t j = 0; j < n; ++j) {
    for (int64_t r = 0; r < rows; r += kLanes<T>) {
      const int64_t at = j * rows + r;
      const Vec<T> g = load<T>(b + at), g_log_det = load<T>(fixed.log_det_cotangent + r);
      const Vec<T> scaled = g * load<T>(keep.scale + at);
      const Vec<T> g_s = fma(g, load<T>(keep.product + at), inverse ? -g_log_det : g_log_det);
      store<T>(b + at, scaled);
      store<T>(head + at, g_s * load<T>(keep.slope + at));
      store<T>(head + n * rows + at, inverse ? -scaled : g);
    }
  }
}

template <class T>
void AffineLayer<T>::backward(const Layer<T>& layer, bool inverse, bool input_wanted, const FixedTape<T>& fixed,
                              T* tape, int64_t count, int64_t rows) {
  const AffineTape<T> keep(layer, tape, rows);
  T* head = fixed.buffer0;
  T* b = take_features<T>(layer.b, fixed.cotangent, fixed.gathered, rows);
  affine_backward<T>(layer, inverse, keep, fixed, b, head, rows);
  put_features<T>(layer.b, b, fixed.cotangent, rows);
  T* a = input_wanted ? take_features<T>(layer.a, fixed.cotangent, fixed.gathered, rows) : nullptr;
  for (int32_t i = 0; i < layer.num_networks; ++i) {  // of both, before buffer0 serves as scratch
    start_network_backward<T>(layer.network[i], head + i * layer.b.count * rows, keep.network[i], count, rows);
  }
  for (int32_t i = 0; i < layer.num_networks; ++i) {
    network_backward<T>(layer.network[i], keep.network[i], fixed.buffer0, fixed.buffer1, a, fixed.context_cotangent,
                        count, rows);
  }
  if (input_wanted) put_features<T>(layer.a, a, fixed.cotangent, rows);
}

template <class T>
void AffineLayer<T>::weight_gradient(const Layer<T>& layer, int32_t part, int64_t first, int64_t last,
                                     const TileTapes<T>& tapes, T* gradient, bool add) {
  const AffineTape<T> keep(layer, const_cast<T*>(tapes.first), tapes.rows);
  const int32_t of_first = network_parts(layer.network[0]), i = part < of_first ? 0 : 1;
  TileTapes<T> of_network = tapes;
  of_network.first = keep.network[i];
  network_weight_gradient<T>(layer.network[i], i == 0 ? part : part - of_first, first, last, of_network, gradient, add);
}

}  // namespace
}  // namespace nvpflow::cpu

// KERNEL: the walks of rows through all layers, in either direction, with their log-determinant and density; noise.
//
// A tile is feature-major, X[feature][row], a few vectors of rows wide, and goes from the first layer to the last in
// the same scratch: no [B, H] array exists. A row costs 2 sum(in * out) FLOPs of the dense layers and reads and writes
// 4 D bytes.
//
// The row path does a few rows, left over after whole vectors, with vectors over outputs. Every number of a row is
// formed by the same operations in the same order on both paths: the sums follow Dense::segment, and sums over
// features are kept in kLanes partial sums (feature j in partial j mod kLanes) that sum_lanes or its tile form adds up
// at the end.
#pragma once

#include <stdint.h>

#include "affine.inl"
#include "base.inl"
#include "blocks.hpp"
#include "context.inl"
#include "dense_few.inl"
#include "features.inl"
#include "kernels.hpp"
#include "layers.inl"
#include "log_scale.inl"
#include "partial_sums.inl"
#include "poison.inl"
#include "round_up.hpp"
#include "scratch.hpp"
#include "simd.hpp"
#include "tile.inl"

namespace nvpflow::cpu {
namespace {

template <class T>
void flow_tile(const Program<T>& program, bool inverse, const TileState<T>& s) {
  for (int64_t i = 0; i < kLanes<T> * s.rows; i += kLanes<T>) store<T>(s.log_det + i, Vec<T>{});
  for (int64_t k = 0; k < program.num_layers; ++k) {
    const Layer<T>& layer = program.layers[inverse ? program.num_layers - 1 - k : k];
    const bool backwards = inverse != layer.inverse;
    visit(layer,
          [&]<class LayerKind>(LayerKind) __attribute__((always_inline)) { LayerKind::tile(layer, backwards, s); });
  }
}

/// plain: the program is.
template <class T, bool plain>
NVPFLOW_INLINE void flow_rows(const Program<T>& program, bool inverse, const RowState<T>& s) {
  for (int64_t i = 0; i < s.rows * kLanes<T>; i += kLanes<T>) store<T>(s.log_det + i, Vec<T>{});
  for (int64_t k = 0; k < program.num_layers; ++k) {
    const Layer<T>& layer = program.layers[inverse ? program.num_layers - 1 - k : k];
    const bool backwards = inverse != layer.inverse;
    if (plain && layer.num_networks > 0) {
      plain_rows<T>(layer, backwards, s);
      continue;
    }
    visit(layer,
          [&]<class LayerKind>(LayerKind) __attribute__((always_inline)) { LayerKind::few_rows(layer, backwards, s); });
  }
}

/// Features lie elsewhere in a tile than in a row, at one end of the flow at least.
template <class T>
NVPFLOW_INLINE bool is_placed(const Program<T>& program) {
  return program.data_place != nullptr || program.latent_place != nullptr;
}

/// What every transform needs.
template <class T>
struct PlainScratch {
  T *state, *partial, *buffer0, *buffer1, *poison, *log_det;

  PlainScratch(const Program<T>& p, Carver<T>& carver, int64_t rows)
      : state(carver.take(row_stride<T>(p.input_size) * rows)),
        partial(carver.take(kLanes<T> * rows)),
        buffer0(carver.take(row_stride<T>(p.max_width) * rows)),
        buffer1(carver.take(row_stride<T>(p.max_width) * rows)),
        poison(carver.take(rows)),
        log_det(carver.take(rows)) {}
};

/// gathered: where Program::gathers; ordered, where the program is placed: one row, its features in order; context:
/// of the rows; density: of the noise they start from.
template <class T>
struct TransformScratch : PlainScratch<T> {
  T *gathered, *ordered, *kept, *context, *density;
  int64_t context_stride, size;

  TransformScratch(const Program<T>& p, T* scratch, int64_t rows) : TransformScratch(p, Carver<T>{scratch}, rows) {}

 private:
  TransformScratch(const Program<T>& p, Carver<T> carver, int64_t rows) : PlainScratch<T>(p, carver, rows) {
    gathered = carver.take(p.gathers ? row_stride<T>(p.input_size) * rows : 0);
    ordered = carver.take(is_placed(p) ? row_stride<T>(p.input_size) : 0);
    kept = carver.take(p.kept_width > 0 ? row_stride<T>(p.kept_width) * rows : 0);
    context_stride = p.context_size > 0 ? row_stride<T>(p.context_size) : 0;
    context = carver.take(context_stride * rows);
    density = carver.take(rows);
    size = carver.used;
  }
};

template <class T>
int64_t transform_scratch(const Program<T>& program) {
  return TransformScratch<T>(program, nullptr, program.tile_rows).size;
}

template <class T>
NVPFLOW_INLINE StateContext<T> context_of(const TransformCall<T>& call, const TransformScratch<T>& s) {
  if (call.context.rows == nullptr) return {nullptr, 0, call.context.folded};
  return {s.context, s.context_stride, nullptr};
}

template <class T>
void copy_out(const T* in, T* out, int64_t count) {
  for (int64_t r = 0; r < count; r += kLanes<T>) store_upto<T>(out + r, load<T>(in + r), count - r);
}

/// Whether a call wants log p of what comes out of the base: it is known only before the rows go through the flow.
template <class T>
NVPFLOW_INLINE bool wants_density_of_noise(const TransformCall<T>& call) {
  return call.inverse && call.log_prob != nullptr;
}

/// log_prob [rows] from the base density of the noise that a tile started from and from its log-determinant.
template <class T>
void log_prob_of_noise(const T* density, const T* log_det, T* out, int64_t rows) {
  for (int64_t r = 0; r < rows; r += kLanes<T>) store<T>(out + r, load<T>(density + r) - load<T>(log_det + r));
}

/// `in`, `out`: where the features of the call's input and output lie.
template <class T, class In, class Out>
void transform_tile(const Program<T>& program, const TransformCall<T>& call, int64_t begin, int64_t count, T* scratch,
                    In in, Out out) {
  const int64_t rows = round_up(count, kLanes<T>), features = program.input_size;
  const TransformScratch<T> s(program, scratch, rows);
  if (call.in == nullptr) {
    const uint64_t row = call.first_row + static_cast<uint64_t>(begin);
    visit_base(program.base, [&]<class Density>(Density) {
      Density::noise_tile(program.base, call.seed, row, features, s.state, rows, in);
    });
  } else {
    load_tile<T>(call.in, call.index, begin, count, features, s.state, rows, in);
  }
  const bool sampled = wants_density_of_noise(call);
  if (sampled) {
    for (int64_t r = 0; r < rows; r += kLanes<T>) store<T>(s.density + r, Vec<T>{});
    visit_base(program.base, [&]<class Density>(Density) {
      Density::log_prob_tile(program.base, s.state, features, s.density, s.density, rows, in);
    });
  }
  if (call.context.rows != nullptr) load_context_tile<T>(program, call.context, begin, count, s.context, rows);
  flow_tile<T>(program, call.inverse,
               {s.state, s.partial, s.buffer0, s.buffer1, s.gathered, rows, s.kept, context_of(call, s)});
  const bool summed = call.log_det != nullptr || call.log_prob != nullptr;
  if (summed) sum_partials_tile<T>(s.partial, s.log_det, rows);
  // What comes in as NaN or inf never becomes finite: one look at the end finds all there is to settle.
  bool poisoned = find_poison<T>(s.state, features, s.poison, rows);
  if (program.context_size > 0) poisoned |= add_context_poison<T>(program, call.context, begin, count, s.poison);
  if (poisoned) {
    for (int64_t r = 0; r < count; ++r) {
      if (s.poison[r] == T(0)) continue;
      settle_row<T>(call, context_is_finite<T>(program, call.context, begin + r), begin + r, features, s.state + r,
                    rows, summed ? s.log_det + r : nullptr);
    }
  }
  if (call.out != nullptr) scatter_tile<T>(s.state, rows, count, features, call.out + begin * features, features, out);
  if (call.log_det != nullptr) copy_out<T>(s.log_det, call.log_det + begin, count);
  if (call.log_prob == nullptr) return;
  if (sampled) {
    log_prob_of_noise<T>(s.density, s.log_det, s.buffer0, rows);
  } else {
    visit_base(program.base, [&]<class Density>(Density) {
      Density::log_prob_tile(program.base, s.state, features, s.log_det, s.buffer0, rows, out);
    });
  }
  copy_out<T>(s.buffer0, call.log_prob + begin, count);
}

template <class T>
void transform_tile(const Program<T>& program, const TransformCall<T>& call, int64_t begin, int64_t count, T* scratch) {
  if (!is_placed(program)) return transform_tile<T>(program, call, begin, count, scratch, InOrder{}, InOrder{});
  const int64_t* ends[2] = {program.data_place, program.latent_place};
  with_place(ends[call.inverse ? 1 : 0], [&](auto in) {
    with_place(ends[call.inverse ? 0 : 1],
               [&](auto out) { transform_tile<T>(program, call, begin, count, scratch, in, out); });
  });
}

/// A row's features from its array to their places.
template <class T>
NVPFLOW_NOINLINE void load_placed(const T* in, const int64_t* place, int64_t features, T* state) {
  for (int64_t j = 0; j < padded<T>(features); ++j) state[j] = T(0);
  for (int64_t j = 0; j < features; ++j) state[place[j]] = in[j];
}

/// A row's features from their places to their order.
template <class T>
NVPFLOW_NOINLINE void order_row(const T* state, const int64_t* place, int64_t features, T* ordered) {
  for (int64_t j = features; j < padded<T>(features); ++j) ordered[j] = T(0);
  for (int64_t j = 0; j < features; ++j) ordered[j] = state[place[j]];
}

template <class T>
NVPFLOW_INLINE void load_row(const T* in, int64_t features, T* state) {
  for (int64_t j = 0; j < features; j += kLanes<T>) store<T>(state + j, load_upto<T>(in + j, features - j));
}

/// Settles a row that has come through the flow, and writes what the call wants of it. known: its context is finite.
template <class T>
NVPFLOW_INLINE void finish_row(const Program<T>& program, const TransformCall<T>& call, int64_t r, T* state,
                               const T* partial, bool known) {
  const int64_t features = program.input_size;
  T log_det = sum_lanes<T>(load<T>(partial));
  Vec<T> zeros = {};
  for (int64_t j = 0; j < features; j += kLanes<T>) {
    zeros = fma(load_upto<T>(state + j, features - j), Vec<T>{}, zeros);
  }
  if (sum_lanes<T>(zeros) != T(0) || !known) settle_row<T>(call, known, r, features, state, 1, &log_det);
  if (call.log_det != nullptr) call.log_det[r] = log_det;
  if (call.log_prob != nullptr) {
    visit_base(program.base, [&]<class Density>(Density) __attribute__((always_inline)) {
      call.log_prob[r] = Density::log_prob_row(program.base, state, features, log_det);
    });
  }
  if (call.out == nullptr) return;
  for (int64_t j = 0; j < features; j += kLanes<T>) {
    store_upto<T>(call.out + r * features + j, load<T>(state + j), features - j);
  }
}

/// transform_rows of a plain program.
template <class T>
void transform_plain_rows(const Program<T>& program, const TransformCall<T>& call, int64_t begin, int64_t count,
                          T* scratch) {
  const int64_t features = program.input_size, stride = row_stride<T>(features);
  Carver<T> carver{scratch};
  const PlainScratch<T> s(program, carver, count);
  for (int64_t r = 0; r < count; ++r) {
    load_row<T>(input_row<T>(call, begin + r, features), features, s.state + r * stride);
  }
  flow_rows<T, /*plain=*/true>(program, call.inverse,
                               {s.state, stride, s.partial, s.buffer0, s.buffer1, nullptr, count});
  for (int64_t r = 0; r < count; ++r) {
    finish_row<T>(program, call, begin + r, s.state + r * stride, s.partial + r * kLanes<T>, true);
  }
}

/// A few rows of call.in, which is given.
template <class T>
NVPFLOW_NOINLINE void transform_rows(const Program<T>& program, const TransformCall<T>& call, int64_t begin,
                                     int64_t count, T* scratch) {
  if (program.plain) return transform_plain_rows<T>(program, call, begin, count, scratch);
  const int64_t features = program.input_size, stride = row_stride<T>(features);
  const TransformScratch<T> s(program, scratch, count);
  const int64_t* in_place = call.inverse ? program.latent_place : program.data_place;
  const int64_t* out_place = call.inverse ? program.data_place : program.latent_place;
  for (int64_t r = 0; r < count; ++r) {
    const T* in = input_row<T>(call, begin + r, features);
    T* state = s.state + r * stride;
    in_place != nullptr ? load_placed<T>(in, in_place, features, state) : load_row<T>(in, features, state);
  }
  if (call.context.rows != nullptr) load_context_rows<T>(program, call.context, begin, count, s.context);
  flow_rows<T, /*plain=*/false>(
      program, call.inverse,
      {s.state, stride, s.partial, s.buffer0, s.buffer1, s.gathered, count, s.kept, context_of(call, s)});
  for (int64_t r = 0; r < count; ++r) {
    T* state = s.state + r * stride;
    if (out_place != nullptr) {
      order_row<T>(state, out_place, features, s.ordered);
      state = s.ordered;
    }
    const bool known = program.context_size == 0 || context_is_finite<T>(program, call.context, begin + r);
    finish_row<T>(program, call, begin + r, state, s.partial + r * kLanes<T>, known);
  }
}

template <class T>
void transform(const Program<T>& program, const TransformCall<T>& call, int64_t begin, int64_t end, T* scratch) {
  for (int64_t r = begin; r < end;) {
    const int64_t count = smaller(program.tile_rows, end - r);
    const int64_t few = count % kLanes<T>;
    if (program.few_at_once && call.in != nullptr && count >= kLanes<T> && count < 2 * kLanes<T>) {
      const int64_t parts = (count + kMaxFewRows<T> - 1) / kMaxFewRows<T>;
      for (int64_t part = 0; part < parts; ++part) {
        const int64_t first = part * count / parts;
        transform_rows<T>(program, call, r + first, (part + 1) * count / parts - first, scratch);
      }
    } else if (call.in == nullptr) {  // noise comes in whole vectors
      transform_tile<T>(program, call, r, count, scratch);
    } else {
      if (count > few) transform_tile<T>(program, call, r, count - few, scratch);
      if (few > 0) transform_rows<T>(program, call, r + count - few, few, scratch);
    }
    r += count;
  }
}

template <class T>
void conditioner(const Program<T>& program, int64_t index, const T* in, const ContextRows<T>& context, int64_t begin,
                 int64_t end, T* s_out, T* t_out, T* scratch) {
  const Layer<T>& layer = program.layers[index];
  const int64_t features = program.input_size, n = layer.b.count;
  for (int64_t r = begin; r < end; r += program.tile_rows) {
    const int64_t count = smaller(program.tile_rows, end - r), rows = round_up(count, kLanes<T>);
    const TransformScratch<T> s(program, scratch, rows);
    with_place(layer.place, [&](auto place) { load_tile<T>(in, nullptr, r, count, features, s.state, rows, place); });
    bool poisoned = find_poison<T>(s.state, features, s.poison, rows);
    StateContext<T> of_rows = {nullptr, 0, context.folded};
    if (program.context_size > 0) poisoned |= add_context_poison<T>(program, context, r, count, s.poison);
    if (context.rows != nullptr) {
      load_context_tile<T>(program, context, r, count, s.context, rows);
      of_rows = {s.context, s.context_stride, nullptr};
    }
    const T* x = take_features<T>(layer.a, s.state, s.gathered, rows);
    const Heads<T> heads =
        heads_tile<T>(layer, x, {s.state, s.partial, s.buffer0, s.buffer1, s.gathered, rows, s.kept, of_rows});
    T *u = const_cast<T*>(heads.u), *t = const_cast<T*>(heads.t);
    with_log_scale(layer.scale, [&]<class G>(const G& g) __attribute__((always_inline)) {
      const int64_t size = n * rows;
      if constexpr (G::kIsKnown) {
        T* scale = free_buffer(layer, heads, s);
        log_scales<T>(layer.scale, false, {u, size, u, scale, nullptr, size, size, 1});
      } else if constexpr (!G::kIsZero) {
        for (int64_t i = 0; i < size; i += kLanes<T>) store<T>(u + i, g.at(load<T>(u + i)).s);
      }
    });
    if (poisoned) {
      spread_poison<T>(s.poison, u, n, rows);
      spread_poison<T>(s.poison, t, n, rows);
    }
    scatter_tile<T>(t, rows, count, n, t_out + r * n, n);
    if (is_additive(layer)) {
      for (int64_t i = 0; i < n * count; ++i) s_out[r * n + i] = poisoned ? s.poison[i / n] : T(0);
    } else {
      scatter_tile<T>(u, rows, count, n, s_out + r * n, n);
    }
  }
}

template <class T>
void noise(const Program<T>& program, uint64_t seed, uint64_t first_row, int64_t begin, int64_t end, T* z, T* scratch) {
  const int64_t features = program.input_size;
  for (int64_t r = begin; r < end; r += program.tile_rows) {
    const int64_t count = smaller(program.tile_rows, end - r), rows = round_up(count, kLanes<T>);
    const uint64_t row = first_row + static_cast<uint64_t>(r);
    visit_base(program.base, [&]<class Density>(Density) {
      Density::noise_tile(program.base, seed, row, features, scratch, rows, InOrder{});
    });
    scatter_tile<T>(scratch, rows, count, features, z + r * features, features);
  }
}

}  // namespace
}  // namespace nvpflow::cpu

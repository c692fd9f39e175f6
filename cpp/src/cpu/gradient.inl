// KERNEL: the reverse pass of a flow, tile by tile: a tile goes forward, its activations stay on the tape, and it comes
// back before the next one starts. No array as long as the batch exists; a row costs 3 times the FLOPs of its forward.
//
// The features of a tile lie feature-major, [feature][row], as in transform.inl; inside a network everything is
// row-major, [row][unit], in both directions, which is also what the gradients of the weights read: nothing as wide as
// a hidden layer is ever transposed.
//
// gradient_tile does the forward and the cotangents; it leaves the input of every dense layer and the cotangent of its
// output. weight_gradient multiplies the two for any part of one kernel, so that threads can share the parameters out
// among themselves: each element of the gradient is summed over the rows of a tile, and over the tiles in order,
// whatever the number of threads.
#pragma once

#include <stdint.h>

#include "base.inl"
#include "blocks.hpp"
#include "context.inl"
#include "kernels.hpp"
#include "layers.inl"
#include "partial_sums.inl"
#include "poison.inl"
#include "simd.hpp"
#include "tape.inl"
#include "tile.inl"

namespace nvpflow::cpu {
namespace {

template <class T>
TapeSize layer_tape(const Layer<T>& layer) {
  return visit(layer, [&]<class LayerKind>(LayerKind) { return LayerKind::tape(layer); });
}

/// The part of `layer` on a tape whose layers' parts begin at `layers`.
template <class T>
NVPFLOW_INLINE T* tape_of(const Layer<T>& layer, T* layers, int64_t rows) {
  return layers + elements(layer.tape_begin, rows);
}

template <class T>
void flow_forward_taped(const Program<T>& program, bool inverse, const FixedTape<T>& fixed, int64_t count,
                        int64_t rows) {
  for (int64_t i = 0; i < kLanes<T> * rows; i += kLanes<T>) store<T>(fixed.partial + i, Vec<T>{});
  for (int64_t k = 0; k < program.num_layers; ++k) {
    const Layer<T>& layer = program.layers[inverse ? program.num_layers - 1 - k : k];
    T* tape = tape_of(layer, fixed.layers, rows);
    const bool backwards = inverse != layer.inverse;
    visit(layer, [&]<class LayerKind>(LayerKind) { LayerKind::taped(layer, backwards, fixed, tape, count, rows); });
  }
}

/// All of one layer's gradient, while its part of the tape is in the cache.
template <class T>
void layer_gradient(const Layer<T>& layer, const TileTapes<T>& tape, T* gradient, bool add) {
  visit(layer, [&]<class LayerKind>(LayerKind) {
    for (int32_t part = 0; part < LayerKind::parts(layer); ++part) {
      LayerKind::weight_gradient(layer, part, 0, LayerKind::part(layer, part).count, tape, gradient, add);
    }
  });
}

/// How the gradient of the base's parameters is shared out; nothing where it has none.
template <class T>
PartSize base_part(const Program<T>& program) {
  return visit_base(program.base,
                    [&]<class Density>(Density) { return Density::part(program.base, program.input_size); });
}

template <class T>
void base_gradient(const Program<T>& program, int64_t first, int64_t last, const TileTapes<T>& tapes, T* gradient,
                   bool add) {
  visit_base(program.base, [&]<class Density>(Density) {
    Density::weight_gradient(program.base, program.input_size, first, last, tapes, gradient, add);
  });
}

/// Of row r of an NLL.
template <class T>
NVPFLOW_INLINE double weight_of(const GradientCall<T>& call, int64_t r) {
  if (call.weights == nullptr) return 1;
  return call.weights[call.index == nullptr ? r : call.index[r]];
}

/// Of the log-determinant of row r, and of log p where the call is of that.
template <class T>
NVPFLOW_INLINE T given_cotangent(const GradientCall<T>& call, int64_t r) {
  if (call.nll) return -static_cast<T>(weight_of(call, r) * call.nll_factor);
  return call.grad_log_det != nullptr ? call.grad_log_det[r] : static_cast<T>(call.density ? 1 : 0);
}

/// The cotangents that the backward pass starts from; rows past `count` hold numbers that are not read. place: of the
/// features of the call's output.
template <class T>
void start_cotangents(const Program<T>& program, const GradientCall<T>& call, const FixedTape<T>& fixed, int64_t begin,
                      int64_t count, int64_t rows, const int64_t* place) {
  const int64_t features = program.input_size;
  for (int64_t r = 0; r < rows; ++r) {
    fixed.log_det_cotangent[r] = r < count ? given_cotangent(call, begin + r) : T(0);
  }
  if (call.nll || call.density) {
    visit_base(program.base, [&]<class Density>(Density) {
      Density::backward(program.base, {fixed.state, features, count, rows, place, fixed.log_det_cotangent,
                                       fixed.cotangent, fixed.base});
    });
  } else if (call.grad_out != nullptr) {
    with_place(place, [&](auto at) {
      load_tile<T>(call.grad_out, nullptr, begin, count, features, fixed.cotangent, rows, at);
    });
  } else {
    for (int64_t i = 0; i < features * rows; i += kLanes<T>) store<T>(fixed.cotangent + i, Vec<T>{});
  }
}

/// The context of the rows, row-major, and zero for its cotangent.
template <class T>
void start_context(const Program<T>& program, const GradientCall<T>& call, const FixedTape<T>& fixed, int64_t begin,
                   int64_t count) {
  load_context_rows<T>(program, call.context, begin, count, fixed.context);
  const int64_t elements = row_stride<T>(program.context_size) * count;
  for (int64_t i = 0; fixed.context_cotangent != nullptr && i < elements; i += kLanes<T>) {
    store<T>(fixed.context_cotangent + i, Vec<T>{});
  }
}

/// to [count][C] = the cotangent of the context as it came in.
template <class T>
void store_context_cotangent(const Program<T>& program, const T* cotangent, int64_t count, T* to) {
  const int64_t size = program.context_size, stride = row_stride<T>(size);
  for (int64_t r = 0; r < count; ++r) {
    for (int64_t i = 0; i < size; i += kLanes<T>) {
      Vec<T> g = load<T>(cotangent + r * stride + i);
      if (program.context_inverse_std != nullptr) g = g * load_upto<T>(program.context_inverse_std + i, size - i);
      store_upto<T>(to + r * size + i, g, size - i);
    }
  }
}

/// Of log p of rows [begin, begin + count), by weight.
template <class T>
void sum_units(const GradientCall<T>& call, const T* log_prob, int64_t begin, int64_t count, double* sums) {
  for (int64_t r = 0; r < count; ++r) {
    double& sum = sums[r / kGradientUnit];
    sum = (r % kGradientUnit == 0 ? 0 : sum) + weight_of(call, begin + r) * static_cast<double>(log_prob[r]);
  }
}

template <class T>
void gradient_tile(const Program<T>& program, const GradientCall<T>& call, int64_t begin, int64_t end, int64_t rows,
                   T* tape, double* sums) {
  const int64_t count = end - begin, features = program.input_size;
  FixedTape<T> fixed(program, tape, rows);
  if (call.grad_context == nullptr) fixed.context_cotangent = nullptr;
  const int64_t* in_place = call.inverse ? program.latent_place : program.data_place;
  const int64_t* out_place = call.inverse ? program.data_place : program.latent_place;
  with_place(in_place,
             [&](auto at) { load_tile<T>(call.in, call.index, begin, count, features, fixed.state, rows, at); });
  T* poison = fixed.log_prob;  // free until the densities are written
  bool poisoned = find_poison<T>(fixed.state, features, poison, rows);
  if (program.context_size > 0) {
    poisoned |= add_context_poison<T>(program, call.context, begin, count, poison);
    start_context<T>(program, call, fixed, begin, count);
  }
  if (poisoned) spread_poison<T>(poison, fixed.state, features, rows);
  flow_forward_taped<T>(program, call.inverse, fixed, count, rows);
  start_cotangents<T>(program, call, fixed, begin, count, rows, out_place);
  if (poisoned) {
    spread_poison<T>(poison, fixed.cotangent, features, rows);
    spread_poison<T>(poison, fixed.log_det_cotangent, 1, rows);
  }
  if (call.nll || call.log_prob != nullptr) {
    T* log_det = fixed.buffer0;
    sum_partials_tile<T>(fixed.partial, log_det, rows);
    visit_base(program.base, [&]<class Density>(Density) {
      with_place(out_place, [&](auto at) {
        Density::log_prob_tile(program.base, fixed.state, features, log_det, fixed.log_prob, rows, at);
      });
    });
    if (find_poison<T>(fixed.log_prob, 1, log_det, rows)) {
      for (int64_t r = 0; r < count; ++r) {  // as settle_row
        T& value = fixed.log_prob[r];
        if (__builtin_isnan(value) && input_is_finite<T>(call, begin + r, features) &&
            context_is_finite<T>(program, call.context, begin + r)) {
          value = -kInfinity<T>;
        }
      }
    }
    if (call.nll) sum_units<T>(call, fixed.log_prob, begin, count, sums);
    for (int64_t r = 0; call.log_prob != nullptr && r < count; ++r) call.log_prob[begin + r] = fixed.log_prob[r];
  }
  if (call.gradient != nullptr && (call.nll || call.density)) {
    base_gradient<T>(program, 0, base_part(program).count, {fixed.base, 0, rows, count}, call.gradient, call.add);
  }
  for (int64_t k = program.num_layers - 1; k >= 0; --k) {
    const Layer<T>& layer = program.layers[call.inverse ? program.num_layers - 1 - k : k];
    T* of_layer = tape_of(layer, fixed.layers, rows);
    const bool input_wanted = k > 0 || call.grad_in != nullptr;
    visit(layer, [&]<class LayerKind>(LayerKind) {
      LayerKind::backward(layer, call.inverse != layer.inverse, input_wanted, fixed, of_layer, count, rows);
    });
    if (call.gradient == nullptr) continue;
    T* gradient = facts_of(layer.kind).has_matrices ? call.products : call.gradient;
    layer_gradient<T>(layer, {of_layer, 0, rows, count, fixed.context}, gradient, call.add);
  }
  if (call.grad_context != nullptr) {
    store_context_cotangent<T>(program, fixed.context_cotangent, count,
                               call.grad_context + begin * program.context_size);
  }
  if (call.grad_in != nullptr) {
    with_place(in_place, [&](auto at) {
      scatter_tile<T>(fixed.cotangent, rows, count, features, call.grad_in + begin * features, features, at);
    });
  }
}

template <class T>
int32_t gradient_parts(const Layer<T>& layer) {
  return visit(layer, [&]<class LayerKind>(LayerKind) { return LayerKind::parts(layer); });
}

template <class T>
PartSize gradient_part(const Layer<T>& layer, int32_t part) {
  return visit(layer, [&]<class LayerKind>(LayerKind) { return LayerKind::part(layer, part); });
}

template <class T>
void weight_gradient(const Program<T>& program, int64_t index, int32_t part, int64_t first, int64_t last,
                     const TileTapes<T>& tapes, T* gradient, bool add) {
  const FixedTape<T> fixed(program, const_cast<T*>(tapes.first), tapes.rows);
  if (index == program.num_layers) {
    const TileTapes<T> of_base = {fixed.base, tapes.stride, tapes.rows, tapes.count};
    return base_gradient<T>(program, first, last, of_base, gradient, add);
  }
  const Layer<T>& layer = program.layers[index];
  const TileTapes<T> of_layer = {tape_of(layer, fixed.layers, tapes.rows), tapes.stride, tapes.rows, tapes.count,
                                 fixed.context};
  visit(layer, [&]<class LayerKind>(LayerKind) {
    LayerKind::weight_gradient(layer, part, first, last, of_layer, gradient, add);
  });
}

}  // namespace
}  // namespace nvpflow::cpu

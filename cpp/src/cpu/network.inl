// KERNEL: the networks of couplings: an mlp or a residual network, on a tile, on a few rows, and there and back with a
// tape. The one branch on their kind.
#pragma once

#include <stdint.h>

#include "dense_back.inl"
#include "kernels.hpp"
#include "mlp.inl"
#include "residual.inl"
#include "scratch.hpp"
#include "simd.hpp"
#include "tape.inl"
#include "tile.inl"

namespace nvpflow::cpu {
namespace {

/// The network on a tile: x is its input [in][rows]; returns the head's outputs [out][rows], in one of the
/// buffers. kept: of TileState.
template <class T>
const T* network_tile(const Network<T>& net, const T* x, const StateContext<T>& context, T* buffer0, T* buffer1,
                      T* kept, int64_t rows) {
  if (net.residual) return residual_tile<T>(net, x, context, buffer0, buffer1, kept, rows);
  return mlp_tile<T>(net, x, context, buffer0, buffer1, rows);
}

/// The network on a few rows; x is its input [rows][stride]; returns the head's outputs [rows][out], in one of the
/// buffers.
template <class T>
NVPFLOW_NOINLINE const T* network_rows(const Network<T>& net, const T* x, int64_t stride, const RowState<T>& s) {
  if (net.residual) return residual_rows<T>(net, x, stride, s);
  return mlp_rows<T>(net, x, stride, s);
}

/// What a network keeps for the way back; first its input, row-major [rows][in].
template <class T>
TapeSize network_tape(const Network<T>& net) {
  return net.residual ? ResidualTape<T>::size(net) : MlpTape<T>::size(net);
}

/// The tape behind that of a network.
template <class T>
T* after_network(const Network<T>& net, T* tape, int64_t rows) {
  return tape + elements(network_tape(net), rows);
}

/// The network on `count` rows: x is its input [in][rows], context [count][row_stride(C)]; the head's outputs go to
/// head [count][out].
template <class T>
void network_taped(const Network<T>& net, const T* x, const T* context, T* tape, T* head, int64_t count, int64_t rows) {
  const int64_t in = net.dense[0].in;
  scatter_tile<T>(x, rows, count, in, tape, row_stride<T>(in));  // where all tapes have it
  if (net.residual) return residual_taped<T>(net, ResidualTape<T>(net, tape, rows), context, head, count);
  mlp_taped<T>(net, MlpTape<T>(net, tape, rows), context, head, count, rows);
}

/// The cotangent of the head's outputs [out][rows], to the tape.
template <class T>
void start_network_backward(const Network<T>& net, const T* head, T* tape, int64_t count, int64_t rows) {
  const int32_t last = net.num_dense - 1;
  T* to = net.residual ? ResidualTape<T>(net, tape, rows).cotangent(last)
                       : MlpTape<T>(net, tape, rows).cotangent(net, last, rows);
  scatter_tile<T>(head, rows, count, net.dense[last].out, to, row_stride<T>(net.dense[last].out));
}

/// From the cotangent of the head's outputs to those of all dense layers' outputs, on the tape. With input_cotangent
/// [in][rows], that of the inputs is added to it, and so with context_cotangent [count][row_stride(C)].
template <class T>
void network_backward(const Network<T>& net, T* tape, T* scratch0, T* scratch1, T* input_cotangent,
                      T* context_cotangent, int64_t count, int64_t rows) {
  const T* of_first = nullptr;
  if (net.residual) {
    const ResidualTape<T> keep(net, tape, rows);
    residual_backward<T>(net, keep, scratch0, scratch1, count);
    of_first = keep.cotangent(0);
  } else {
    const MlpTape<T> keep(net, tape, rows);
    mlp_backward<T>(net, keep, count, rows);
    of_first = keep.cotangent(net, 0, rows);
  }
  if (context_cotangent != nullptr)
    add_context_cotangent<T>(*net.context, of_first, scratch0, context_cotangent, count);
  if (input_cotangent == nullptr || net.dense[0].in == 0) return;
  add_input_cotangent<T>(net.dense[0], of_first, scratch0, scratch1, input_cotangent, count, rows);
}

/// The dense layers, the affine maps, and what reads the context.
template <class T>
int32_t network_parts(const Network<T>& net) {
  return net.num_dense + affine_maps(net) + (net.context == nullptr ? 0 : 1);
}

template <class T>
PartSize network_part(const Network<T>& net, int32_t part) {
  if (part == net.num_dense + affine_maps(net)) return {net.context->in, net.context->out};
  if (part >= net.num_dense) return {net.affines[part - net.num_dense].width, 0};
  return {net.dense[part].in, net.dense[part].out};
}

/// Of one part, [first, last) of what it is shared out by; a dense layer's bias goes with the first. tapes: of the
/// network.
template <class T>
void network_weight_gradient(const Network<T>& net, int32_t part, int64_t first, int64_t last,
                             const TileTapes<T>& tapes, T* gradient, bool add) {
  T* tape = const_cast<T*>(tapes.first);
  const bool of_context = part == net.num_dense + affine_maps(net);
  if (part >= net.num_dense && !of_context) {
    return affine_map_gradient<T>(net, part - net.num_dense, first, last, tapes, gradient, add);
  }
  if (of_context) part = 0;  // whose outputs they share
  const T *x = nullptr, *g = nullptr;
  if (net.residual) {
    const ResidualTape<T> keep(net, tape, tapes.rows);
    x = keep.input_of(part), g = keep.cotangent(part);
  } else {
    const MlpTape<T> keep(net, tape, tapes.rows);
    x = keep.input_of(net, part, tapes.rows), g = keep.cotangent(net, part, tapes.rows);
  }
  if (of_context) {
    return dense_gradient<T>(*net.context, net.context_gradients, tapes.context, g, first, last, tapes, gradient, add);
  }
  dense_gradient<T>(net.dense[part], net.gradients + part, x, g, first, last, tapes, gradient, add);
}

}  // namespace
}  // namespace nvpflow::cpu

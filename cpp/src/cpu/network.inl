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
    residual_backward<T>(net, keep, scratch0, scratch1, context_cotangent, count);
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

/// The parts of a network's gradient: the dense layers, what reads the context for the first of them, the gates, the
/// affine maps.
struct NetworkParts {
  int32_t context, gates, affines, end;
};

template <class T>
NVPFLOW_INLINE NetworkParts parts_of(const Network<T>& net) {
  const int32_t blocks = net.residual ? residual_blocks(net) : 0;
  NetworkParts parts;
  parts.context = net.num_dense;
  parts.gates = parts.context + (net.context == nullptr ? 0 : 1);
  parts.affines = parts.gates + (net.gates == nullptr ? 0 : blocks);
  parts.end = parts.affines + (net.affines == nullptr ? 0 : blocks);
  return parts;
}

template <class T>
int32_t network_parts(const Network<T>& net) {
  return parts_of(net).end;
}

/// The layer of a part that is one.
template <class T>
const Dense<T>& dense_of_part(const Network<T>& net, const NetworkParts& parts, int32_t part) {
  return part < parts.context ? net.dense[part] : part < parts.gates ? *net.context : net.gates[part - parts.gates];
}

template <class T>
PartSize network_part(const Network<T>& net, int32_t part) {
  const NetworkParts parts = parts_of(net);
  if (part >= parts.affines) return {net.affines[part - parts.affines].width, 0};
  const Dense<T>& d = dense_of_part(net, parts, part);
  return {d.in, d.out};
}

/// The inputs of a part that is a dense layer, and the cotangents of its outputs, on the first tape.
template <class T>
struct PartTape {
  const T *x, *g;
};

template <class T>
PartTape<T> tape_of_part(const Network<T>& net, const NetworkParts& parts, int32_t part, const TileTapes<T>& tapes) {
  T* tape = const_cast<T*>(tapes.first);
  const int32_t layer = part < parts.context ? part : 0;  // the first has its outputs in common with the context's
  if (net.residual) {
    const ResidualTape<T> keep(net, tape, tapes.rows);
    if (part < parts.context) return {keep.input_of(part), keep.cotangent(part)};
    return {tapes.context, part < parts.gates ? keep.cotangent(0) : keep.gate_cotangent(part - parts.gates)};
  }
  const MlpTape<T> keep(net, tape, tapes.rows);
  return {part < parts.context ? keep.input_of(net, part, tapes.rows) : tapes.context,
          keep.cotangent(net, layer, tapes.rows)};
}

/// Of one part, [first, last) of what it is shared out by; a dense layer's bias goes with the first. tapes: of the
/// network.
template <class T>
void network_weight_gradient(const Network<T>& net, int32_t part, int64_t first, int64_t last,
                             const TileTapes<T>& tapes, T* gradient, bool add) {
  const NetworkParts parts = parts_of(net);
  if (part >= parts.affines) {
    return affine_map_gradient<T>(net, part - parts.affines, first, last, tapes, gradient, add);
  }
  const DenseGradient* to = part < parts.context ? net.gradients + part
                            : part < parts.gates ? net.context_gradients
                                                 : net.gate_gradients + (part - parts.gates);
  const PartTape<T> tape = tape_of_part(net, parts, part, tapes);
  dense_gradient<T>(dense_of_part(net, parts, part), to, tape.x, tape.g, first, last, tapes, gradient, add);
}

}  // namespace
}  // namespace nvpflow::cpu

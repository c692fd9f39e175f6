// KERNEL: the networks of couplings: an mlp or a residual network, on a tile, on a few rows, and there and back with a
// tape. visit_network is the one switch over their kinds.
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

/// What an mlp does, by the names that all kinds of networks have.
struct Mlp {
  template <class T>
  using Tape = MlpTape<T>;

  template <class T>
  static const T* tile(const Network<T>& net, const T* x, const StateContext<T>& context, T* buffer0, T* buffer1, T*,
                       int64_t rows) {
    return mlp_tile<T>(net, x, context, buffer0, buffer1, rows);
  }
  template <class T>
  static const T* few_rows(const Network<T>& net, const T* x, int64_t stride, const RowState<T>& s) {
    return mlp_rows<T>(net, x, stride, s);
  }
  template <class T>
  static void taped(const Network<T>& net, T* tape, const T* context, T* head, int64_t count, int64_t rows) {
    mlp_taped<T>(net, MlpTape<T>(net, tape, rows), context, head, count, rows);
  }
  template <class T>
  static void backward(const Network<T>& net, T* tape, T*, T*, T*, int64_t count, int64_t rows) {
    mlp_backward<T>(net, MlpTape<T>(net, tape, rows), count, rows);
  }
  /// Of dense layer j: what it reads, and the cotangent of its outputs.
  template <class T>
  static const T* input_of(const Network<T>& net, T* tape, int32_t j, int64_t rows) {
    return MlpTape<T>(net, tape, rows).input_of(net, j, rows);
  }
  template <class T>
  static T* cotangent(const Network<T>& net, T* tape, int32_t j, int64_t rows) {
    return MlpTape<T>(net, tape, rows).cotangent(net, j, rows);
  }
  template <class T>
  static int32_t blocks(const Network<T>&) {
    return 0;
  }
  template <class T>
  static const T* gate_cotangent(const Network<T>&, T*, int32_t, int64_t) {
    return nullptr;  // it has no gates
  }
};

/// What a residual network does.
struct Residual {
  template <class T>
  using Tape = ResidualTape<T>;

  template <class T>
  static const T* tile(const Network<T>& net, const T* x, const StateContext<T>& context, T* buffer0, T* buffer1,
                       T* kept, int64_t rows) {
    return residual_tile<T>(net, x, context, buffer0, buffer1, kept, rows);
  }
  template <class T>
  static const T* few_rows(const Network<T>& net, const T* x, int64_t stride, const RowState<T>& s) {
    return residual_rows<T>(net, x, stride, s);
  }
  template <class T>
  static void taped(const Network<T>& net, T* tape, const T* context, T* head, int64_t count, int64_t rows) {
    residual_taped<T>(net, ResidualTape<T>(net, tape, rows), context, head, count);
  }
  template <class T>
  static void backward(const Network<T>& net, T* tape, T* scratch0, T* scratch1, T* context_cotangent, int64_t count,
                       int64_t rows) {
    residual_backward<T>(net, ResidualTape<T>(net, tape, rows), scratch0, scratch1, context_cotangent, count);
  }
  template <class T>
  static const T* input_of(const Network<T>& net, T* tape, int32_t j, int64_t rows) {
    return ResidualTape<T>(net, tape, rows).input_of(j);
  }
  template <class T>
  static T* cotangent(const Network<T>& net, T* tape, int32_t j, int64_t rows) {
    return ResidualTape<T>(net, tape, rows).cotangent(j);
  }
  template <class T>
  static int32_t blocks(const Network<T>& net) {
    return residual_blocks(net);
  }
  template <class T>
  static const T* gate_cotangent(const Network<T>& net, T* tape, int32_t block, int64_t rows) {
    return ResidualTape<T>(net, tape, rows).gate_cotangent(block);
  }
};

/// f(Mlp()) or f(Residual()): the one switch, so that a forgotten kind does not compile.
template <class T, class F>
NVPFLOW_INLINE decltype(auto) visit_network(const Network<T>& net, F&& f) {
  switch (net.kind) {
    case NetworkKind::mlp:
      break;
    case NetworkKind::residual:
      return f(Residual());
  }
  return f(Mlp());
}

/// The network on a tile: x is its input [in][rows]; returns the head's outputs [out][rows], in one of the
/// buffers. kept: of TileState.
template <class T>
const T* network_tile(const Network<T>& net, const T* x, const StateContext<T>& context, T* buffer0, T* buffer1,
                      T* kept, int64_t rows) {
  return visit_network(net, [&]<class Kind>(Kind) __attribute__((always_inline)) {
    return Kind::template tile<T>(net, x, context, buffer0, buffer1, kept, rows);
  });
}

/// The network on a few rows; x is its input [rows][stride]; returns the head's outputs [rows][out], in one of the
/// buffers.
template <class T>
NVPFLOW_NOINLINE const T* network_rows(const Network<T>& net, const T* x, int64_t stride, const RowState<T>& s) {
  return visit_network(net, [&]<class Kind>(Kind) __attribute__((always_inline)) {
    return Kind::template few_rows<T>(net, x, stride, s);
  });
}

/// What a network keeps for the way back; first its input, row-major [rows][in].
template <class T>
TapeSize network_tape(const Network<T>& net) {
  return visit_network(net, [&]<class Kind>(Kind) { return Kind::template Tape<T>::size(net); });
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
  visit_network(net, [&]<class Kind>(Kind) { Kind::template taped<T>(net, tape, context, head, count, rows); });
}

/// The cotangent of the head's outputs [out][rows], to the tape.
template <class T>
void start_network_backward(const Network<T>& net, const T* head, T* tape, int64_t count, int64_t rows) {
  const int32_t last = net.num_dense - 1;
  T* to = visit_network(net, [&]<class Kind>(Kind) { return Kind::template cotangent<T>(net, tape, last, rows); });
  scatter_tile<T>(head, rows, count, net.dense[last].out, to, row_stride<T>(net.dense[last].out));
}

/// From the cotangent of the head's outputs to those of all dense layers' outputs, on the tape. With input_cotangent
/// [in][rows], that of the inputs is added to it, and so with context_cotangent [count][row_stride(C)].
template <class T>
void network_backward(const Network<T>& net, T* tape, T* scratch0, T* scratch1, T* input_cotangent,
                      T* context_cotangent, int64_t count, int64_t rows) {
  const T* of_first = visit_network(net, [&]<class Kind>(Kind) {
    Kind::template backward<T>(net, tape, scratch0, scratch1, context_cotangent, count, rows);
    return Kind::template cotangent<T>(net, tape, 0, rows);
  });
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
  const int32_t blocks = visit_network(net, [&]<class Kind>(Kind) { return Kind::template blocks<T>(net); });
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
  return visit_network(net, [&]<class Kind>(Kind) -> PartTape<T> {
    if (part >= parts.gates) {
      return {tapes.context, Kind::template gate_cotangent<T>(net, tape, part - parts.gates, tapes.rows)};
    }
    return {part < parts.context ? Kind::template input_of<T>(net, tape, part, tapes.rows) : tapes.context,
            Kind::template cotangent<T>(net, tape, layer, tapes.rows)};
  });
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

// KERNEL PART: the tape, what the way back of a gradient's tile needs, in global memory.
//
// clang-format off
// Arrays of activations (block_layout.hpp) of one tile, one after the other:
//   state, cotangent of the state
//   Reach::all: context, cotangent of the context [C]; where it is standardized the sums over the rows for mean and
//                 log_std, [2 C] numbers; what BaseTape says
//   per coupling: input of the conditioner [a]; per hidden layer value [H], where kept argument [H], cotangent [H];
//                 cotangent of the head [2 b]; slope = ds / du, scale = exp(+-s), product = d(output) / d(s), [b] each
//                 Reach::all: slope, scale, product, then what DenseTape says
//   per spline layer: what came in and the log-slopes, [b] each; the numbers of the splines, where their cotangents go;
//                 where sizes are squashed their derivatives, [2 K b]; then what DenseTape says
//   per linear layer: x and the cotangent of y, [D] each; the sum over the rows of the log-determinant's cotangent
//   per diagonal layer: its output, in the form of a state; sums over the rows for mean and log_std, [2 D] numbers
// clang-format on
#pragma once

#include "plan.hpp"

namespace nvpflow::cuda {

/// gelu and silu need their argument for the derivative; the others' derivative follows from their value.
NVPFLOW_HOST_DEVICE inline bool keeps_argument(Act act) { return act == Act::gelu || act == Act::silu; }

NVPFLOW_HOST_DEVICE inline std::int64_t array_size(std::int64_t rows, std::int64_t features) {
  return rows * round_up(features, 8);
}

/// Whether a gradient forms the context's cotangent: where it is asked for, or the statistics' gradient comes of it.
template <class T>
NVPFLOW_HOST_DEVICE bool is_context_wanted(const Program<T>& program, const GradientCall<T>& call) {
  return call.grad_context != nullptr || (program.context_statistics >= 0 && call.gradient != nullptr);
}

/// Offsets within a coupling's part of the tape.
template <class T>
struct CouplingTape {
  const Program<T>& program;
  const Layer<T>& layer;
  std::int64_t rows, a, b;

  NVPFLOW_HOST_DEVICE CouplingTape(const Program<T>& p, const Layer<T>& l, std::int64_t tile_rows)
      : program(p), layer(l), rows(tile_rows) {
    a = l.num_inputs;
    b = l.num_outputs;
  }
  NVPFLOW_HOST_DEVICE std::int64_t width(int j) const { return program.dense[layer.first_dense + j].out; }
  NVPFLOW_HOST_DEVICE std::int64_t hidden(int j) const {
    std::int64_t at = array_size(rows, a);
    for (int i = 0; i < j; ++i) at += (keeps_argument(layer.activation) ? 3 : 2) * array_size(rows, width(i));
    return at;
  }
  NVPFLOW_HOST_DEVICE std::int64_t value(int j) const { return hidden(j); }
  NVPFLOW_HOST_DEVICE std::int64_t argument(int j) const {
    return hidden(j) + (keeps_argument(layer.activation) ? array_size(rows, width(j)) : 0);
  }
  /// j: a hidden layer, or the head.
  NVPFLOW_HOST_DEVICE std::int64_t cotangent(int j) const {
    return j + 1 == layer.num_dense ? hidden(j) : argument(j) + array_size(rows, width(j));
  }
  NVPFLOW_HOST_DEVICE std::int64_t slope() const { return hidden(layer.num_dense - 1) + array_size(rows, 2 * b); }
  NVPFLOW_HOST_DEVICE std::int64_t scale() const { return slope() + array_size(rows, b); }
  NVPFLOW_HOST_DEVICE std::int64_t product() const { return scale() + array_size(rows, b); }
  NVPFLOW_HOST_DEVICE std::int64_t size() const { return product() + array_size(rows, b); }
  /// The input of dense layer j.
  NVPFLOW_HOST_DEVICE std::int64_t input(int j) const { return j == 0 ? 0 : value(j - 1); }
};

/// The same for Reach::all, and for spline layers.
template <class T>
struct NetworksTape {
  const Program<T>& program;
  const Layer<T>& layer;
  std::int64_t rows;

  NVPFLOW_HOST_DEVICE NetworksTape(const Program<T>& p, const Layer<T>& l, std::int64_t tile_rows)
      : program(p), layer(l), rows(tile_rows) {}
  NVPFLOW_HOST_DEVICE const Dense& dense(int j) const { return program.dense[layer.first_dense + j]; }
  NVPFLOW_HOST_DEVICE std::int64_t slope() const { return 0; }
  NVPFLOW_HOST_DEVICE std::int64_t scale() const { return array_size(rows, layer.num_outputs); }
  NVPFLOW_HOST_DEVICE std::int64_t product() const { return 2 * scale(); }
  NVPFLOW_HOST_DEVICE std::int64_t in() const { return 0; }
  NVPFLOW_HOST_DEVICE std::int64_t log_slope() const { return array_size(rows, layer.num_outputs); }
  NVPFLOW_HOST_DEVICE std::int64_t numbers() const { return 2 * log_slope(); }
  NVPFLOW_HOST_DEVICE std::int64_t squash() const {
    return numbers() + array_size(rows, program.dense[numbers_dense(layer)].out);
  }
  NVPFLOW_HOST_DEVICE std::int64_t cotangent(int j) const { return at(dense(j).tape.cotangent); }
  NVPFLOW_HOST_DEVICE std::int64_t size() const { return at(layer.tape_width); }
  /// Of an array of DenseTape.
  NVPFLOW_HOST_DEVICE std::int64_t at(std::int64_t elements_of_row) const { return rows * elements_of_row; }
};

/// Offsets of the context's arrays within a tape of Reach::all.
template <class T>
struct ContextTape {
  std::int64_t context, array;
  bool standardized;
  std::int64_t count;

  NVPFLOW_HOST_DEVICE ContextTape(const Program<T>& program, std::int64_t tile_rows)
      : context(2 * state_elements(program, tile_rows)),
        array(array_size(tile_rows, program.context_size)),
        standardized(program.context_statistics >= 0),
        count(program.context_size) {}
  NVPFLOW_HOST_DEVICE std::int64_t cotangent() const { return context + array; }
  NVPFLOW_HOST_DEVICE std::int64_t sums() const { return context + 2 * array; }
  NVPFLOW_HOST_DEVICE std::int64_t end() const { return sums() + (standardized ? round_up(2 * count, 16) : 0); }
};

/// Offsets of what a base with parameters keeps on a tape of Reach::all, behind the context. student_t: sums over the
/// rows for log_df. mixture, [numbers][rows]: of each component the responsibility times the cotangent of log p, and
/// the same less what its weight alone is responsible for; e = F^-1 (z - mean) and F^-T e.
template <class T>
struct BaseTape {
  std::int64_t begin, rows, components, features;
  BaseKind kind;

  NVPFLOW_HOST_DEVICE BaseTape(const Program<T>& program, std::int64_t tile_rows)
      : begin(ContextTape<T>(program, tile_rows).end()),
        rows(tile_rows),
        components(program.base.components),
        features(program.input_size),
        kind(program.base.kind) {}
  NVPFLOW_HOST_DEVICE std::int64_t share(std::int64_t m) const { return m * rows; }
  NVPFLOW_HOST_DEVICE std::int64_t excess(std::int64_t m) const { return (components + m) * rows; }
  NVPFLOW_HOST_DEVICE std::int64_t whitened(std::int64_t m) const { return (2 * components + m * features) * rows; }
  NVPFLOW_HOST_DEVICE std::int64_t pulled(std::int64_t m) const { return whitened(components + m); }
  NVPFLOW_HOST_DEVICE std::int64_t size() const {
    if (kind == BaseKind::student_t) return round_up(features, 16);
    return kind == BaseKind::mixture ? round_up(whitened(2 * components), 16) : 0;
  }
  NVPFLOW_HOST_DEVICE std::int64_t end() const { return begin + size(); }
};

/// Offsets within a diagonal layer's part of the tape.
template <class T>
struct DiagonalTape {
  const Program<T>& program;
  std::int64_t rows;

  NVPFLOW_HOST_DEVICE DiagonalTape(const Program<T>& p, const Layer<T>&, std::int64_t tile_rows)
      : program(p), rows(tile_rows) {}
  NVPFLOW_HOST_DEVICE std::int64_t sums() const { return state_elements(program, rows); }
  NVPFLOW_HOST_DEVICE std::int64_t size() const { return sums() + round_up(2 * std::int64_t{program.input_size}, 16); }
};

/// Offsets within a linear layer's part of the tape.
template <class T>
struct LinearTape {
  std::int64_t array;

  NVPFLOW_HOST_DEVICE LinearTape(const Program<T>& program, const Layer<T>&, std::int64_t tile_rows)
      : array(array_size(tile_rows, program.input_size)) {}
  NVPFLOW_HOST_DEVICE std::int64_t x() const { return 0; }
  NVPFLOW_HOST_DEVICE std::int64_t cotangent() const { return array; }
  NVPFLOW_HOST_DEVICE std::int64_t sum() const { return 2 * array; }
  NVPFLOW_HOST_DEVICE std::int64_t size() const { return sum() + 16; }
};

template <Reach reach, class T>
NVPFLOW_HOST_DEVICE auto tape_of(Of<Kind::coupling>, const Program<T>& program, const Layer<T>& layer,
                                 std::int64_t rows) {
  if constexpr (reach == Reach::all) {
    return NetworksTape<T>(program, layer, rows);
  } else {
    return CouplingTape<T>(program, layer, rows);
  }
}
template <Reach reach, class T>
NVPFLOW_HOST_DEVICE DiagonalTape<T> tape_of(Of<Kind::diagonal>, const Program<T>& program, const Layer<T>& layer,
                                            std::int64_t rows) {
  return {program, layer, rows};
}
template <Reach reach, class T>
NVPFLOW_HOST_DEVICE LinearTape<T> tape_of(Of<Kind::linear>, const Program<T>& program, const Layer<T>& layer,
                                          std::int64_t rows) {
  return {program, layer, rows};
}

template <Reach reach, class T>
NVPFLOW_HOST_DEVICE NetworksTape<T> tape_of(Of<Kind::spline>, const Program<T>& program, const Layer<T>& layer,
                                            std::int64_t rows) {
  return {program, layer, rows};
}

/// Where the part of layer k begins; k = num_layers: the size of the tape. reach: of the gradient's kernels.
template <Reach reach, class T>
NVPFLOW_HOST_DEVICE std::int64_t layer_tape(const Program<T>& program, int k, std::int64_t rows) {
  std::int64_t at = 2 * state_elements(program, rows);
  if constexpr (reach == Reach::all) at = BaseTape<T>(program, rows).end();
  for (int i = 0; i < k; ++i) {
    const Layer<T>& layer = program.layers[i];
    visit(layer, [&](auto kind) { at += tape_of<reach>(kind, program, layer, rows).size(); });
  }
  return at;
}

/// Elements of the tape of one tile.
template <class T>
std::int64_t tape_elements(const Program<T>& program, std::int64_t rows) {
  return program.reach == Reach::all ? layer_tape<Reach::all>(program, program.num_layers, rows)
                                     : layer_tape<Reach::general>(program, program.num_layers, rows);
}

}  // namespace nvpflow::cuda

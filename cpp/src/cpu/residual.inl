// KERNEL: a residual network: an initial layer, blocks of two layers whose output is added to their input h, and the
// head: on a tile, on a few rows, and there and back with a tape.
//
//   h = W x + b;  per block h += gate (W_1 act(W_0 act(A(h)) + b_0) + b_1);  the head is linear in h
//
// A is an affine map of each unit, or nothing; the gates are in gates.inl. h stays where it is while a block goes
// through both buffers.
#pragma once

#include <stdint.h>

#include "activations.inl"
#include "blocks.hpp"
#include "dense_back.inl"
#include "dense_few.inl"
#include "dense_rows.inl"
#include "dense_tile.inl"
#include "first_layer.inl"
#include "gates.inl"
#include "kernels.hpp"
#include "scratch.hpp"
#include "simd.hpp"
#include "tape.inl"

namespace nvpflow::cpu {
namespace {

template <class T>
int32_t residual_blocks(const Network<T>& net) {
  return (net.num_dense - 2) / 2;
}

/// Affine maps of the blocks.
template <class T>
int32_t affine_maps(const Network<T>& net) {
  return net.affines == nullptr ? 0 : residual_blocks(net);
}

/// w = act(A(h)) on a tile.
template <class T>
void enter_block_tile(const Network<T>& net, int32_t block, const T* h, T* w, int64_t rows) {
  const int64_t width = net.dense[0].out;
  if (net.affines != nullptr) {
    const BlockAffine<T>& map = net.affines[block];
    for (int64_t j = 0; j < width; ++j) {
      const Vec<T> scale = set1(map.scale[j]), shift = set1(map.shift[j]);
      for (int64_t r = j * rows; r < (j + 1) * rows; r += kLanes<T>) store<T>(w + r, fma(load<T>(h + r), scale, shift));
    }
    h = w;
  }
  activate<T>(net.activation, h, w, width * rows);
}

/// network_tile; h: TileState::kept.
template <class T>
const T* residual_tile(const Network<T>& net, const T* x, const StateContext<T>& context, T* buffer0, T* buffer1, T* h,
                       int64_t rows) {
  const int64_t size = net.dense[0].out * rows;
  first_tile<T>(net, x, context, h, rows, Act::none);
  for (int32_t block = 0; block < residual_blocks(net); ++block) {
    const Dense<T>* dense = net.dense + 1 + 2 * block;
    enter_block_tile<T>(net, block, h, buffer0, rows);
    dense_tile<T>(dense[0], buffer0, buffer1, rows, net.activation);
    if (needs_pass(net.activation)) activate<T>(net.activation, buffer1, buffer1, size);
    dense_tile<T>(dense[1], buffer1, buffer0, rows, Act::none);
    leave_block_tile<T>(net, block, context, buffer0, buffer1, h, rows);
  }
  dense_tile<T>(net.dense[net.num_dense - 1], h, buffer0, rows, Act::none);
  return buffer0;
}

/// a = A(h) for `count` rows, `stride` apart; whole vectors are written.
template <class T>
void map_rows(const BlockAffine<T>& map, const T* h, T* a, int64_t stride, int64_t count) {
  for (int64_t r = 0; r < count; ++r, h += stride, a += stride) {
    for (int64_t j = 0; j < map.width; j += kLanes<T>) {
      store<T>(a + j, fma(load<T>(h + j), load<T>(map.scale + j), load<T>(map.shift + j)));
    }
  }
}

/// w = act(A(h)) for `count` rows, `stride` apart.
template <class T>
void enter_block_rows(const Network<T>& net, int32_t block, const T* h, T* w, int64_t stride, int64_t count) {
  if (net.affines != nullptr) {
    map_rows<T>(net.affines[block], h, w, stride, count);
    h = w;
  }
  activate<T>(net.activation, h, w, count * stride);
}

/// network_rows.
template <class T>
NVPFLOW_NOINLINE const T* residual_rows(const Network<T>& net, const T* x, int64_t x_stride, const RowState<T>& s) {
  const int64_t stride = row_stride<T>(net.dense[0].out), size = s.rows * stride;
  T *h = s.kept, *w = s.buffer0, *v = s.buffer1;
  first_rows<T>(net, x, x_stride, h, stride, s, Act::none);
  for (int32_t block = 0; block < residual_blocks(net); ++block) {
    const Dense<T>* dense = net.dense + 1 + 2 * block;
    enter_block_rows<T>(net, block, h, w, stride, s.rows);
    dense_few<T>(dense[0], w, stride, v, stride, s.rows, net.activation);
    if (needs_pass(net.activation)) activate<T>(net.activation, v, v, size);
    dense_few<T>(dense[1], v, stride, w, stride, s.rows, Act::none);
    leave_block_rows<T>(net, block, s.context, w, v, h, stride, s.rows);
  }
  const Dense<T>& head = net.dense[net.num_dense - 1];
  dense_few<T>(head, h, stride, w, row_stride<T>(head.out), s.rows, Act::none);
  return w;
}

/// What a residual network keeps for the way back, row-major: input [rows][in]; of each block w = act(A(h)) and
/// v = act(W_0 w + b_0), where the way back needs them the argument of v and h, and with gates what is gated, the gates
/// and the cotangents of their arguments, [rows][H] each; the last h; the cotangents of the outputs of the dense
/// layers. Columns are up to whole vectors. Per unit of rows: of each block's affine map the sums of the gradients of
/// scale and shift, [2 H].
template <class T>
class ResidualTape {
 public:
  T* input;

  static TapeSize size(const Network<T>& net) {
    const int64_t stride = row_stride<T>(net.dense[0].out), blocks = residual_blocks(net);
    const int64_t hidden = blocks * block_size(net) + stride, cotangents = (net.num_dense - 1) * stride;
    return {row_stride<T>(net.dense[0].in) + hidden + cotangents + row_stride<T>(net.dense[net.num_dense - 1].out),
            blocks * unit_stride(net)};
  }

  ResidualTape(const Network<T>& net, T* tape, int64_t rows)
      : input(tape),
        argument_(keeps_argument(net.activation)),
        entry_(keeps_entry(net)),
        gated_(net.gates != nullptr),
        blocks_(residual_blocks(net)),
        matrix_(row_stride<T>(net.dense[0].out) * rows),
        block_(block_size(net) * rows),
        unit_(unit_stride(net)),
        hidden_(input + row_stride<T>(net.dense[0].in) * rows),
        cotangents_(hidden_ + blocks_ * block_ + matrix_),
        sums_(tape + size(net).row * rows) {}

  T* w(int32_t block) const { return hidden_ + block * block_; }
  T* v(int32_t block) const { return w(block) + matrix_; }
  T* argument(int32_t block) const { return argument_ ? v(block) + matrix_ : v(block); }
  /// What a block starts from, where it is kept; behind the last block, and where it is not, the last h.
  T* h(int32_t block) const {
    return entry_ && block < blocks_ ? argument(block) + matrix_ : hidden_ + blocks_ * block_;
  }
  const T* input_of(int32_t dense) const {
    if (dense == 0) return input;
    const int32_t block = (dense - 1) / 2;
    return block == blocks_ ? h(block) : dense % 2 == 1 ? w(block) : v(block);
  }
  /// What a block adds to h before the gates, the gates, and the cotangents of their arguments; only with gates.
  T* change(int32_t block) const { return w(block + 1) - 3 * matrix_; }
  T* gate(int32_t block) const { return w(block + 1) - 2 * matrix_; }
  T* gate_cotangent(int32_t block) const { return w(block + 1) - matrix_; }
  /// Of the outputs of a dense layer.
  T* cotangent(int32_t dense) const { return cotangents_ + dense * matrix_; }
  /// Of h before a block, or behind the last one. Without gates it is that of the outputs of the layer before, so that
  /// it is kept once; with gates, the part of the initial layer holds it on its way.
  T* h_cotangent(int32_t block) const { return cotangent(gated_ ? 0 : 2 * block); }
  /// Of a block's affine map and a unit of rows.
  T* sums(int32_t block, int64_t unit) const { return sums_ + (unit * blocks_ + block) * unit_; }

 private:
  static bool keeps_entry(const Network<T>& net) { return net.affines != nullptr || keeps_argument(net.activation); }
  static int64_t block_size(const Network<T>& net) {
    return row_stride<T>(net.dense[0].out) *
           (2 + keeps_argument(net.activation) + keeps_entry(net) + (net.gates != nullptr ? 3 : 0));
  }
  static int64_t unit_stride(const Network<T>& net) {
    return net.affines == nullptr ? 0 : row_stride<T>(2 * padded<T>(net.dense[0].out));
  }

  bool argument_, entry_, gated_;
  int32_t blocks_;
  int64_t matrix_, block_, unit_;
  T *hidden_, *cotangents_, *sums_;
};

/// The network on `count` rows, row-major from the tape's input to the head's outputs [count][out] in `head`. context:
/// [count][row_stride(C)].
template <class T>
void residual_taped(const Network<T>& net, const ResidualTape<T>& keep, const T* context, T* head, int64_t count) {
  const int64_t stride = row_stride<T>(net.dense[0].out), size = count * stride;
  const auto dense = [&](int32_t j, T* y, int64_t y_stride, Act act) {
    dense_rows<T>(net.dense[j], keep.input_of(j), row_stride<T>(net.dense[j].in), y, y_stride, count, act);
  };
  first_many_rows<T>(net, keep.input, context, keep.h(0), stride, count, Act::none);
  for (int32_t block = 0; block < residual_blocks(net); ++block) {
    T *h = keep.h(block), *next = keep.h(block + 1);
    T* change = net.gates == nullptr ? head : keep.change(block);
    enter_block_rows<T>(net, block, h, keep.w(block), stride, count);
    dense(1 + 2 * block, keep.argument(block), stride, net.activation);
    if (needs_pass(net.activation)) activate<T>(net.activation, keep.argument(block), keep.v(block), size);
    dense(2 + 2 * block, change, stride, Act::none);
    leave_block_taped<T>(net, block, context, h, change, keep.gate(block), next, stride, count);
  }
  const int32_t last = net.num_dense - 1;
  dense(last, head, row_stride<T>(net.dense[last].out), Act::none);
}

/// Sums over rows [begin, end) of the gradients of scale, then of shift, of an affine map, from the cotangents g of its
/// results. Whole vectors are written.
template <class T>
void affine_map_sums(const BlockAffine<T>& map, const T* h, const T* g, int64_t stride, int64_t begin, int64_t end,
                     T* sums) {
  for (int64_t j = 0; j < map.width; j += kLanes<T>) {
    Vec<T> scale = {}, shift = {};
    for (int64_t i = begin * stride + j; i < end * stride; i += stride) {
      scale = fma(load<T>(g + i), load<T>(h + i), scale);
      shift = shift + load<T>(g + i);
    }
    store<T>(sums + j, scale);
    store<T>(sums + padded<T>(map.width) + j, shift);
  }
}

/// g, the cotangent of w = act(A(h)), becomes that of A(h), and that of h is to = from + what comes through A. scratch:
/// for A(h).
template <class T>
void leave_block_backward(const Network<T>& net, const ResidualTape<T>& keep, int32_t block, T* g, const T* from, T* to,
                          T* scratch, int64_t count) {
  const int64_t stride = row_stride<T>(net.dense[0].out);
  const BlockAffine<T>& map = net.affines[block];
  const T* h = keep.h(block);
  if (keeps_argument(net.activation)) map_rows<T>(map, h, scratch, stride, count);
  activation_back<T>(net.activation, keep.w(block), keeps_argument(net.activation) ? scratch : keep.w(block), g,
                     count * stride);
  for (int64_t r = 0; r < count; r += kGradientUnit) {
    affine_map_sums<T>(map, h, g, stride, r, smaller(r + kGradientUnit, count), keep.sums(block, r / kGradientUnit));
  }
  for (int64_t r = 0; r < count; ++r) {
    for (int64_t j = 0; j < map.width; j += kLanes<T>) {
      const int64_t at = r * stride + j;
      store<T>(to + at, fma(load<T>(g + at), load<T>(map.scale + j), load<T>(from + at)));
    }
  }
}

/// From the cotangent of the head's outputs to those of the other layers'. To context_cotangent, where it is wanted,
/// the gates' part is added.
template <class T>
void residual_backward(const Network<T>& net, const ResidualTape<T>& keep, T* scratch0, T* scratch1,
                       T* context_cotangent, int64_t count) {
  const int64_t size = count * row_stride<T>(net.dense[0].out);
  const int32_t last = net.num_dense - 1;
  dense_back<T>(net.dense[last], keep.cotangent(last), keep.h_cotangent(residual_blocks(net)), count);
  for (int32_t block = residual_blocks(net) - 1; block >= 0; --block) {
    const Dense<T>* dense = net.dense + 1 + 2 * block;
    const T* of_output = keep.h_cotangent(block + 1);
    T *of_first = keep.cotangent(1 + 2 * block), *of_second = keep.cotangent(2 + 2 * block);
    T* of_input = keep.h_cotangent(block);
    if (net.gates != nullptr) {
      T* of_gate = keep.gate_cotangent(block);
      gate_backward<T>(of_output, keep.change(block), keep.gate(block), of_second, of_gate, size);
      if (context_cotangent != nullptr) {
        add_context_cotangent<T>(net.gates[block], of_gate, scratch0, context_cotangent, count);
      }
    }
    dense_back<T>(dense[1], net.activation, keep.v(block), keep.argument(block), of_second, of_first, count);
    if (net.affines != nullptr) {
      dense_back<T>(dense[0], of_first, scratch0, count);
      leave_block_backward<T>(net, keep, block, scratch0, of_output, of_input, scratch1, count);
      continue;
    }
    dense_back<T>(dense[0], net.activation, keep.w(block), keep.h(block), of_first, scratch0, count);
    add_change<T>(of_output, scratch0, of_input, size);
  }
}

/// Of units [first, last) of a block's affine map, from the sums on the tapes.
template <class T>
void affine_map_gradient(const Network<T>& net, int32_t block, int64_t first, int64_t last, const TileTapes<T>& tapes,
                         T* gradient, bool add) {
  const BlockAffine<T>& map = net.affines[block];
  const ResidualTape<T> keep(net, const_cast<T*>(tapes.first), tapes.rows);
  for (int64_t j = first; j < last; ++j) {
    T scale = 0, shift = 0;
    for (int64_t row = 0; row < tapes.count; row += kGradientUnit) {
      const int64_t tape = row / tapes.rows, unit = row % tapes.rows / kGradientUnit;
      const T* sums = keep.sums(block, unit) + tape * tapes.stride;
      scale += sums[j];
      shift += sums[padded<T>(map.width) + j];
    }
    T *to_scale = gradient + map.scale_offset + j, *to_shift = gradient + map.shift_offset + j;
    *to_scale = add ? *to_scale + scale : scale;
    *to_shift = add ? *to_shift + shift : shift;
  }
}

}  // namespace
}  // namespace nvpflow::cpu

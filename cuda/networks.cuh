// KERNEL PART: the networks of a layer of Reach::all: one perceptron for all heads, or one for each; LayerNorm;
// residual networks with affine maps and gates; a context. `walk` is the walk of a tile (transform.cu, gradient.cu).
//
// A network is a list of dense layers; what becomes of the sums of each is data (Dense, DenseTape), so that one text
// serves all of them. The bound is the dense layers' own, but for LayerNorm (layer_norm.cuh). Two networks pay their
// heads twice: each forms both, with zeros for the other's.
//
// Buffers of hidden activations: two in turn; the third keeps h of a residual network, or what the first of two
// networks says. A residual block reads w = act(A(h)) in the second, leaves act(inner) in the first, and, with a gate,
// the sums of the outer layer in the second and the context in the first.
#pragma once

#include "context.cuh"
#include "dense.cuh"
#include "elementary.cuh"
#include "layer_norm.cuh"
#include "perceptron.cuh"
#include "tape.hpp"
#include "tile.cuh"

namespace nvpflow::cuda {

/// visit(number, own) for the lane's sums and what lies at their place in `rows`.
template <class T, bool kShared, class Visit>
NVPFLOW_DEVICE void each_own(const MemoryRows<T, kShared>& rows, int first, int valid, const Lane& lane, Sums<T>& sums,
                             Visit visit) {
  NVPFLOW_UNROLL
  for (int nb = 0; nb < kOutBlocks; ++nb) {
    if (nb >= valid) continue;
    NVPFLOW_UNROLL
    for (int rb = 0; rb < kRowBlocks; ++rb) {
      const Vec4<T> own = rows.own(lane, rb, first + nb);
      T(&sum)[4] = sums[rb * kOutBlocks + nb];
      visit(sum[0], own.x);
      visit(sum[1], own.y);
      visit(sum[2], own.z);
      visit(sum[3], own.w);
    }
  }
}

template <class T, bool kShared>
NVPFLOW_DEVICE void add_own(const MemoryRows<T, kShared>& rows, int first, int valid, const Lane& lane, Sums<T>& sums) {
  each_own(rows, first, valid, lane, sums, [](T& sum, T own) { sum += own; });
}

/// The affine map that enters a residual block: scale and shift of the features 2 t, 2 t + 1 of an output block.
template <class T>
struct BlockMap {
  T scale[2] = {T(1), T(1)}, shift[2] = {};

  BlockMap() = default;
  NVPFLOW_DEVICE BlockMap(const T* packed, const Dense& d, int block, const Lane& lane) {
    const T* at = packed + d.map + 8 * block + 2 * lane.t;
    NVPFLOW_UNROLL
    for (int i = 0; i < 2; ++i) {
      scale[i] = at[i];
      shift[i] = at[bias_size(d.out) + i];
    }
  }
  NVPFLOW_DEVICE T operator()(int i, T h) const { return multiply_add(h, scale[i], shift[i]); }
};

template <class T>
NVPFLOW_DEVICE void map_sums(const T* packed, const Dense& d, int first, int valid, const Lane& lane, Sums<T>& sums) {
  if (d.map < 0) return;
  NVPFLOW_UNROLL
  for (int nb = 0; nb < kOutBlocks; ++nb) {
    if (nb >= valid) continue;
    const BlockMap<T> map(packed, d, first + nb, lane);
    NVPFLOW_UNROLL
    for (int rb = 0; rb < kRowBlocks; ++rb) {
      T(&sum)[4] = sums[rb * kOutBlocks + nb];
      NVPFLOW_UNROLL
      for (int i = 0; i < 4; ++i) sum[i] = map(i % 2, sum[i]);
    }
  }
}

/// The buffer of the numbers of splines.
template <class Walk>
NVPFLOW_DEVICE auto* numbers_of(const Walk& walk) {
  return walk.tile.hidden(walk.plan.hidden_buffers);
}

/// What becomes of the sums of one dense layer.
template <class Walk, class T, class Finish>
NVPFLOW_DEVICE void take_sums(Walk& walk, const Dense& d, int first, int valid, Sums<T>& sums, Finish finish) {
  const auto rows_of = [&](int buffer) { return walk.rows_of(walk.tile.hidden(buffer), d.out); };
  if (d.role == Role::gate) {
    activate_sums(Act::sigmoid, sums);
    each_own(rows_of(1), first, valid, walk.lane, sums, [](T& sum, T change) { sum *= change; });
  }
  if (d.adds) add_own(rows_of(kKept), first, valid, walk.lane, sums);
  if (d.role == Role::head) return finish(first, valid, sums);
  if (d.role == Role::numbers) {
    return store_sums(sums, first, valid, walk.lane, walk.rows_of(numbers_of(walk), d.out));
  }
  if (d.keeps) store_sums(sums, first, valid, walk.lane, rows_of(kKept));
  if (d.to < 0) return;
  map_sums(walk.packed, d, first, valid, walk.lane, sums);
  activate_sums(d.activation, sums);
  store_sums(sums, first, valid, walk.lane, rows_of(d.to));
}

/// run, finish: of network().
template <Multiply M, class Walk, class T, class Run, class Finish>
NVPFLOW_DEVICE void networks(Walk& walk, const Layer<T>& layer, Run run, Finish finish) {
  const bool gathered = layer.condition == kGathered;
  for (int j = 0; j < network_size(layer); ++j) {
    const Dense& d = walk.program.dense[layer.first_dense + j];
    T* from = walk.tile.hidden(d.from);
    if (d.first && gathered) {
      walk.barrier();
      take_input(walk, layer, from);
    } else if (d.first) {
      from = walk.tile.state(layer.condition);
    } else if (d.role == Role::gate) {
      walk.barrier();
      take_context(walk, from);
    }
    run(By<M>(), d, walk.rows_of(from, d.in),
        [&](int first, int valid, Sums<T>& sums) { take_sums(walk, d, first, valid, sums, finish); });
    if (!d.layer_norm) continue;
    walk.barrier();
    T* values = walk.tile.hidden(d.to);
    normalize(walk, values, values, d.out, static_cast<T*>(nullptr));
  }
}

// ---- with what the way back needs ----------------------------------------------------------------------------------

/// The arrays of a coupling's dense layers on the tape of a tile.
template <class Walk, class T>
struct KeptArrays {
  const Walk& walk;
  const NetworksTape<T>& keep;
  T* part;

  NVPFLOW_DEVICE T* at(std::int32_t array) const { return part + keep.at(array); }
  /// The warp's rows.
  NVPFLOW_DEVICE MemoryRows<T, false> rows(std::int32_t array, int width) const {
    return walk.rows_of(at(array), width);
  }
};

template <class Walk, class T, class Finish>
NVPFLOW_DEVICE void take_sums_taped(Walk& walk, const KeptArrays<Walk, T>& kept, const Dense& d, int first, int valid,
                                    Sums<T>& sums, Finish finish) {
  const DenseTape& tape = d.tape;
  const auto store = [&](std::int32_t array) { store_sums(sums, first, valid, walk.lane, kept.rows(array, d.out)); };
  if (d.role == Role::gate) {
    activate_sums(Act::sigmoid, sums);
    store(tape.gate);
    each_own(kept.rows(tape.scratch, d.out), first, valid, walk.lane, sums, [](T& sum, T change) { sum *= change; });
  }
  if (tape.from_h >= 0) add_own(kept.rows(tape.from_h, d.out), first, valid, walk.lane, sums);
  if (d.role == Role::head) return finish(first, valid, sums);
  if (tape.h >= 0) store(tape.h);
  if (tape.value < 0) return;
  map_sums(walk.packed, d, first, valid, walk.lane, sums);
  const bool argument = tape.argument >= 0 && keeps_argument(d.activation);
  if (argument) store(tape.argument);
  activate_sums(d.activation, sums);
  store(d.layer_norm && !argument ? tape.argument : tape.value);
}

template <Multiply M, class Walk, class T, class Finish>
NVPFLOW_DEVICE void networks_taped(Walk& walk, const NetworksTape<T>& keep, T* part, Finish finish) {
  const Layer<T>& layer = keep.layer;
  const KeptArrays<Walk, T> kept{walk, keep, part};
  for (int j = 0; j < network_size(layer); ++j) {
    const Dense& d = keep.dense(j);
    T* input = d.role == Role::gate ? walk.context() : kept.at(d.tape.input);
    if (d.first && layer.condition == kGathered) {
      take_input(walk, layer, input);
    } else if (d.first) {
      walk.copy(walk.tile.state(layer.condition), input, array_size(walk.plan.tile_rows, d.in));
    }
    dense_streamed<M>(walk.stream, d.in, d.out, walk.packed + d.bias, walk.rows_of(input, d.in), walk.across,
                      walk.plan.warps_across, walk.lane, [&](int first, int valid, Sums<T>& sums) {
                        take_sums_taped(walk, kept, d, first, valid, sums, finish);
                      });
    if (!d.layer_norm) continue;
    walk.barrier();
    T* value = kept.at(d.tape.value);
    const T* from = keeps_argument(d.activation) ? value : kept.at(d.tape.argument);
    normalize(walk, from, value, d.out, kept.at(d.tape.factors));
  }
}

// ---- back ----------------------------------------------------------------------------------------------------------

/// Adds the outputs from `begin` on to the cotangent of the context.
template <class Walk, class T>
NVPFLOW_DEVICE void add_to_context(Walk& walk, int begin, int first, int valid, const Sums<T>& sums) {
  const int size = walk.program.context_size, blocks = blocks_of(size);
  T* to = walk.context_cotangent();
  each_sum(walk, first, valid, sums, begin + size, [&](int f, int r, T upper, T lower) {
    if (f < begin) return;
    to[place(r, f - begin, blocks)] += upper;
    to[place(r + 8, f - begin, blocks)] += lower;
  });
}

/// Adds to the cotangents of what a network reads.
template <class Walk, class T>
NVPFLOW_DEVICE void add_to_inputs(Walk& walk, const Layer<T>& layer, int first, int valid, const Sums<T>& sums) {
  if (layer.condition != kGathered) return add_to_input(walk, layer, first, valid, sums);
  add_to_gathered(walk, layer, first, valid, sums);
  if (walk.context_wanted) add_to_context(walk, layer.num_inputs, first, valid, sums);
}

/// From the cotangent of h behind a block to those of what the gates scale, and of their arguments.
template <class Walk, class T>
NVPFLOW_DEVICE void gate_backward(const Walk& walk, const KeptArrays<Walk, T>& kept, const Dense& gate,
                                  const Dense& outer) {
  const T *g = kept.at(gate.tape.h_cotangent), *gates = kept.at(gate.tape.gate), *change = kept.at(gate.tape.scratch);
  T *of_outer = kept.at(outer.tape.cotangent), *of_gate = kept.at(gate.tape.cotangent);
  const std::int64_t count = array_size(walk.plan.tile_rows, gate.out);
  for (std::int64_t i = thread_index(); i < count; i += num_threads()) {
    const T scaled = g[i] * gates[i];
    of_outer[i] = scaled;
    of_gate[i] = scaled * change[i] * (T(1) - gates[i]);
  }
}

/// The sum over the warp's rows, of the lanes that share t.
template <class T>
NVPFLOW_DEVICE T sum_over_rows(T value) {
  value += shuffle_xor(value, 4);
  value += shuffle_xor(value, 8);
  return value + shuffle_xor(value, 16);
}

/// From the cotangents of w = act(A(h)), the sums, to those of h, and to the sums over the warp's rows for A. entry:
/// the layer that made h; behind: where the cotangent of h behind the block is, which is added.
template <class Walk, class T>
NVPFLOW_DEVICE void leave_block(Walk& walk, const KeptArrays<Walk, T>& kept, const Dense& entry, const Dense& inner,
                                std::int32_t behind, int first, int valid, Sums<T>& sums) {
  const int width = entry.out;
  const auto scratch = kept.rows(inner.tape.scratch, width), h = kept.rows(entry.tape.h, width);
  const auto value = kept.rows(entry.tape.value, width);
  const auto from = kept.rows(behind, width), to = kept.rows(entry.tape.h_cotangent, width);
  T* of_map = entry.map < 0 ? nullptr : kept.at(entry.tape.sums) + walk.row_block / kRowBlocks * 2 * bias_size(width);
  store_sums(sums, first, valid, walk.lane, scratch);
  NVPFLOW_ROLLED
  for (int nb = 0; nb < valid; ++nb) {
    const BlockMap<T> map = entry.map < 0 ? BlockMap<T>() : BlockMap<T>(walk.packed, entry, first + nb, walk.lane);
    T scale[2] = {}, shift[2] = {};
    for (int rb = 0; rb < kRowBlocks; ++rb) {
      const int at = rb * to.stride + (first + nb) * kBlock + walk.lane.chunk;
      const Vec4<T> x = load4(h.at(at));
      const Vec4<T> mapped = {map(0, x.x), map(1, x.y), map(0, x.z), map(1, x.w)};
      const Vec4<T> g = derived(entry.activation, load4(scratch.at(at)), load4(value.at(at)), mapped);
      scale[0] = multiply_add(g.z, x.z, multiply_add(g.x, x.x, scale[0]));
      scale[1] = multiply_add(g.w, x.w, multiply_add(g.y, x.y, scale[1]));
      shift[0] += g.x + g.z;
      shift[1] += g.y + g.w;
      const Vec4<T> by = load4(from.at(at));
      store4(to.at(at), Vec4<T>{multiply_add(g.x, map.scale[0], by.x), multiply_add(g.y, map.scale[1], by.y),
                                multiply_add(g.z, map.scale[0], by.z), multiply_add(g.w, map.scale[1], by.w)});
    }
    if (of_map == nullptr) continue;
    T* sum = of_map + 8 * (first + nb) + 2 * walk.lane.t;
    NVPFLOW_UNROLL
    for (int i = 0; i < 2; ++i) {
      scale[i] = sum_over_rows(scale[i]);
      shift[i] = sum_over_rows(shift[i]);
      if (walk.lane.g == 0) sum[i] = scale[i], sum[bias_size(width) + i] = shift[i];
    }
  }
}

/// The sums of a transposed dense layer, cotangents of what dense layer j reads, to those of what that was made of.
template <class Walk, class T>
NVPFLOW_DEVICE void take_cotangents(Walk& walk, const KeptArrays<Walk, T>& kept, int j, int first, int valid,
                                    Sums<T>& sums) {
  const Dense &d = kept.keep.dense(j), &before = kept.keep.dense(j - 1);
  const DenseTape& tape = before.tape;
  if (d.role == Role::inner) {
    const Dense &outer = kept.keep.dense(j + 1), &last = outer.tape.h >= 0 ? outer : kept.keep.dense(j + 2);
    leave_block(walk, kept, before, d, last.tape.h_cotangent, first, valid, sums);
  } else if (tape.h >= 0) {
    store_sums(sums, first, valid, walk.lane, kept.rows(tape.h_cotangent, d.in));
  } else if (before.layer_norm) {
    store_sums(sums, first, valid, walk.lane, kept.rows(tape.cotangent, d.in));
  } else {
    derive(walk, before.activation, kept.rows(tape.value, d.in),
           kept.rows(tape.argument >= 0 ? tape.argument : tape.value, d.in), kept.rows(tape.cotangent, d.in), first,
           valid, sums);
  }
}

/// From the cotangent of the heads' sums, on the tape, to those of all dense layers and of what the networks read.
template <Multiply M, class Walk, class T>
NVPFLOW_DEVICE void networks_backward(Walk& walk, const NetworksTape<T>& keep, T* part, bool input_wanted) {
  const Layer<T>& layer = keep.layer;
  const KeptArrays<Walk, T> kept{walk, keep, part};
  for (int j = network_size(layer) - 1; j >= 0; --j) {
    const Dense& d = keep.dense(j);
    if (d.role == Role::gate) {
      walk.barrier();
      gate_backward(walk, kept, d, keep.dense(j - 1));
    }
    if (!is_dense_wanted(d, input_wanted, walk.context_wanted)) continue;
    dense_streamed<M>(walk.stream, d.out, d.in, NoBias(), kept.rows(d.tape.cotangent, d.out), walk.across,
                      walk.plan.warps_across, walk.lane, [&](int first, int valid, Sums<T>& sums) {
                        if (d.first) return add_to_inputs(walk, layer, first, valid, sums);
                        if (d.role == Role::gate) return add_to_context(walk, 0, first, valid, sums);
                        take_cotangents(walk, kept, j, first, valid, sums);
                      });
    if (d.first || !keep.dense(j - 1).layer_norm) continue;
    const Dense& before = keep.dense(j - 1);
    walk.barrier();
    normalize_backward(walk, before.activation, kept.at(before.tape.value), kept.at(before.tape.argument),
                       kept.at(before.tape.factors), kept.at(before.tape.cotangent), before.out);
  }
}

/// One block's part of the gradient of the affine map behind dense layer `d`: the sums of `tiles` tiles, the first at
/// `sums`, of `units` times 32 rows each, added up in order.
template <class T>
NVPFLOW_DEVICE void map_gradient(const Dense& d, const T* sums, std::int64_t tape_elements, std::int64_t tiles,
                                 int units, T* gradient) {
  const std::int64_t stride = bias_size(d.out);
  for (int f = thread_index(); f < d.out; f += num_threads()) {
    T scale = 0, shift = 0;
    for (std::int64_t t = 0; t < tiles; ++t) {
      for (int unit = 0; unit < units; ++unit) {
        const T* at = sums + t * tape_elements + unit * 2 * stride + f;
        scale += at[0];
        shift += at[stride];
      }
    }
    gradient[d.scale_offset + f] = scale;
    gradient[d.shift_offset + f] = shift;
  }
}

}  // namespace nvpflow::cuda

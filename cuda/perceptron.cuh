// KERNEL PART: the network of a coupling, dense layers one after the other up to the sums of the heads, and its way
// back. `walk` is the walk of a tile (transform.cu, gradient.cu).
#pragma once

#include "dense.cuh"
#include "elementary.cuh"
#include "tape.hpp"
#include "tile.cuh"

namespace nvpflow::cuda {

/// Zeros for the blocks past `valid`.
template <class T>
NVPFLOW_DEVICE void clear_sums(int valid, Sums<T>& sums) {
  NVPFLOW_UNROLL
  for (int n = 0; n < kRowBlocks * kOutBlocks; ++n) {
    if (n % kOutBlocks < valid) continue;
    NVPFLOW_UNROLL
    for (int i = 0; i < 4; ++i) sums[n][i] = T(0);
  }
}

/// The sums of the heads from the input of the last hidden layer, 32 hidden outputs at a time, with weights in shared
/// memory.
template <Multiply M, class T, class Rows>
NVPFLOW_DEVICE void hidden_and_head(const Dense& hidden, const Dense& head, Act activation, const T* packed,
                                    const Rows& rows, const Lane& lane, Sums<T, kHeadBlocks<T>>& result) {
  const int in_blocks = (hidden.in + 15) / 16, outs = blocks_of(hidden.out);
  const int head_blocks = (head.in + 15) / 16, head_outs = blocks_of(head.out);
  start_sums<T, kHeadBlocks<T>>(packed + head.bias, 0, head_outs, lane, result);
  for (int first = 0; first < outs; first += kOutBlocks) {
    const int valid = outs - first < kOutBlocks ? outs - first : kOutBlocks;
    Sums<T> sums;
    start_sums<T, kOutBlocks>(packed + hidden.bias, first, valid, lane, sums);
    multiply_blocks<M, T, kOutBlocks>(rows, hidden.in, 0, in_blocks,
                                      packed + hidden.weights + first * in_blocks * kBlock, in_blocks * kBlock, valid,
                                      lane, sums);
    activate_sums(activation, sums);
    const RegisterRows<T> chunk{sums};
    if (valid < kOutBlocks) clear_sums<T>(valid, sums);  // whose weights are zero
    NVPFLOW_UNROLL
    for (int pair = 0; pair < kOutBlocks / 2; ++pair) {
      if (2 * pair >= valid) continue;
      const T* w = packed + head.weights + (first / 2 + pair) * kBlock;
      if (M == Multiply::fma || head_outs > kHeadBlocks<T> / 2) {
        multiply16<M, T, kHeadBlocks<T>>(chunk, 2 * pair, true, true, w, head_blocks * kBlock, head_outs, lane, result);
      } else {
        multiply16<M, T, kHeadBlocks<T>>(chunk, 2 * pair, true, false, w, head_blocks * kBlock, head_outs, lane,
                                         result);
      }
    }
  }
}

/// Features of a tile, by their places, one after the other in `to`, an array of activations. less: null, or what is
/// taken off each of them. Whoever wrote the state before must have met the others of the team.
template <class T>
NVPFLOW_DEVICE void gather(Team team, const Tile<T>& tile, const std::int32_t* places, int count, T* to,
                           const T* less = nullptr) {
  const int blocks = blocks_of(count), rows = tile.rows;
  for (int e = team.index; e < 8 * blocks * rows; e += team.size) {
    const int f = e / rows, r = e - f * rows;
    T value = f < count ? tile.at(r, listed(places, f)) : T(0);
    if (less != nullptr && f < count) value -= less[f];
    to[place(r, f, blocks)] = value;
  }
}

/// run(By<M>(), dense layer, rows of its input, finish) forms one dense layer, finish(first output block, valid, sums)
/// takes the heads'.
template <Multiply M, class Walk, class T, class Run, class Finish>
NVPFLOW_DEVICE void network(Walk& walk, const Layer<T>& layer, Run run, Finish finish) {
  constexpr bool kResident = Walk::kResident;
  const int last = layer.num_dense - 1;
  const bool joined = is_joined(walk.program, layer, kResident);
  const bool gathered = Walk::kGeneral && layer.condition == kGathered;
  if (gathered) {
    walk.barrier();
    gather(walk.team(), walk.tile, walk.program.places + layer.input_place, layer.num_inputs, walk.tile.hidden(0));
    if constexpr (kResident) walk.barrier();
  }
  auto rows = walk.rows_of(gathered ? walk.tile.hidden(0) : walk.tile.state(layer.condition), layer.num_inputs);
  for (int j = 0; j < (joined ? last - 1 : last); ++j) {
    const auto to =
        walk.rows_of(walk.tile.hidden((gathered ? j + 1 : j) % 2), walk.program.dense[layer.first_dense + j].out);
    run(By<M>(), walk.program.dense[layer.first_dense + j], rows, [&](int first, int valid, Sums<T>& sums) {
      activate_sums(layer.activation, sums);
      store_sums(sums, first, valid, walk.lane, to);
    });
    if constexpr (kResident) walk.barrier();
    rows = to;
  }
  if (kResident && joined) {
    if constexpr (kResident) {
      // Named where they are used: with references to them ptxas spills registers.
      Sums<T, kHeadBlocks<T>> sums;
      hidden_and_head<M, T>(walk.program.dense[layer.first_dense + last - 1],
                            walk.program.dense[layer.first_dense + last], layer.activation, walk.packed, rows,
                            walk.lane, sums);
      finish(0, blocks_of(walk.program.dense[layer.first_dense + last].out), sums);
    }
  } else {
    run(By<M>(), walk.program.dense[layer.first_dense + last], rows, finish);
  }
  if constexpr (kResident) walk.barrier();
}

/// The same with streamed weights and what the way back needs.
template <Multiply M, class Walk, class T, class Finish>
NVPFLOW_DEVICE void network_taped(Walk& walk, const CouplingTape<T>& keep, T* part, Finish finish) {
  const Layer<T>& layer = keep.layer;
  if (layer.condition == kGathered) {
    gather(walk.team(), walk.tile, walk.program.places + layer.input_place, layer.num_inputs, part);
  } else {
    walk.copy(walk.tile.state(layer.condition), part, array_size(walk.plan.tile_rows, keep.a));
  }
  for (int j = 0; j < layer.num_dense; ++j) {
    const Dense& d = walk.program.dense[layer.first_dense + j];
    const bool head = j + 1 == layer.num_dense;
    const bool keeps = keeps_argument(layer.activation);
    const auto value = walk.rows_of(head ? part : part + keep.value(j), d.out);
    const auto argument = walk.rows_of(head ? part : part + keep.argument(j), d.out);
    dense_streamed<M>(walk.stream, d.in, d.out, walk.packed + d.bias, walk.rows_of(part + keep.input(j), d.in),
                      walk.across, walk.plan.warps_across, walk.lane, [&](int first, int valid, Sums<T>& sums) {
                        if (head) return finish(first, valid, sums);
                        if (keeps) store_sums(sums, first, valid, walk.lane, argument);
                        activate_sums(layer.activation, sums);
                        store_sums(sums, first, valid, walk.lane, value);
                      });
  }
}

/// g times the derivative of an activation with the value v at u.
template <class T>
NVPFLOW_DEVICE Vec4<T> derived(Act act, Vec4<T> g, Vec4<T> v, Vec4<T> u) {
  g.x *= activation_derivative(act, v.x, u.x);
  g.y *= activation_derivative(act, v.y, u.y);
  g.z *= activation_derivative(act, v.z, u.z);
  g.w *= activation_derivative(act, v.w, u.w);
  return g;
}

/// The sums, cotangents of the values of an activation, to `to`, multiplied by its derivative.
template <class Walk, class T, bool kShared>
NVPFLOW_DEVICE void derive(Walk& walk, Act act, const MemoryRows<T, kShared>& value,
                           const MemoryRows<T, kShared>& argument, const MemoryRows<T, kShared>& to, int first,
                           int valid, Sums<T>& sums) {
  store_sums(sums, first, valid, walk.lane, to);
  // Each lane meets its own numbers again, one at a time: one copy of the text for all of them.
  NVPFLOW_ROLLED
  for (int i = 0; i < kRowBlocks * valid; ++i) {
    const int rb = i % kRowBlocks, at = rb * to.stride + (first + i / kRowBlocks) * kBlock + walk.lane.chunk;
    store4(to.at(at), derived(act, load4(to.at(at)), load4(value.at(at)), load4(argument.at(at))));
  }
}

/// visit(f, r, upper, lower) for each output f < count of a dense layer that is the lane's: its sums in the rows r and
/// r + 8.
template <class Walk, class T, class Visit>
NVPFLOW_DEVICE void each_sum(const Walk& walk, int first, int valid, const Sums<T>& sums, int count, Visit visit) {
  NVPFLOW_UNROLL
  for (int nb = 0; nb < kOutBlocks; ++nb) {
    NVPFLOW_UNROLL
    for (int i = 0; i < 2; ++i) {
      const int f = 8 * (first + nb) + 2 * walk.lane.t + i;
      if (nb >= valid || f >= count) continue;
      NVPFLOW_UNROLL
      for (int rb = 0; rb < kRowBlocks; ++rb) {
        const int r = 16 * (walk.row_block + rb) + walk.lane.g;
        visit(f, r, sums[rb * kOutBlocks + nb][i], sums[rb * kOutBlocks + nb][2 + i]);
      }
    }
  }
}

/// Adds to the cotangent of the conditioning features, where they were gathered.
template <class Walk, class T>
NVPFLOW_DEVICE void add_to_gathered(Walk& walk, const Layer<T>& layer, int first, int valid, const Sums<T>& sums) {
  const std::int32_t* places = walk.program.places + layer.input_place;
  each_sum(walk, first, valid, sums, layer.num_inputs, [&](int f, int r, T upper, T lower) {
    const Column<T> column = walk.cotangents.column_at(places[f]);
    column.at(r) += upper;
    column.at(r + 8) += lower;
  });
}

/// Adds to the cotangent of the conditioning features.
template <class Walk, class T>
NVPFLOW_DEVICE void add_to_input(Walk& walk, const Layer<T>& layer, int first, int valid, const Sums<T>& sums) {
  if (layer.condition == kGathered) return add_to_gathered(walk, layer, first, valid, sums);
  const auto to = walk.rows_of(walk.cotangents.state(layer.condition), layer.num_inputs);
  NVPFLOW_UNROLL
  for (int nb = 0; nb < kOutBlocks; ++nb) {
    if (nb >= valid) continue;
    NVPFLOW_UNROLL
    for (int rb = 0; rb < kRowBlocks; ++rb) {
      T* at = to.at(rb * to.stride + (first + nb) * kBlock + walk.lane.chunk);
      const T(&sum)[4] = sums[rb * kOutBlocks + nb];
      const Vec4<T> g = load4(at);
      store4(at, Vec4<T>{g.x + sum[0], g.y + sum[1], g.z + sum[2], g.w + sum[3]});
    }
  }
}

/// From the cotangent of the heads' sums, on the tape, to those of all dense layers and of the conditioning features.
template <Multiply M, class Walk, class T>
NVPFLOW_DEVICE void network_backward(Walk& walk, const CouplingTape<T>& keep, T* part, bool input_wanted) {
  const Layer<T>& layer = keep.layer;
  for (int j = layer.num_dense - 1; j >= 0; --j) {
    if (j == 0 && !input_wanted) return;
    const Dense& d = walk.program.dense[layer.first_dense + j];
    dense_streamed<M>(walk.stream, d.out, d.in, NoBias(), walk.rows_of(part + keep.cotangent(j), d.out), walk.across,
                      walk.plan.warps_across, walk.lane, [&](int first, int valid, Sums<T>& sums) {
                        if (j > 0) {
                          const std::int64_t width = keep.width(j - 1);
                          derive(walk, layer.activation, walk.rows_of(part + keep.value(j - 1), width),
                                 walk.rows_of(part + keep.argument(j - 1), width),
                                 walk.rows_of(part + keep.cotangent(j - 1), width), first, valid, sums);
                        } else {
                          add_to_input(walk, layer, first, valid, sums);
                        }
                      });
  }
}

}  // namespace nvpflow::cuda

// KERNEL PART: a linear layer, y = W x + bias with one matrix for all features, as a dense layer between the state and
// a copy of it: D^2 multiply-adds a row. `walk` is the walk of a tile (transform.cu, gradient.cu).
//
// Inputs and outputs of the matrix are in the order of the features, so that no sum depends on their places; the copy
// and the results go by lists, 2 D numbers a row beside D^2 products. Backwards the bias is taken off first, which
// rounds less than W^-1 times the bias would.
#pragma once

#include "dense.cuh"
#include "perceptron.cuh"
#include "tape.hpp"
#include "tile.cuh"

namespace nvpflow::cuda {

/// W and W^-1 rounded apart are not each other's inverse, so the rounded modes leave them alone.
template <Multiply M>
inline constexpr Multiply kExact = M == Multiply::tf32 || M == Multiply::bf16 ? Multiply::tf32x3 : M;

/// The dense layer for one of the directions.
template <class T>
NVPFLOW_DEVICE const Dense& linear_dense(const Program<T>& program, const Layer<T>& layer, bool backwards) {
  return program.dense[layer.first_dense + (backwards ? 1 : 0)];
}

/// Features of x, or of y, of a tile one after the other in `to`, an array of activations.
template <class Walk, class T>
NVPFLOW_DEVICE void take_features(const Walk& walk, const Tile<T>& tile, std::int64_t place, T* to,
                                  const T* less = nullptr) {
  gather(walk.team(), tile, walk.program.places_at(place), walk.program.input_size, to, less);
}

/// The sums of a dense layer to the features of x, or of y, of a tile.
template <class Walk, class T>
NVPFLOW_DEVICE void put_features(const Walk& walk, const Tile<T>& tile, std::int64_t place, int first, int valid,
                                 const Sums<T>& sums) {
  const std::int32_t* places = walk.program.places_at(place);
  each_sum(walk, first, valid, sums, tile.features, [&](int f, int r, T upper, T lower) {
    const Column<T> column = tile.column_at(listed(places, f));
    column.at(r) = upper;
    column.at(r + 8) = lower;
  });
}

template <class Walk, class T>
NVPFLOW_DEVICE void add_linear_log_det(Walk& walk, const Layer<T>& layer, bool backwards) {
  if (walk.lane.t != 0 || walk.across != 0) return;
  const T total = backwards ? -walk.packed[layer.log_det] : walk.packed[layer.log_det];
  NVPFLOW_UNROLL
  for (int rb = 0; rb < kRowBlocks; ++rb) {
    walk.log_det[rb][0] += total;
    walk.log_det[rb][1] += total;
  }
}

/// taken: an array of activations for what the matrix reads. run: of network(). keep(first output block, valid, sums)
/// is told the results. Whoever wrote the state before must have met the others of the block.
template <Multiply M, class Walk, class T, class Run, class Keep>
NVPFLOW_DEVICE void linear(Walk& walk, const Layer<T>& layer, T* taken, Run run, Keep keep) {
  const bool backwards = is_backwards(walk, layer);
  const Dense& d = linear_dense(walk.program, layer, backwards);
  const std::int64_t from = backwards ? layer.output_place : layer.input_place;
  const std::int64_t to = backwards ? layer.input_place : layer.output_place;
  take_features(walk, walk.tile, from, taken,
                backwards ? walk.packed + linear_dense(walk.program, layer, false).bias : nullptr);
  run(By<kExact<M>>(), d, walk.rows_of(taken, d.in), [&](int first, int valid, Sums<T>& sums) {
    put_features(walk, walk.tile, to, first, valid, sums);
    keep(first, valid, sums);
  });
  add_linear_log_det(walk, layer, backwards);
}

/// The same, with what the way back needs.
template <Multiply M, class Walk, class T, class Run>
NVPFLOW_DEVICE void linear_taped(Walk& walk, const Layer<T>& layer, T* part, Run run) {
  const LinearTape<T> keep(walk.program, layer, walk.plan.tile_rows);
  const bool backwards = is_backwards(walk, layer);
  const auto x = walk.rows_of(part + keep.x(), walk.program.input_size);
  linear<M>(walk, layer, part + (backwards ? keep.cotangent() : keep.x()), run,
            [&](int first, int valid, const Sums<T>& sums) {
              if (backwards) store_sums(sums, first, valid, walk.lane, x);
            });
}

/// From the cotangent of the layer's output to that of its input, in place; on the tape that of y, and the sum of the
/// log-determinant's over the rows. run: the transposed dense layer, where its pass is wanted.
template <Multiply M, class Walk, class T, class Run>
NVPFLOW_DEVICE void linear_backward(Walk& walk, const Layer<T>& layer, T* part, bool wanted, Run run) {
  const LinearTape<T> keep(walk.program, layer, walk.plan.tile_rows);
  const bool backwards = is_backwards(walk, layer);
  T* of_output = backwards ? walk.tile.state0 : part + keep.cotangent();  // the state itself is not read any more
  take_features(walk, walk.cotangents, backwards ? layer.input_place : layer.output_place, of_output);
  if (thread_index() == 0) {
    T sum = 0;
    for (int r = 0; r < walk.tile.valid; ++r) sum += walk.log_det_cotangent[r];
    part[keep.sum()] = sum;
  }
  if (!wanted) return;
  const int features = walk.program.input_size;
  const auto of_y = walk.rows_of(part + keep.cotangent(), features);
  run(By<kExact<M>>(), linear_dense(walk.program, layer, backwards), walk.rows_of(of_output, features),
      [&](int first, int valid, Sums<T>& sums) {
        if (backwards) store_sums(sums, first, valid, walk.lane, of_y);
        put_features(walk, walk.cotangents, backwards ? layer.output_place : layer.input_place, first, valid, sums);
      });
}

/// One block's part of what a linear layer's gradient is formed of, beside the products: the sum of the
/// log-determinant's cotangents of `tiles` tiles, the first at `sums`, and zeros for the tensors, whose gradients come
/// last.
template <class T>
NVPFLOW_DEVICE void linear_gradient(const Program<T>& program, const Layer<T>& layer, const T* sums,
                                    std::int64_t tape_elements, std::int64_t tiles, T* partial) {
  const std::int64_t features = program.input_size, triangle = features * (features - 1) / 2;
  const auto clear = [&](std::int64_t from, std::int64_t count) {
    for (std::int64_t i = thread_index(); i < count; i += num_threads()) partial[from + i] = T(0);
  };
  clear(layer.factors.lower, triangle);
  clear(layer.factors.upper, triangle);
  clear(layer.factors.log_diagonal, features);
  clear(layer.factors.sign, features);
  clear(layer.factors.bias, features);
  if (thread_index() != 0) return;
  T sum = 0;
  for (std::int64_t t = 0; t < tiles; ++t) sum += sums[t * tape_elements];
  partial[program.num_parameters + layer.products + products_size(features) - 1] = sum;
}

}  // namespace nvpflow::cuda

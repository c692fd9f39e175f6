// KERNEL PART: a layer that scales and shifts each feature by itself, y = (x - mean) e^(-log_std): its numbers, its way
// forward and back, and the gradient of its parameters. `walk` is the walk of a tile (transform.cu, gradient.cu).
#pragma once

#include "elementary.cuh"
#include "tape.hpp"
#include "tile.cuh"

namespace nvpflow::cuda {

/// The numbers that the layer computes with (Layer::affine), in the order of the places, by one block, in the
/// arithmetic of the CPU's packing.
template <class T>
NVPFLOW_DEVICE void pack_diagonal(const Program<T>& program, const Layer<T>& layer, const T* parameters, T* packed) {
  const int features = program.input_size;
  const std::int32_t* places = program.places_at(layer.place);
  T* to = packed + layer.affine;
  for (int f = thread_index(); f < features; f += num_threads()) {
    const double log_std = static_cast<double>(parameters[layer.log_std_offset + f]);
    const int at = listed(places, f);
    to[at] = parameters[layer.mean_offset + f];
    to[features + at] = static_cast<T>(exponential(log_std));
    to[2 * features + at] = static_cast<T>(exponential(-log_std));
  }
  if (thread_index() != 0) return;
  double sum = 0;
  for (int f = 0; f < features; ++f) sum += static_cast<double>(parameters[layer.log_std_offset + f]);
  to[3 * features] = static_cast<T>(-sum);
}

/// Whoever wrote the tile before must have met the others of the team.
template <class Walk, class T>
NVPFLOW_DEVICE void diagonal(Walk& walk, const Layer<T>& layer) {
  const bool inverse = is_backwards(walk, layer);
  const int features = walk.program.input_size;
  const T* mean = walk.packed + layer.affine;
  const T* factor = mean + (inverse ? features : 2 * features);
  walk.tile.for_each(walk.team(), [&](int r, int f) {
    T& value = walk.tile.at(r, f);
    value = inverse ? multiply_add(value, factor[f], mean[f]) : (value - mean[f]) * factor[f];
  });
  walk.barrier();
  if (walk.lane.t != 0 || walk.across != 0) return;
  const T total = inverse ? -mean[3 * features] : mean[3 * features];
  NVPFLOW_UNROLL
  for (int rb = 0; rb < kRowBlocks; ++rb) {
    walk.log_det[rb][0] += total;
    walk.log_det[rb][1] += total;
  }
}

/// The same, with what the way back needs.
template <class Walk, class T>
NVPFLOW_DEVICE void diagonal_taped(Walk& walk, const Layer<T>& layer, T* part) {
  diagonal(walk, layer);
  walk.copy(walk.tile.state0, part, state_elements(walk.program, walk.plan.tile_rows));
}

/// From the cotangent of the layer's output to that of its input, in place, and to the tile's sums for the parameters.
template <class Walk, class T>
NVPFLOW_DEVICE void diagonal_backward(Walk& walk, const Layer<T>& layer, T* part) {
  const bool inverse = is_backwards(walk, layer);
  const int features = walk.program.input_size;
  const T* mean = walk.packed + layer.affine;
  const T *std = mean + features, *inverse_std = mean + 2 * features;
  T* sums = part + DiagonalTape<T>(walk.program, layer, walk.plan.tile_rows).sums();
  Tile<T> output = walk.tile;
  output.state0 = part;
  for (int f = thread_index(); f < features; f += num_threads()) {
    T g_mean = 0, g_log_std = 0;
    const T factor = inverse ? std[f] : inverse_std[f];
    for (int r = 0; r < walk.tile.rows; ++r) {
      T& g = walk.cotangents.at(r, f);
      if (r < walk.tile.valid) {
        const T out = output.at(r, f);
        if (inverse) {  // out = in * std + mean, log_det = +sum log_std
          g_mean += g;
          g_log_std += multiply_add(g, out - mean[f], walk.log_det_cotangent[r]);
        } else {  // out = (in - mean) / std, log_det = -sum log_std
          g_mean -= g * factor;
          g_log_std -= multiply_add(g, out, walk.log_det_cotangent[r]);
        }
      }
      g *= factor;
    }
    sums[f] = g_mean;
    sums[features + f] = g_log_std;
  }
}

/// One block's part of the gradient: the sums of `tiles` tiles, the first at `sums`, added up in order.
template <class T>
NVPFLOW_DEVICE void diagonal_gradient(const Program<T>& program, const Layer<T>& layer, const T* sums,
                                      std::int64_t tape_elements, std::int64_t tiles, T* gradient) {
  const int features = program.input_size;
  const std::int32_t* places = program.places_at(layer.place);
  for (int f = thread_index(); f < features; f += num_threads()) {
    T mean = 0, log_std = 0;
    const int at = listed(places, f);
    for (std::int64_t t = 0; t < tiles; ++t) {
      mean += sums[t * tape_elements + at];
      log_std += sums[t * tape_elements + features + at];
    }
    gradient[layer.mean_offset + f] = mean;
    gradient[layer.log_std_offset + f] = log_std;
  }
}

}  // namespace nvpflow::cuda

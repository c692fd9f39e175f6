// KERNEL PART: the context of a tile's rows, standardized where the flow does that: into arrays of activations, its
// poison, the gradient of its statistics. `walk` is the walk of a tile (transform.cu, gradient.cu).
//
// Nothing of it stays in shared memory: each coupling reads it again, C numbers a row from the caches beside C H
// products of its first layer.
#pragma once

#include "diagonal.cuh"
#include "elementary.cuh"
#include "tape.hpp"
#include "tile.cuh"

namespace nvpflow::cuda {

/// The context of row r of the tile; of rows past the end the last one's.
template <class Walk>
NVPFLOW_DEVICE auto context_row(const Walk& walk, int r) {
  const auto& tile = walk.tile;
  const auto& call = walk.call;
  std::int64_t row = tile.first() + (r < tile.valid ? r : tile.valid - 1);
  row = call.index != nullptr ? call.index[row] : row + call.context.first;
  if (call.context.repeat != 1) row = call.context.repeat == 0 ? 0 : row / call.context.repeat;
  return call.context.rows + row * walk.program.context_size;
}

/// Visits (r, i) for the numbers of the context of all rows, those of a row by neighbours.
template <class Walk, class Visit>
NVPFLOW_DEVICE void each_context(const Walk& walk, Visit visit) {
  const int size = walk.program.context_size, count = walk.tile.rows * size;
  const Team team = walk.team();
  for (int e = team.index; e < count; e += team.size) visit(e / size, e % size);
}

/// The context, to the features from `first` on of an array of activations of so many blocks.
template <class Walk, class T>
NVPFLOW_DEVICE void put_context(const Walk& walk, int first, int blocks, T* to) {
  const int size = walk.program.context_size;
  const std::int64_t at = walk.program.context_statistics;
  each_context(walk, [&](int r, int i) {
    T value = context_row(walk, r)[i];
    if (at >= 0) value = (value - walk.packed[at + i]) * walk.packed[at + size + i];
    to[place(r, first + i, blocks)] = value;
  });
}

/// The context, in an array of activations of its own.
template <class Walk, class T>
NVPFLOW_DEVICE void take_context(const Walk& walk, T* to) {
  const int size = walk.program.context_size, blocks = blocks_of(size), padding = 8 * blocks - size;
  const Team team = walk.team();
  for (int e = team.index; e < padding * walk.tile.rows; e += team.size) {
    to[place(e / padding, size + e % padding, blocks)] = T(0);
  }
  put_context(walk, 0, blocks, to);
}

/// What a network reads: the conditioning features, then the context.
template <class Walk, class T>
NVPFLOW_DEVICE void take_input(const Walk& walk, const Layer<T>& layer, T* to) {
  const int size = walk.program.context_size, count = layer.num_inputs, rows = walk.tile.rows;
  const int blocks = blocks_of(count + size);
  const std::int32_t* places = walk.program.places_at(layer.input_place);
  const Team team = walk.team();
  for (int e = team.index; e < (8 * blocks - size) * rows; e += team.size) {
    const int f = e / rows, r = e - f * rows;
    to[place(r, f < count ? f : f + size, blocks)] = f < count ? walk.tile.at(r, places[f]) : T(0);
  }
  put_context(walk, count, blocks, to);
}

/// Notes the rows whose context holds NaN or inf, which a network may lose.
template <class Walk>
NVPFLOW_DEVICE void note_context_poison(const Walk& walk) {
  each_context(walk, [&](int r, int i) {
    if (!is_finite(context_row(walk, r)[i])) walk.tile.poison[r] = 1;
  });
}

/// The numbers that a context is standardized with, by one block, in the arithmetic of the CPU's packing.
template <class T>
NVPFLOW_DEVICE void pack_context(const Program<T>& program, const T* parameters, T* packed) {
  const int size = program.context_size;
  for (int i = thread_index(); i < size; i += num_threads()) {
    const double log_std = static_cast<double>(parameters[program.context_log_std_offset + i]);
    packed[program.context_statistics + i] = parameters[program.context_mean_offset + i];
    packed[program.context_statistics + size + i] = static_cast<T>(exponential(-log_std));
  }
}

/// The tile's sums for the statistics, from the cotangent of the standardized context. Whoever wrote that must have met
/// the others of the block.
template <class Walk, class T>
NVPFLOW_DEVICE void sum_context_statistics(const Walk& walk, const ContextTape<T>& at, T* tape) {
  const int size = walk.program.context_size, blocks = blocks_of(size);
  const T* inverse_std = walk.packed + walk.program.context_statistics + size;
  T* sums = tape + at.sums();
  for (int i = thread_index(); i < size; i += num_threads()) {
    T mean = 0, log_std = 0;
    for (int r = 0; r < walk.tile.valid; ++r) {
      const T g = tape[at.cotangent() + place(r, i, blocks)];
      mean -= g * inverse_std[i];
      log_std -= g * tape[at.context + place(r, i, blocks)];
    }
    sums[i] = mean;
    sums[size + i] = log_std;
  }
}

/// The cotangent of the context as it came in, of the rows of the tile.
template <class Walk, class T>
NVPFLOW_DEVICE void store_context_cotangent(const Walk& walk, const T* cotangent, T* to) {
  const int size = walk.program.context_size, blocks = blocks_of(size);
  const std::int64_t statistics = walk.program.context_statistics;
  each_context(walk, [&](int r, int i) {
    if (r >= walk.tile.valid) return;
    T g = cotangent[place(r, i, blocks)];
    if (statistics >= 0) g *= walk.packed[statistics + size + i];
    to[(walk.tile.first() + r) * size + i] = walk.tile.clean(r, g);
  });
}

/// One block's part of the statistics' gradient: the sums of `tiles` tiles, the first at `sums`, added up in order.
template <class T>
NVPFLOW_DEVICE void context_gradient(const Program<T>& program, const T* sums, std::int64_t tape_elements,
                                     std::int64_t tiles, T* gradient) {
  const int size = program.context_size;
  for (int i = thread_index(); i < size; i += num_threads()) {
    T mean = 0, log_std = 0;
    for (std::int64_t t = 0; t < tiles; ++t) {
      mean += sums[t * tape_elements + i];
      log_std += sums[t * tape_elements + size + i];
    }
    gradient[program.context_mean_offset + i] = mean;
    gradient[program.context_log_std_offset + i] = log_std;
  }
}

}  // namespace nvpflow::cuda

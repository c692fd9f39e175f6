// KERNEL PART: LayerNorm of a hidden layer's values: each row to mean 0 and variance 1 (unbiased, plus 1e-5). A warp
// takes 16 rows at a time, four lanes a row: three passes over the values, in shared memory or the caches, and back
// two. Tiles of few rows leave warps idle.
#pragma once

#include "elementary.cuh"
#include "perceptron.cuh"
#include "tile.cuh"

namespace nvpflow::cuda {

/// visit(16 rows, lane) for each 16 rows of the tile that fall to the warp.
template <class Walk, class Visit>
NVPFLOW_DEVICE void each_row_block(const Walk& walk, Visit visit) {
  const int warps = num_threads() / kWarp;
  for (int rb = thread_index() / kWarp; rb < walk.tile.rows / 16; rb += warps) visit(rb);
}

/// visit(place, one, two) for the lane's four numbers of each 8 features of 16 rows: whether the two features are
/// there.
template <class Visit>
NVPFLOW_DEVICE void each_chunk(int row_block, int width, const Lane& lane, Visit visit) {
  const int blocks = blocks_of(width);
  for (int b = 0; b < blocks; ++b) {
    const int f = 8 * b + 2 * lane.t;
    visit((row_block * blocks + b) * kBlock + lane.chunk, f < width, f + 1 < width);
  }
}

/// The sums over the features of the lane's two rows, divided.
template <class T>
NVPFLOW_DEVICE void finish_sums(T (&sums)[2], int divisor) {
  NVPFLOW_UNROLL
  for (int low = 0; low < 2; ++low) sums[low] = sum_over_lanes(sums[low]) / static_cast<T>(divisor);
}

/// to = the values of `from`, arrays of the whole tile that may be one; factors: null, or where 1 / the standard
/// deviation of each row goes. Padding becomes zero. Whoever wrote `from` must have met the others of the block.
template <class Walk, class T>
NVPFLOW_DEVICE void normalize(const Walk& walk, const T* from, T* to, int width, T* factors) {
  const Lane& lane = walk.lane;
  each_row_block(walk, [&](int rb) {
    T mean[2] = {}, factor[2] = {};
    each_chunk(rb, width, lane, [&](int at, bool one, bool two) {
      const Vec4<T> v = load4(from + at);
      mean[0] += (one ? v.x : T(0)) + (two ? v.y : T(0));
      mean[1] += (one ? v.z : T(0)) + (two ? v.w : T(0));
    });
    finish_sums(mean, width);
    const auto centred = [&](int at, bool one, bool two) {
      const Vec4<T> v = load4(from + at);
      return Vec4<T>{one ? v.x - mean[0] : T(0), two ? v.y - mean[0] : T(0), one ? v.z - mean[1] : T(0),
                     two ? v.w - mean[1] : T(0)};
    };
    each_chunk(rb, width, lane, [&](int at, bool one, bool two) {
      const Vec4<T> v = centred(at, one, two);
      factor[0] = multiply_add(v.y, v.y, multiply_add(v.x, v.x, factor[0]));
      factor[1] = multiply_add(v.w, v.w, multiply_add(v.z, v.z, factor[1]));
    });
    finish_sums(factor, width - 1);
    NVPFLOW_UNROLL
    for (int low = 0; low < 2; ++low) {
      factor[low] = T(1) / square_root(factor[low] + T(1e-5));
      if (factors != nullptr && lane.t == 0) factors[16 * rb + lane.g + 8 * low] = factor[low];
    }
    each_chunk(rb, width, lane, [&](int at, bool one, bool two) {
      const Vec4<T> v = centred(at, one, two);
      store4(to + at, Vec4<T>{v.x * factor[0], v.y * factor[0], v.z * factor[1], v.w * factor[1]});
    });
  });
}

/// From the cotangents g of the results y to those of what the activation made, times its derivative, in place. before:
/// the activation's argument, or its value where that gives the derivative.
template <class Walk, class T>
NVPFLOW_DEVICE void normalize_backward(const Walk& walk, Act act, const T* y, const T* before, const T* factors, T* g,
                                       int width) {
  const Lane& lane = walk.lane;
  each_row_block(walk, [&](int rb) {
    T mean[2] = {}, along[2] = {};
    each_chunk(rb, width, lane, [&](int at, bool, bool) {  // padding is zero
      const Vec4<T> v = load4(g + at);
      mean[0] += v.x + v.y;
      mean[1] += v.z + v.w;
    });
    each_chunk(rb, width, lane, [&](int at, bool, bool) {
      const Vec4<T> v = load4(g + at), u = load4(y + at);
      along[0] = multiply_add(v.y, u.y, multiply_add(v.x, u.x, along[0]));
      along[1] = multiply_add(v.w, u.w, multiply_add(v.z, u.z, along[1]));
    });
    finish_sums(mean, width);
    finish_sums(along, width - 1);
    const T factor[2] = {factors[16 * rb + lane.g], factors[16 * rb + lane.g + 8]};
    each_chunk(rb, width, lane, [&](int at, bool one, bool two) {
      const Vec4<T> v = load4(g + at), u = load4(y + at), b = load4(before + at);
      const Vec4<T> back = {one ? multiply_add(-u.x, along[0], v.x - mean[0]) * factor[0] : T(0),
                            two ? multiply_add(-u.y, along[0], v.y - mean[0]) * factor[0] : T(0),
                            one ? multiply_add(-u.z, along[1], v.z - mean[1]) * factor[1] : T(0),
                            two ? multiply_add(-u.w, along[1], v.w - mean[1]) * factor[1] : T(0)};
      store4(g + at, derived(act, back, b, b));
    });
  });
}

}  // namespace nvpflow::cuda

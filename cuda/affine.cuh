// KERNEL PART: the affine transform of a coupling, y = x e^s + t with s = bound tanh(u_s / bound), from the sums of its
// heads, and its way back. `walk` is the walk of a tile (transform.cu, gradient.cu).
#pragma once

#include "elementary.cuh"
#include "tape.hpp"
#include "tile.cuh"

namespace nvpflow::cuda {

template <class T>
NVPFLOW_DEVICE T log_scale(const Layer<T>& layer, T u) {
  return hyperbolic_tangent(u * layer.inverse_bound) * layer.bound;
}

/// From the sums of the heads, outputs from 8 * first_block, to the transformed half; or only to the log-scale and
/// shift, where the call asks for those.
template <class Walk, class T, int N>
NVPFLOW_DEVICE void affine(Walk& walk, const Layer<T>& layer, int first_block, int valid, T (&sums)[N][4]) {
  constexpr int kBlocks = N / kRowBlocks;
  const auto& call = walk.call;
  const int half = 1 - layer.condition, count = walk.tile.count(half), blocks = blocks_of(count);
  NVPFLOW_UNROLL
  for (int nb = 0; nb < kBlocks; ++nb) {
    const int j = 4 * (first_block + nb) + walk.lane.t;
    if (nb >= valid || j >= count) continue;
    NVPFLOW_UNROLL
    for (int rb = 0; rb < kRowBlocks; ++rb) {
      NVPFLOW_UNROLL
      for (int low = 0; low < 2; ++low) {
        const int r = 16 * (walk.row_block + rb) + walk.lane.g + 8 * low;
        const T s = log_scale(layer, sums[rb * kBlocks + nb][2 * low]), t = sums[rb * kBlocks + nb][2 * low + 1];
        if (call.conditioner >= 0) {
          walk.tile.store_conditioner(call, r, j, count, s, t);
          continue;
        }
        T& value = walk.tile.state(half)[place(r, j, blocks)];
        T& log_det = walk.log_det[rb][low];
        value = call.inverse ? (value - t) * exponential(-s) : multiply_add(value, exponential(s), t);
        log_det = call.inverse ? log_det - s : log_det + s;
      }
    }
  }
}

/// The same, with what the way back needs.
template <class Walk, class T>
NVPFLOW_DEVICE void affine_taped(Walk& walk, const CouplingTape<T>& keep, T* part, int first_block, int valid,
                                 const Sums<T>& sums) {
  const bool inverse = walk.call.inverse;
  const int half = 1 - keep.layer.condition, count = walk.tile.count(half), blocks = blocks_of(count);
  NVPFLOW_UNROLL
  for (int nb = 0; nb < kOutBlocks; ++nb) {
    const int j = 4 * (first_block + nb) + walk.lane.t;
    if (nb >= valid || j >= count) continue;
    NVPFLOW_UNROLL
    for (int rb = 0; rb < kRowBlocks; ++rb) {
      NVPFLOW_UNROLL
      for (int low = 0; low < 2; ++low) {
        const int at = place(16 * (walk.row_block + rb) + walk.lane.g + 8 * low, j, blocks);
        const T s = log_scale(keep.layer, sums[rb * kOutBlocks + nb][2 * low]);
        const T t = sums[rb * kOutBlocks + nb][2 * low + 1];
        const T in = walk.tile.state(half)[at], scale = exponential(inverse ? -s : s);
        const T out = inverse ? (in - t) * scale : multiply_add(in, scale, t);
        walk.tile.state(half)[at] = out;
        part[keep.log_scale() + at] = s;
        part[keep.scale() + at] = scale;
        part[keep.product() + at] = inverse ? -out : in * scale;
        T& log_det = walk.log_det[rb][low];
        log_det = inverse ? log_det - s : log_det + s;
      }
    }
  }
}

/// From the cotangent of the layer's output to that of its input, in place, and to that of the heads' sums.
template <class Walk, class T>
NVPFLOW_DEVICE void affine_backward(Walk& walk, const CouplingTape<T>& keep, T* part) {
  const bool inverse = walk.call.inverse;
  const int half = 1 - keep.layer.condition, count = walk.tile.count(half), blocks = blocks_of(count);
  const auto head = walk.rows_of(part + keep.cotangent(keep.layer.num_dense - 1), 2 * count);
  for (int nb = walk.across; nb < blocks_of(2 * count); nb += walk.plan.warps_across) {
    const int j = 4 * nb + walk.lane.t;
    NVPFLOW_UNROLL
    for (int rb = 0; rb < kRowBlocks; ++rb) {
      T result[4] = {};
      NVPFLOW_UNROLL
      for (int low = 0; low < 2; ++low) {
        if (j >= count) continue;
        const int r = 16 * (walk.row_block + rb) + walk.lane.g + 8 * low, at = place(r, j, blocks);
        const T g = walk.cotangents.state(half)[at], g_log_det = walk.log_det_cotangent[r];
        const T scaled = g * part[keep.scale() + at];
        const T tanh_u = part[keep.log_scale() + at] * keep.layer.inverse_bound;
        const T g_s = multiply_add(g, part[keep.product() + at], inverse ? -g_log_det : g_log_det);
        walk.cotangents.state(half)[at] = scaled;
        result[2 * low] = g_s * multiply_add(-tanh_u, tanh_u, T(1));
        result[2 * low + 1] = inverse ? -scaled : g;
      }
      store4(head.at(rb * head.stride + nb * kBlock + walk.lane.chunk),
             Vec4<T>{result[0], result[1], result[2], result[3]});
    }
  }
}

}  // namespace nvpflow::cuda

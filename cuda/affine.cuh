// KERNEL PART: the affine transform of a coupling, y = x e^s + t, from the sums of its heads, and its way back. `walk`
// is the walk of a tile (transform.cu, gradient.cu).
#pragma once

#include "elementary.cuh"
#include "log_scale.cuh"
#include "tape.hpp"
#include "tile.cuh"

namespace nvpflow::cuda {

/// From the heads, outputs from 8 * first_block, to the transformed features; or only to the log-scale and shift, where
/// the call asks for those. scale: of TanhScale or GivenScale.
template <class Walk, class T, class LogScale, int N>
NVPFLOW_DEVICE void affine_by(Walk& walk, const Layer<T>& layer, LogScale scale, int first_block, int valid,
                              const T (&sums)[N][4]) {
  constexpr int kBlocks = N / kRowBlocks;
  const auto& call = walk.call;
  const bool inverse = is_backwards(walk, layer);
  const int count = layer.num_outputs;
  NVPFLOW_UNROLL
  for (int nb = 0; nb < kBlocks; ++nb) {
    const int j = 4 * (first_block + nb) + walk.lane.t;
    if (nb >= valid || j >= count) continue;
    const Column<T> column = walk.tile.template transformed<Walk::kGeneral>(walk.program, layer, j);
    T s[kRowBlocks][2];
    NVPFLOW_UNROLL
    for (int rb = 0; rb < kRowBlocks; ++rb) {
      NVPFLOW_UNROLL
      for (int low = 0; low < 2; ++low) s[rb][low] = scale.log_scale(sums[rb * kBlocks + nb][2 * low]);
    }
    if (call.conditioner >= 0) {
      const int column_of_call = Walk::kGeneral ? listed(walk.program.places_at(layer.output_order), j) : j;
      NVPFLOW_UNROLL
      for (int i = 0; i < 2 * kRowBlocks; ++i) {
        const int rb = i / 2, low = i % 2, r = 16 * (walk.row_block + rb) + walk.lane.g + 8 * low;
        walk.tile.store_conditioner(call, r, column_of_call, count, s[rb][low], sums[rb * kBlocks + nb][2 * low + 1]);
      }
      continue;
    }
    T* own = &column.at(16 * walk.row_block + walk.lane.g);  // the lane's other rows lie beside it
    NVPFLOW_UNROLL
    for (int rb = 0; rb < kRowBlocks; ++rb) {
      NVPFLOW_UNROLL
      for (int low = 0; low < 2; ++low) {
        T& value = own[rb * column.blocks * kBlock + 2 * low];
        const T t = sums[rb * kBlocks + nb][2 * low + 1], power = inverse ? -s[rb][low] : s[rb][low];
        const T by = exponential(power);
        value = inverse ? (value - t) * by : multiply_add(value, by, t);
        walk.log_det[rb][low] += power;
      }
    }
  }
}

template <class Walk, class T, int N>
NVPFLOW_DEVICE void affine(Walk& walk, const Layer<T>& layer, int first_block, int valid, T (&sums)[N][4]) {
  if (!Walk::kGeneral || layer.scale.function == ScaleFunction::tanh) {
    affine_by(walk, layer, TanhScale<T>{layer.scale}, first_block, valid, sums);
  } else {
    log_scales(layer.scale, sums, [](int, int, T) {});
    affine_by(walk, layer, GivenScale<T>{}, first_block, valid, sums);
  }
}

/// The same, with what the way back needs. keep: CouplingTape or NetworksTape.
template <class Walk, class Tape, class T, class LogScale>
NVPFLOW_DEVICE void affine_taped_by(Walk& walk, const Tape& keep, T* part, LogScale scale_of, int first_block,
                                    int valid, const Sums<T>& sums) {
  const bool inverse = is_backwards(walk, keep.layer);
  const int count = keep.layer.num_outputs, blocks = blocks_of(count);
  NVPFLOW_UNROLL
  for (int nb = 0; nb < kOutBlocks; ++nb) {
    const int j = 4 * (first_block + nb) + walk.lane.t;
    if (nb >= valid || j >= count) continue;
    const Column<T> column = walk.tile.template transformed<Walk::kGeneral>(walk.program, keep.layer, j);
    NVPFLOW_UNROLL
    for (int rb = 0; rb < kRowBlocks; ++rb) {
      NVPFLOW_UNROLL
      for (int low = 0; low < 2; ++low) {
        const int r = 16 * (walk.row_block + rb) + walk.lane.g + 8 * low, at = place(r, j, blocks);
        const T s = scale_of.log_scale(sums[rb * kOutBlocks + nb][2 * low]);
        const T t = sums[rb * kOutBlocks + nb][2 * low + 1];
        T& value = column.at(r);
        const T in = value, scale = exponential(inverse ? -s : s);
        const T out = inverse ? (in - t) * scale : multiply_add(in, scale, t);
        value = out;
        if constexpr (LogScale::kHasSlope) part[keep.slope() + at] = scale_of.slope(s);
        part[keep.scale() + at] = scale;
        part[keep.product() + at] = inverse ? -out : in * scale;
        T& log_det = walk.log_det[rb][low];
        log_det = inverse ? log_det - s : log_det + s;
      }
    }
  }
}

template <class Walk, class Tape, class T>
NVPFLOW_DEVICE void affine_taped(Walk& walk, const Tape& keep, T* part, int first_block, int valid, Sums<T>& sums) {
  const Scale<T>& scale = keep.layer.scale;
  if (scale.function == ScaleFunction::tanh) {
    affine_taped_by(walk, keep, part, TanhScale<T>{scale}, first_block, valid, sums);
    return;
  }
  const int count = keep.layer.num_outputs, blocks = blocks_of(count);
  log_scales(scale, sums, [&](int n, int low, T slope) {
    const int rb = n / kOutBlocks, nb = n % kOutBlocks, j = 4 * (first_block + nb) + walk.lane.t;
    if (nb >= valid || j >= count) return;
    part[keep.slope() + place(16 * (walk.row_block + rb) + walk.lane.g + 8 * low, j, blocks)] = slope;
  });
  affine_taped_by(walk, keep, part, GivenScale<T>{}, first_block, valid, sums);
}

/// From the cotangent of the layer's output to that of its input, in place, and to that of the heads' sums.
template <class Walk, class Tape, class T>
NVPFLOW_DEVICE void affine_backward(Walk& walk, const Tape& keep, T* part) {
  const bool inverse = is_backwards(walk, keep.layer);
  const bool additive = keep.layer.scale.function == ScaleFunction::none;
  const int count = keep.layer.num_outputs, blocks = blocks_of(count);
  const auto head = walk.rows_of(part + keep.cotangent(keep.layer.num_dense - 1), 2 * count);
  for (int nb = walk.across; nb < blocks_of(2 * count); nb += walk.plan.warps_across) {
    const int j = 4 * nb + walk.lane.t;
    const Column<T> column =
        walk.cotangents.template transformed<Walk::kGeneral>(walk.program, keep.layer, j < count ? j : 0);
    NVPFLOW_UNROLL
    for (int rb = 0; rb < kRowBlocks; ++rb) {
      T result[4] = {};
      NVPFLOW_UNROLL
      for (int low = 0; low < 2; ++low) {
        if (j >= count) continue;
        const int r = 16 * (walk.row_block + rb) + walk.lane.g + 8 * low, at = place(r, j, blocks);
        T& cotangent = column.at(r);
        const T g = cotangent, g_log_det = walk.log_det_cotangent[r];
        const T scaled = g * part[keep.scale() + at];
        const T g_s = multiply_add(g, part[keep.product() + at], inverse ? -g_log_det : g_log_det);
        cotangent = scaled;
        result[2 * low] = additive ? T(0) : g_s * part[keep.slope() + at];
        result[2 * low + 1] = inverse ? -scaled : g;
      }
      store4(head.at(rb * head.stride + nb * kBlock + walk.lane.chunk),
             Vec4<T>{result[0], result[1], result[2], result[3]});
    }
  }
}

}  // namespace nvpflow::cuda

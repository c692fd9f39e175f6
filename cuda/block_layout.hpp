// Where packed weights and activations lie. No CUDA: packing, plans and tests include it.
//
// Weights [in, out] lie in blocks of 16 inputs x 8 outputs, 128 elements, blocks of one group of 8 outputs one after
// the other. A block is what one warp reads with one 16-byte access per lane: lane 4 g + t takes inputs 2t, 2t + 1,
// 8 + 2t, 9 + 2t of output g, the fragment of the m16n8k8 and m16n8k16 matrix instructions when inputs are numbered so.
// The 16-byte chunks of a block are permuted by swizzle() so that also lanes that share t hit different banks.
#pragma once

#include <cstdint>

#include "../cpp/src/host_device.hpp"

namespace nvpflow::cuda {

inline constexpr std::int64_t kBlockElements = 128;

NVPFLOW_HOST_DEVICE constexpr std::int64_t ceil_div(std::int64_t n, std::int64_t unit) { return (n + unit - 1) / unit; }
NVPFLOW_HOST_DEVICE constexpr std::int64_t round_up(std::int64_t n, std::int64_t unit) {
  return ceil_div(n, unit) * unit;
}

/// Chunk of (g, t), g in [0, 8), t in [0, 4).
NVPFLOW_HOST_DEVICE constexpr std::int64_t swizzle(std::int64_t g, std::int64_t t) { return 4 * g + (t ^ (g >> 1)); }

/// Place of the weight from input i to output o of a layer with `in` inputs.
NVPFLOW_HOST_DEVICE constexpr std::int64_t weight_index(std::int64_t i, std::int64_t o, std::int64_t in) {
  const std::int64_t block = o / 8 * ceil_div(in, 16) + i / 16;
  return kBlockElements * block + 4 * swizzle(o % 8, i % 8 / 2) + i % 16 / 8 * 2 + i % 2;
}
/// Elements of packed weights; places that belong to no weight are zero.
NVPFLOW_HOST_DEVICE constexpr std::int64_t weight_size(std::int64_t in, std::int64_t out) {
  return kBlockElements * ceil_div(out, 8) * ceil_div(in, 16);
}
/// Elements of a packed bias, in the order of the outputs; zero where padded.
NVPFLOW_HOST_DEVICE constexpr std::int64_t bias_size(std::int64_t out) { return round_up(out, 8); }

/// Place of the feature f of row r in an array of activations that is `features` wide (tape, workspace, shared memory):
/// blocks of 16 rows x 8 features, swizzled alike.
NVPFLOW_HOST_DEVICE constexpr std::int64_t activation_index(std::int64_t r, std::int64_t f, std::int64_t features) {
  const std::int64_t block = r / 16 * ceil_div(features, 8) + f / 8;
  return kBlockElements * block + 4 * swizzle(r % 8, f % 8 / 2) + r % 16 / 8 * 2 + f % 2;
}

}  // namespace nvpflow::cuda

// What plans and kernels both know: what a warp takes at a time, and what a tile needs. No CUDA, so that the host's
// compiler builds the plans.
#pragma once

#include "kernels.hpp"

namespace nvpflow::cuda {

// ---- what a warp and a block take at a time ------------------------------------------------------------------------

inline constexpr int kWarp = 32;
inline constexpr int kRowBlocks = 2;  // of 16 rows
inline constexpr int kOutBlocks = 4;  // of 8 outputs
/// Blocks of 8 outputs of the widest head that stays in registers.
template <class T>
inline constexpr int kHeadBlocks = sizeof(T) == 4 ? 4 : 2;
inline constexpr int kWarpRows = 16 * kRowBlocks;
inline constexpr int kBlock = static_cast<int>(kBlockElements);
inline constexpr int kGradientThreads = 256;
/// Inputs, outputs, threads and rows at a time of a block that forms the gradient of parameters.
inline constexpr int kTaskIn = 64, kTaskOut = 64, kTaskThreads = 128, kTaskRows = 32;
/// Elements of one of its two stages: inputs and cotangents of kTaskRows rows.
inline constexpr int kTaskStage = 2 * 2 * 8 * kBlock;
/// Values that one block adds up.
inline constexpr int kSumValues = 4096;

/// The buffer of hidden activations that keeps h, or what the first of two networks says.
inline constexpr int kKept = 2;

/// Threads of a block at most: the registers of a multiprocessor over what a thread needs.
template <class T, Multiply M, Storage S>
constexpr int kMaxThreads = M != Multiply::fma && S == Storage::resident ? 384 : 256;

/// Whether kernels of that reach are made for weights that stay in shared memory. Flows of Reach::all stream them: that
/// is one set of kernels less, and what it costs small ones is for a card to say.
constexpr bool is_resident(Reach reach) { return reach != Reach::all; }

// ---- what a tile needs ---------------------------------------------------------------------------------------------

template <class T>
NVPFLOW_HOST_DEVICE std::int64_t state_elements(const Program<T>& program, std::int64_t rows) {
  return rows * (round_up(program.split, 8) + round_up(program.input_size - program.split, 8));
}
NVPFLOW_HOST_DEVICE inline std::int64_t hidden_elements(const TransformPlan& plan) {
  return plan.tile_rows * (plan.hidden_buffers * round_up(plan.hidden_width, 8) + round_up(plan.numbers_width, 8));
}
/// Shared memory of one tile: state and hidden activations (where they lie there), sums of the warps across, poison.
template <class T>
NVPFLOW_HOST_DEVICE std::int64_t tile_bytes(const Program<T>& program, const TransformPlan& plan) {
  std::int64_t elements = plan.warps_across > 1 ? 2 * plan.warps_across * plan.tile_rows : 0;
  if (plan.state_shared) elements += state_elements(program, plan.tile_rows);
  if (plan.hidden_shared) elements += hidden_elements(plan);
  return elements * static_cast<std::int64_t>(sizeof(T)) + plan.tile_rows * static_cast<std::int64_t>(sizeof(int));
}
/// Global memory of one block's tile.
template <class T>
NVPFLOW_HOST_DEVICE std::int64_t workspace_elements(const Program<T>& program, const TransformPlan& plan) {
  return (plan.state_shared ? 0 : state_elements(program, plan.tile_rows)) +
         (plan.hidden_shared ? 0 : hidden_elements(plan));
}
/// Shared memory of a gradient's tile beside the stages: sums of the warps across, cotangents of the log-determinant,
/// poison.
template <class T>
std::int64_t row_bytes(const GradientPlan& plan) {
  const std::int64_t elements = (plan.warps_across > 1 ? 2 * plan.warps_across : 0) * plan.tile_rows + plan.tile_rows;
  return elements * static_cast<std::int64_t>(sizeof(T)) + plan.tile_rows * static_cast<std::int64_t>(sizeof(int));
}

/// Elements of one part of a gradient: the flat gradient, then the products of linear layers.
template <class T>
NVPFLOW_HOST_DEVICE std::int64_t partial_size(const Program<T>& program) {
  return program.num_parameters + program.products;
}

/// Whether a coupling's last hidden layer and its heads are formed together, without storing what is between them.
template <class T>
NVPFLOW_HOST_DEVICE bool is_joined(const Program<T>& program, const Layer<T>& layer, bool resident) {
  const int last = layer.num_dense - 1;
  return resident && last > 0 && program.dense[layer.first_dense + last].out <= 8 * kHeadBlocks<T>;
}

// ---- the kernels that plans are for --------------------------------------------------------------------------------

Status prepare_transform(const Device& device);
Status prepare_gradient(const Device& device);

}  // namespace nvpflow::cuda

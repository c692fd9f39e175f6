// The choice of storage, rows and warps for one flow on one device: how much of it fits where.

#include "plan.hpp"

#include <algorithm>
#include <bit>
#include <cstdint>
#include <span>

#include "kernels.hpp"
#include "tape.hpp"

namespace nvpflow::cuda {
namespace {

Multiply choose_multiply(bool float64, const Device& device, Precision precision, bool force_fma) {
  if (float64 || force_fma || device.compute_capability < 80) return Multiply::fma;
  if (precision == Precision::tf32) return Multiply::tf32;
  if (precision == Precision::bfloat16) return Multiply::bf16;
  return Multiply::tf32x3;
}

// ---- inference -----------------------------------------------------------------------------------------------------

/// size_hidden for Reach::all.
template <class T>
void size_all_hidden(const Program<T>& program, TransformPlan& plan) {
  const auto take = [&](std::int64_t width, std::int32_t buffers) {
    plan.hidden_width = std::max(plan.hidden_width, width);
    plan.hidden_buffers = std::max(plan.hidden_buffers, buffers);
  };
  for (int k = 0; k < program.num_layers; ++k) {
    const Layer<T>& layer = program.layers[k];
    if (facts_of(layer.kind).has_matrices) take(program.input_size, 1);  // a copy of the state
    if (facts_of(layer.kind).has_splines) {
      plan.numbers_width = std::max<std::int64_t>(plan.numbers_width, program.dense[numbers_dense(layer)].out);
    }
    for (int j = 0; j < network_size(layer); ++j) {
      const Dense& d = program.dense[layer.first_dense + j];
      if (!d.first || layer.condition == kGathered) take(d.in, d.from + 1);
      if (d.to >= 0) take(d.out, d.to + 1);
      if (d.keeps) take(d.out, kKept + 1);
    }
  }
}

/// Widest hidden activations that have to be stored, and in how many buffers.
template <class T>
void size_hidden(const Program<T>& program, bool resident, TransformPlan& plan) {
  plan.hidden_width = plan.numbers_width = 0;
  plan.hidden_buffers = 0;
  if (program.reach == Reach::all) return size_all_hidden(program, plan);
  for (int k = 0; k < program.num_layers; ++k) {
    const Layer<T>& layer = program.layers[k];
    if (!facts_of(layer.kind).has_networks) continue;
    int stored = layer.num_dense - (is_joined(program, layer, resident) ? 2 : 1);
    for (int j = 0; j < stored; ++j) {
      plan.hidden_width = std::max<std::int64_t>(plan.hidden_width, program.dense[layer.first_dense + j].out);
    }
    if (layer.condition == kGathered) {  // the network's input comes first
      plan.hidden_width = std::max<std::int64_t>(plan.hidden_width, layer.num_inputs);
      ++stored;
    }
    plan.hidden_buffers = std::max(plan.hidden_buffers, std::min(stored, 2));
  }
}

/// All weights in shared memory, as many warps as then fit; false where they would be too few.
template <class T>
bool plan_resident(const Program<T>& program, const Device& device, std::int64_t rows, bool forced,
                   TransformPlan& plan) {
  plan.storage = Storage::resident;
  plan.warps_across = 1;
  plan.tile_rows = kWarpRows;
  plan.stage_inputs = 0;
  size_hidden(program, true, plan);
  const std::int64_t weights = program.packed_size * static_cast<std::int64_t>(sizeof(T));
  const std::int64_t tile = tile_bytes<T>(program, plan);
  const int threads = plan.multiply == Multiply::fma ? kMaxThreads<T, Multiply::fma, Storage::resident>
                                                     : kMaxThreads<T, Multiply::tf32x3, Storage::resident>;
  const std::int64_t most = std::min<std::int64_t>((device.shared_bytes_per_block - weights) / tile, threads / kWarp);
  constexpr std::int64_t kFewest = 4;  // one for each scheduler; its eight sums a lane hide some latency
  if (most < (forced ? 1 : kFewest)) return false;
  const std::int64_t tiles = std::max<std::int64_t>(1, ceil_div(rows, kWarpRows));
  plan.warps = static_cast<int>(std::clamp<std::int64_t>(ceil_div(tiles, device.multiprocessors), 1, most));
  plan.blocks = device.multiprocessors;
  plan.shared_bytes = weights + plan.warps * tile;
  return true;
}

/// Bytes of both stages.
template <class T>
std::int64_t stage_bytes(const TransformPlan& plan) {
  return 2 * std::int64_t{plan.warps_across} * 8 * kOutBlocks * plan.stage_inputs *
         static_cast<std::int64_t>(sizeof(T));
}

/// The largest tile whose activations fit beside the stages.
template <class T>
bool plan_streamed(const Program<T>& program, const Device& device, std::int64_t rows, Storage storage,
                   TransformPlan& plan) {
  constexpr int kWarps = 8;
  plan.storage = storage;
  size_hidden(program, false, plan);
  const bool workspace = storage == Storage::workspace;
  struct Place {
    bool state, hidden;
  };
  constexpr Place kShared[] = {{true, true}}, kElsewhere[] = {{false, true}, {true, false}, {false, false}};
  for (const Place& at : workspace ? std::span<const Place>(kElsewhere) : std::span<const Place>(kShared)) {
    plan.state_shared = at.state;
    plan.hidden_shared = at.hidden;
    for (const int rows_warps : {4, 2, 1}) {  // warps along the rows
      plan.tile_rows = rows_warps * kWarpRows;
      plan.warps_across = kWarps / rows_warps;
      plan.stage_inputs = 32;
      plan.shared_bytes = stage_bytes<T>(plan) + tile_bytes<T>(program, plan);
      if (plan.shared_bytes > device.shared_bytes_per_block) continue;
      // Fewer rows a block keep more multiprocessors busy where the call is short; the warps across stay.
      const std::int64_t wanted = std::max<std::int64_t>(1, ceil_div(rows, kWarpRows * device.multiprocessors));
      const int along =
          static_cast<int>(std::min<std::int64_t>(rows_warps, std::bit_ceil(static_cast<std::uint64_t>(wanted))));
      plan.tile_rows = along * kWarpRows;
      plan.warps = along * plan.warps_across;
      plan.shared_bytes = stage_bytes<T>(plan) + tile_bytes<T>(program, plan);
      plan.blocks = device.multiprocessors;
      plan.workspace_bytes = plan.blocks * workspace_elements(program, plan) * static_cast<std::int64_t>(sizeof(T));
      return true;
    }
  }
  return false;
}

}  // namespace

template <class T>
TransformPlan plan_transform(const Program<T>& program, const Device& device, std::int64_t rows,
                             const TransformOptions<T>& options) {
  TransformPlan plan;
  plan.multiply = choose_multiply(sizeof(T) == 8, device, options.precision, options.force_fma);
  const auto wanted = [&](Storage storage) {
    return options.force_storage < 0 || options.force_storage == static_cast<int>(storage);
  };
  const bool forced = options.force_storage >= 0;
  if (is_resident(program.reach) && wanted(Storage::resident) && plan_resident(program, device, rows, forced, plan))
    return plan;
  if (wanted(Storage::streamed) && plan_streamed(program, device, rows, Storage::streamed, plan)) return plan;
  plan_streamed(program, device, rows, Storage::workspace, plan);
  return plan;
}

// ---- gradients -----------------------------------------------------------------------------------------------------

template <class T>
GradientPlan plan_gradient(const Program<T>& program, const Device& device, std::int64_t rows,
                           const GradientOptions<T>& options) {
  constexpr auto kSize = static_cast<std::int64_t>(sizeof(T));
  GradientPlan plan;
  plan.multiply = choose_multiply(sizeof(T) == 8, device, options.precision, options.force_fma);
  std::int64_t widest = 1;
  for (int i = 0; i < program.num_dense; ++i) widest = std::max<std::int64_t>(widest, program.dense[i].out);
  constexpr int kWarps = kGradientThreads / kWarp;
  const int preferred = widest <= 128 ? 1 : widest <= 256 ? 2 : widest <= 512 ? 4 : 8;
  // Fewer rows a block keep more multiprocessors busy where the call is short.
  const std::int64_t wanted = std::max<std::int64_t>(1, rows / (kWarpRows * device.multiprocessors));
  auto along = static_cast<int>(std::min<std::int64_t>(kWarps, std::bit_floor(static_cast<std::uint64_t>(wanted))));
  plan.stage_inputs = sizeof(T) == 4 ? 32 : 16;
  plan.blocks = device.multiprocessors;
  plan.weight_shared_bytes = 2 * kTaskStage * kSize;
  std::int64_t tiles = 1;
  for (;; along /= 2) {
    for (plan.warps_across = preferred; plan.warps_across > 0; plan.warps_across /= 2) {
      plan.warps = std::min(kWarps / plan.warps_across, along) * plan.warps_across;
      plan.tile_rows = plan.warps / plan.warps_across * kWarpRows;
      plan.shared_bytes =
          2 * std::int64_t{plan.warps_across} * 8 * kOutBlocks * plan.stage_inputs * kSize + row_bytes<T>(plan);
      if (plan.shared_bytes <= device.shared_bytes_per_block) break;
    }
    plan.tape_elements = tape_elements(program, plan.tile_rows);
    tiles = std::max<std::int64_t>(1, ceil_div(rows, plan.tile_rows));
    plan.chunk_tiles = std::clamp<std::int64_t>(device.workspace_bytes / (plan.tape_elements * kSize), 1, tiles);
    if (along == 1 || plan.chunk_tiles >= std::min<std::int64_t>(plan.blocks, tiles)) break;
  }
  // Whole rounds of the blocks, so that none waits for the last tiles of a chunk.
  if (plan.chunk_tiles < tiles && plan.chunk_tiles > plan.blocks) plan.chunk_tiles -= plan.chunk_tiles % plan.blocks;
  if (options.force_chunk_tiles > 0) plan.chunk_tiles = std::min(tiles, options.force_chunk_tiles);
  plan.num_tasks = gradient_tasks<T>(program, plan, nullptr);
  // Two blocks of tasks for each multiprocessor, as far as there are tiles to share out.
  plan.splits = static_cast<int>(std::clamp<std::int64_t>(ceil_div(2 * device.multiprocessors, plan.num_tasks), 1,
                                                          std::min<std::int64_t>(plan.chunk_tiles, 64)));
  const auto aligned = [](std::int64_t bytes) { return round_up(bytes, 256); };
  plan.partials_at = aligned(plan.chunk_tiles * plan.tape_elements * kSize);
  plan.products_at = plan.partials_at + aligned(plan.splits * partial_size(program) * kSize);
  plan.log_prob_at = plan.products_at + aligned(program.products * kSize);
  plan.sums_at = plan.log_prob_at + aligned(plan.chunk_tiles * plan.tile_rows * kSize);
  plan.workspace_bytes = plan.sums_at + aligned(sum_workspace_bytes(plan.chunk_tiles * plan.tile_rows));
  return plan;
}

std::int64_t sum_workspace_bytes(std::int64_t count) {
  return static_cast<std::int64_t>(sizeof(double)) *
         std::max<std::int64_t>(2, round_up(ceil_div(count, kSumValues), 2));
}

Status prepare_kernels(const Device& device) {
  if (const Status s = prepare_transform(device)) return s;
  return prepare_gradient(device);
}

#define NVPFLOW_INSTANTIATE(T)                                                                                       \
  template TransformPlan plan_transform(const Program<T>&, const Device&, std::int64_t, const TransformOptions<T>&); \
  template GradientPlan plan_gradient(const Program<T>&, const Device&, std::int64_t, const GradientOptions<T>&);
NVPFLOW_INSTANTIATE(float)
NVPFLOW_INSTANTIATE(double)
#undef NVPFLOW_INSTANTIATE

}  // namespace nvpflow::cuda

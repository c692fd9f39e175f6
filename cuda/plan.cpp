// The choice of storage, rows and warps for one flow on one device: how much of it fits where.

#include "plan.hpp"

#include <algorithm>
#include <bit>
#include <cstdint>
#include <span>

#include "kernels.cuh"
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

// ---- networks of Reach::all ----------------------------------------------------------------------------------------

bool makes_h(const Dense& d) {
  return d.role == Role::initial || d.role == Role::gate || (d.role == Role::outer && d.keeps);
}

/// The buffers that the dense layers of a layer's networks read and write.
void place_buffers(std::span<Dense> networks) {
  const bool two =
      std::any_of(networks.begin(), networks.end(), [](const Dense& d) { return d.role == Role::scale_head; });
  for (std::size_t j = 0; j < networks.size(); ++j) {
    Dense& d = networks[j];
    const bool gated = j + 1 < networks.size() && networks[j + 1].role == Role::gate;
    const bool enters = d.activation != Act::none;  // the next block, or layer
    if (!d.first) d.from = networks[j - 1].to;
    switch (d.role) {
      case Role::hidden:
        d.to = d.first ? 1 : 1 - d.from;
        break;
      case Role::head:
        d.adds = two;
        if (!d.first && makes_h(networks[j - 1])) d.from = kKept;
        break;
      case Role::scale_head:
        d.keeps = true;
        break;
      case Role::numbers:
        if (!d.first && makes_h(networks[j - 1])) d.from = kKept;
        break;
      case Role::initial:
        d.keeps = true;
        d.to = enters ? 1 : -1;
        break;
      case Role::inner:
        d.to = 0;
        break;
      case Role::outer:
        d.adds = d.keeps = !gated;
        d.to = gated || enters ? 1 : -1;
        break;
      case Role::gate:
        d.from = 0;
        d.adds = d.keeps = true;
        d.to = enters ? 1 : -1;
        break;
    }
  }
}

/// Hands out arrays of a layer's part of the tape, in elements a row.
struct TapeRoom {
  std::int64_t used = 0;

  std::int32_t take(std::int64_t elements) {
    const std::int64_t at = used;
    used += elements;
    return static_cast<std::int32_t>(at);
  }
  std::int32_t array(std::int64_t width) { return take(round_up(width, 8)); }
};

/// What the layer in front of dense layer j leaves for it.
std::int32_t input_of(const std::span<Dense> networks, std::size_t j) {
  const Dense& before = networks[j - 1];
  const bool last = networks[j].role == Role::head || networks[j].role == Role::numbers;
  return last && makes_h(before) ? before.tape.h : before.tape.value;
}

/// The arrays of a perceptron's dense layer.
void place_hidden(Dense& d, TapeRoom& room) {
  const bool argument = keeps_argument(d.activation);
  d.tape.value = room.array(d.out);
  if (argument || d.layer_norm) d.tape.argument = room.array(d.out);
  if (d.layer_norm) d.tape.factors = room.take(1);
  d.tape.cotangent = room.array(d.out);
}

/// The arrays of a layer that makes h, or a part of it. initial: the network's first.
void place_block(std::span<Dense> networks, std::size_t j, const Dense& initial, TapeRoom& room) {
  Dense& d = networks[j];
  d.tape.cotangent = room.array(d.out);
  if (d.activation != Act::none || !makes_h(d)) d.tape.value = room.array(d.out);
  if (!makes_h(d)) return;
  const bool gated = std::any_of(networks.begin(), networks.end(), [](const Dense& g) { return g.role == Role::gate; });
  if (d.role == Role::initial) {
    d.tape.h = room.array(d.out);
  } else {
    const std::size_t entry = j - (d.role == Role::gate ? 3 : 2);
    const Dense& before = networks[entry];
    d.tape.from_h = before.tape.h;
    // What a block starts from is kept where its activation needs its argument, or its map its input.
    const bool needed = before.map >= 0 || keeps_argument(before.activation);
    d.tape.h = needed ? room.array(d.out) : before.tape.h;
  }
  d.tape.h_cotangent = gated ? initial.tape.cotangent : d.tape.cotangent;
  if (d.map >= 0) d.tape.sums = room.take(ceil_div(2 * bias_size(d.out), kWarpRows));
  if (d.role != Role::gate) return;
  d.tape.gate = room.array(d.out);
  d.tape.scratch = networks[j - 1].tape.value;
}

/// Where the dense layers of a layer's networks find their numbers on the tape. room: what the layer has of it so far;
/// heads: where the heads lie.
void place_tape(TapeRoom& room, std::int32_t heads, std::span<Dense> networks) {
  std::int32_t network_input = -1;
  for (std::size_t j = 0; j < networks.size(); ++j) {
    Dense& d = networks[j];
    if (d.first && network_input < 0) network_input = room.array(d.in);
    d.tape.input = d.first ? network_input : d.role == Role::gate ? -1 : input_of(networks, j);
    switch (d.role) {
      case Role::hidden:
      case Role::inner:
        place_hidden(d, room);
        break;
      case Role::head:
        d.tape.cotangent = heads;
        if (d.adds) d.tape.from_h = heads;
        break;
      case Role::scale_head:
        d.tape.cotangent = d.tape.h = heads;
        break;
      case Role::numbers:
        d.tape.cotangent = d.tape.value = heads;
        break;
      default:
        place_block(networks, j, networks.front(), room);
    }
  }
  for (std::size_t j = 0; j < networks.size(); ++j) {
    if (networks[j].role != Role::inner) continue;
    // The gates' values are not read any more where the inner layer is reached; without any, the cotangent that comes.
    const Dense& end = networks[j + 1].keeps ? networks[j - 1] : networks[j + 2];
    networks[j].tape.scratch = networks[j + 1].keeps ? end.tape.h_cotangent : end.tape.gate;
  }
}

/// What NetworksTape says of the arrays ahead of the networks'; where the heads lie.
template <class T>
std::int32_t place_heads(const Program<T>& program, const Layer<T>& layer, TapeRoom& room) {
  const bool splines = facts_of(layer.kind).has_splines;
  for (int i = 0; i < (splines ? 2 : 3); ++i) room.array(layer.num_outputs);
  const std::int32_t heads = room.array(splines ? program.dense[numbers_dense(layer)].out : 2 * layer.num_outputs);
  if (splines && layer.spline.squashed) room.take(2 * std::int64_t{layer.spline.num_bins} * layer.num_outputs);
  return heads;
}

// ---- gradients -----------------------------------------------------------------------------------------------------

/// Visits the blocks of inputs and outputs of one dense layer.
template <class T, class Visit>
void each_block(const Program<T>& program, GradientTask task, Visit visit) {
  const Dense& d = program.dense[task.dense];
  for (task.first_in = 0; task.first_in == 0 || task.first_in < d.in; task.first_in += kTaskIn) {  // 0: of the bias
    for (task.first_out = 0; task.first_out < d.out; task.first_out += kTaskOut) visit(task);
  }
}

/// Visits the tasks of the networks of layer k, of Reach::all, whose part of the tape begins at `at`.
template <class T, class Visit>
void each_network_task(const Program<T>& program, const GradientPlan& plan, int k, std::int64_t at, Visit visit) {
  const Layer<T>& layer = program.layers[k];
  const NetworksTape<T> tape(program, layer, plan.tile_rows);
  for (int j = 0; j < layer.num_dense; ++j) {
    const int dense = layer.first_dense + j;
    const Dense& d = program.dense[dense];
    const std::int64_t input =
        d.role == Role::gate ? ContextTape<T>(program, plan.tile_rows).context : at + tape.at(d.tape.input);
    each_block(program, {Task::product, k, dense, 0, 0, input, at + tape.cotangent(j)}, visit);
    if (d.map >= 0) visit({Task::map, k, dense, 0, 0, at + tape.at(d.tape.sums), 0});
  }
}

/// Visits the tasks of layer k, whose part of the tape begins at `at`, in order.
template <Reach reach, class T, class Visit>
void each_task(Of<Kind::coupling>, const Program<T>& program, const GradientPlan& plan, int k, std::int64_t at,
               Visit visit) {
  if constexpr (reach == Reach::all) {
    each_network_task(program, plan, k, at, visit);
  } else {
    const CouplingTape<T> tape(program, program.layers[k], plan.tile_rows);
    for (int j = 0; j < program.layers[k].num_dense; ++j) {
      const int dense = program.layers[k].first_dense + j;
      each_block(program, {Task::product, k, dense, 0, 0, at + tape.input(j), at + tape.cotangent(j)}, visit);
    }
  }
}

template <Reach reach, class T, class Visit>
void each_task(Of<Kind::spline>, const Program<T>& program, const GradientPlan& plan, int k, std::int64_t at,
               Visit visit) {
  const Layer<T>& layer = program.layers[k];
  if (layer.num_dense > 0) return each_network_task(program, plan, k, at, visit);
  const NetworksTape<T> tape(program, layer, plan.tile_rows);  // the constants' gradient is that of a bias
  each_block(program, {Task::product, k, layer.first_dense, 0, 0, 0, at + tape.numbers()}, visit);
}

template <Reach reach, class T, class Visit>
void each_task(Of<Kind::diagonal>, const Program<T>& program, const GradientPlan& plan, int k, std::int64_t at,
               Visit visit) {
  visit({Task::sums, k, 0, 0, 0, at + DiagonalTape<T>(program, program.layers[k], plan.tile_rows).sums(), 0});
}

template <Reach reach, class T, class Visit>
void each_task(Of<Kind::linear>, const Program<T>& program, const GradientPlan& plan, int k, std::int64_t at,
               Visit visit) {
  const LinearTape<T> tape(program, program.layers[k], plan.tile_rows);
  each_block(program, {Task::product, k, program.layers[k].first_dense, 0, 0, at + tape.x(), at + tape.cotangent()},
             visit);
  visit({Task::sums, k, 0, 0, 0, at + tape.sum(), 0});
}

template <Reach reach, class T, class Visit>
void each_task(const Program<T>& program, const GradientPlan& plan, Visit visit_task) {
  for (int k = 0; k < program.num_layers; ++k) {
    const std::int64_t at = layer_tape<reach>(program, k, plan.tile_rows);
    visit(program.layers[k], [&](auto kind) { each_task<reach>(kind, program, plan, k, at, visit_task); });
  }
  const std::int64_t components = program.base.kind == BaseKind::mixture ? program.base.components : 1;
  for (std::int64_t m = 0; program.base_numbers >= 0 && m < components; ++m) {
    const std::int64_t at = BaseTape<T>(program, plan.tile_rows).begin;
    visit_task({Task::base, static_cast<std::int32_t>(m), 0, 0, 0, at, 0});
  }
  if (program.context_statistics < 0) return;
  visit_task({Task::context, 0, 0, 0, 0, ContextTape<T>(program, plan.tile_rows).sums(), 0});
}

/// A reach as a type.
template <Reach reach>
struct Known {
  static constexpr Reach value = reach;
};

/// f(Known<>()) of the gradient's kernels for a program.
template <class T, class F>
void with_reach(const Program<T>& program, F&& f) {
  if (program.reach == Reach::all) {
    f(Known<Reach::all>());
  } else {
    f(Known<Reach::general>());
  }
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

template <class T>
std::int32_t gradient_tasks(const Program<T>& program, const GradientPlan& plan, GradientTask* tasks) {
  std::int32_t count = 0;
  with_reach(program, [&](auto reach) {
    each_task<reach.value>(program, plan, [&](const GradientTask& task) {
      if (tasks != nullptr) tasks[count] = task;
      ++count;
    });
  });
  return count;
}

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
    with_reach(program, [&](auto reach) {
      plan.tape_elements = layer_tape<reach.value>(program, program.num_layers, plan.tile_rows);
    });
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

template <class T>
void place_networks(const Program<T>& program, Layer<T>* layers, Dense* dense) {
  for (int k = 0; k < program.num_layers; ++k) {
    if (!facts_of(layers[k].kind).has_networks) continue;
    TapeRoom room;
    const std::int32_t heads = place_heads(program, layers[k], room);
    const std::span<Dense> networks(dense + layers[k].first_dense, static_cast<std::size_t>(layers[k].num_dense));
    place_buffers(networks);
    place_tape(room, heads, networks);
    layers[k].tape_width = round_up(room.used, 8);
  }
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
  template void place_networks(const Program<T>&, Layer<T>*, Dense*);                                                \
  template std::int32_t gradient_tasks(const Program<T>&, const GradientPlan&, GradientTask*);                       \
  template GradientPlan plan_gradient(const Program<T>&, const Device&, std::int64_t, const GradientOptions<T>&);
NVPFLOW_INSTANTIATE(float)
NVPFLOW_INSTANTIATE(double)
#undef NVPFLOW_INSTANTIATE

}  // namespace nvpflow::cuda

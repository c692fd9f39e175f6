// KERNEL: the layers of a flow on a tile of rows, in either direction, with their log-determinant, density and noise.
//
// A tile goes from the first layer to the last in shared memory and registers: one launch a call, no [B, H] array. A
// row costs 2 sum(in * out) FLOPs of the dense layers and reads and writes 4 D bytes of device memory. Bound: the
// multiply-adds of the path (dense.cuh) as long as the weights come from shared memory.
//
// resident    All weights lie in shared memory, loaded once per block; a block stays and takes tile after tile. Each
// warp
//             takes 32 rows through the flow by itself, without barriers of the block. The last hidden layer never
//             leaves the registers where the head is narrow enough: 32 of its outputs at a time are multiplied into the
//             head's sums.
// streamed    Weights pass through two stages of shared memory, copied from the L2 cache while the stage before is
// used:
//             a tile of R rows reads all weights once, 4 sum(in * out) / R bytes a row. All warps of a block
//             share the stages; `warps_across` warps share rows and split the outputs.
// workspace   As streamed, with activations that are too wide for shared memory in a workspace of the block's own,
// which
//             stays in the L1 and L2 caches.
//
// A row's bits depend only on the row, the parameters and the plan's path: sums over inputs run in one order, those
// over features (log-determinant, |z|^2) lane by lane in the order of the features, then over the four lanes, then over
// the warps across.

#include <algorithm>
#include <bit>
#include <span>

#include "dense.cuh"
#include "plan.hpp"
#include "tile.cuh"

namespace nvpflow::cuda {
namespace {

/// Threads of a block at most: the registers of a multiprocessor over what a thread needs.
template <class T, Multiply M, Storage S>
constexpr int kMaxThreads = M != Multiply::fma && S == Storage::resident ? 384 : 256;

template <class T>
NVPFLOW_DEVICE void copy_to_shared(T* to, const T* from, std::int64_t count) {
  constexpr int kCopy = 16 / static_cast<int>(sizeof(T));
  for (std::int64_t i = thread_index(); i < count / kCopy; i += num_threads()) {
    copy16_async(to + i * kCopy, from + i * kCopy);
  }
  copies_commit();
}

/// One team of threads (a warp, or a block) and the tile it works on.
template <class T, Multiply M, Storage S>
struct Walker {
  static constexpr bool kResident = S == Storage::resident;
  using Rows = MemoryRows<T, S != Storage::workspace>;

  const TransformPlan& plan;
  const Program<T>& program;
  const TransformCall<T>& call;
  Tile<T> tile;
  const T* packed;  // where biases and affine numbers are read: shared memory or global
  Lane lane;
  int across, row_block;  // which of the warps across; first block of 16 rows of the warp
  T log_det[kRowBlocks][2];

  NVPFLOW_DEVICE Walker(const TransformPlan& p, const Program<T>& f, const TransformCall<T>& c)
      : plan(p), program(f), call(c), tile(f.input_size), packed(f.packed), lane(thread_index() % kWarp) {
    const int warp = thread_index() / kWarp;
    across = kResident ? 0 : warp % p.warps_across;
    row_block = kResident ? 0 : warp / p.warps_across * kRowBlocks;
  }

  NVPFLOW_DEVICE int num_across() const { return kResident ? 1 : plan.warps_across; }
  NVPFLOW_DEVICE Team team() const {
    return kResident ? Team{lane.g * 4 + lane.t, kWarp} : Team{thread_index(), num_threads()};
  }
  NVPFLOW_DEVICE void barrier() const {
    if constexpr (kResident) {
      warp_barrier();
    } else {
      block_barrier();
    }
  }
  /// The warp's rows of an array of activations `features` wide.
  NVPFLOW_DEVICE Rows rows_of(T* base, int features) const {
    const int stride = blocks_of(features) * kBlock;
    return Rows(base + row_block * stride, stride);
  }

  /// From the sums of the head, outputs from 8 * first_block, to the transformed half.
  template <int NB>
  NVPFLOW_DEVICE void transform_features(const Layer<T>& layer, int first_block, int valid,
                                         T (&sums)[kRowBlocks * NB][4]) {
    const int half = 1 - layer.condition, count = tile.count(half), blocks = blocks_of(count);
    NVPFLOW_UNROLL
    for (int nb = 0; nb < NB; ++nb) {
      const int j = 4 * (first_block + nb) + lane.t;
      if (nb >= valid || j >= count) continue;
      NVPFLOW_UNROLL
      for (int rb = 0; rb < kRowBlocks; ++rb) {
        NVPFLOW_UNROLL
        for (int low = 0; low < 2; ++low) {
          const int r = 16 * (row_block + rb) + lane.g + 8 * low;
          const T s = log_scale(layer, sums[rb * NB + nb][2 * low]), t = sums[rb * NB + nb][2 * low + 1];
          if (call.conditioner >= 0) {
            tile.store_conditioner(call, r, j, count, s, t);
            continue;
          }
          T& value = tile.state(half)[place(r, j, blocks)];
          value = call.inverse ? (value - t) * exponential(-s) : multiply_add(value, exponential(s), t);
          log_det[rb][low] = call.inverse ? log_det[rb][low] - s : log_det[rb][low] + s;
        }
      }
    }
  }

  // ---- weights in shared memory ------------------------------------------------------------------------------------

  /// The last hidden layer and the head at once, 32 hidden outputs at a time.
  NVPFLOW_DEVICE void hidden_and_head(const Layer<T>& layer, const Rows& rows) {
    const Dense& hidden = program.dense[layer.first_dense + layer.num_dense - 2];
    const Dense& head = program.dense[layer.first_dense + layer.num_dense - 1];
    const int in_blocks = (hidden.in + 15) / 16, outs = blocks_of(hidden.out);
    const int head_blocks = (head.in + 15) / 16, head_outs = blocks_of(head.out);
    Sums<T, kHeadBlocks<T>> result;
    start_sums<T, kHeadBlocks<T>>(packed + head.bias, 0, head_outs, lane, result);
    for (int first = 0; first < outs; first += kOutBlocks) {
      const int valid = outs - first < kOutBlocks ? outs - first : kOutBlocks;
      Sums<T> sums;
      start_sums<T, kOutBlocks>(packed + hidden.bias, first, valid, lane, sums);
      multiply_blocks<M, T, kOutBlocks>(rows, hidden.in, 0, in_blocks,
                                        packed + hidden.weights + first * in_blocks * kBlock, in_blocks * kBlock, valid,
                                        lane, sums);
      activate_sums(layer.activation, sums);
      const RegisterRows<T> chunk{sums};
      NVPFLOW_UNROLL
      for (int pair = 0; pair < kOutBlocks / 2; ++pair) {
        if (2 * pair >= valid) continue;
        multiply16<M, T, kHeadBlocks<T>>(chunk, 2 * pair, 2 * pair + 1 < valid,
                                         packed + head.weights + (first / 2 + pair) * kBlock, head_blocks * kBlock,
                                         head_outs, lane, result);
      }
    }
    transform_features<kHeadBlocks<T>>(layer, 0, head_outs, result);
  }

  template <class Finish>
  NVPFLOW_DEVICE void dense_resident(const Dense& d, const Rows& rows, Finish finish) {
    const int in_blocks = (d.in + 15) / 16, outs = blocks_of(d.out);
    for (int first = 0; first < outs; first += kOutBlocks) {
      const int valid = outs - first < kOutBlocks ? outs - first : kOutBlocks;
      Sums<T> sums;
      start_sums<T, kOutBlocks>(packed + d.bias, first, valid, lane, sums);
      multiply_blocks<M, T, kOutBlocks>(rows, d.in, 0, in_blocks, packed + d.weights + first * in_blocks * kBlock,
                                        in_blocks * kBlock, valid, lane, sums);
      finish(first, valid, sums);
    }
  }

  // ---- layers ------------------------------------------------------------------------------------------------------

  /// run(dense layer, rows of its input, finish) forms one dense layer.
  template <class Run>
  NVPFLOW_DEVICE void coupling(const Layer<T>& layer, Run run) {
    const int last = layer.num_dense - 1;
    const bool joined = kResident && last > 0 && program.dense[layer.first_dense + last].out <= 8 * kHeadBlocks<T>;
    Rows rows = rows_of(tile.state(layer.condition), tile.count(layer.condition));
    for (int j = 0; j < (joined ? last - 1 : last); ++j) {
      const Dense& d = program.dense[layer.first_dense + j];
      const Rows to = rows_of(tile.hidden(j % 2), d.out);
      run(d, rows, [&](int first, int valid, Sums<T>& sums) {
        activate_sums(layer.activation, sums);
        store_sums(sums, first, valid, lane, to);
      });
      if constexpr (kResident) barrier();
      rows = to;
    }
    if (kResident && joined) {
      if constexpr (kResident) hidden_and_head(layer, rows);
    } else {
      run(program.dense[layer.first_dense + last], rows,
          [&](int first, int valid, Sums<T>& sums) { transform_features<kOutBlocks>(layer, first, valid, sums); });
    }
    if constexpr (kResident) barrier();
  }

  NVPFLOW_DEVICE void standardize(const Layer<T>& layer) {
    const int features = program.input_size;
    const T* mean = packed + layer.affine;
    const T* factor = mean + (call.inverse ? features : 2 * features);
    barrier();
    tile.for_each(team(), [&](int, int f, T& value) {
      value = call.inverse ? multiply_add(value, factor[f], mean[f]) : (value - mean[f]) * factor[f];
    });
    barrier();
    if (lane.t != 0 || across != 0) return;
    const T total = mean[3 * features];
    NVPFLOW_UNROLL
    for (int rb = 0; rb < kRowBlocks; ++rb) {
      NVPFLOW_UNROLL
      for (int low = 0; low < 2; ++low) log_det[rb][low] += call.inverse ? -total : total;
    }
  }

  template <class Run>
  NVPFLOW_DEVICE void layers(Run run) {
    NVPFLOW_UNROLL
    for (int rb = 0; rb < kRowBlocks; ++rb) log_det[rb][0] = log_det[rb][1] = T(0);
    const bool one = call.conditioner >= 0;
    const int first = one ? call.conditioner : 0, last = one ? call.conditioner + 1 : program.num_layers;
    for (int k = first; k < last; ++k) {
      const Layer<T>& layer = program.layers[call.inverse && !one ? program.num_layers - 1 - k : k];
      if (layer.kind == Kind::coupling) {
        coupling(layer, run);
      } else {
        standardize(layer);
      }
    }
  }

  template <class Run>
  NVPFLOW_DEVICE void walk(std::int64_t index, Run run) {
    tile.begin(index, call.rows);
    barrier();  // no thread reads the last tile any more
    tile.clear(team());
    barrier();
    if (call.in == nullptr) {
      tile.fill_noise(team(), call.seed, call.first_row);
    } else {
      tile.load(team(), call.in, call.index);
    }
    barrier();
    layers(run);
    barrier();
    if (call.out != nullptr) tile.store(team(), call.out, infinity<T>());
    write_row_sums(tile, call, team(), lane, row_block, across, num_across(), log_det, [&] { barrier(); });
  }
};

template <class T, Multiply M>
NVPFLOW_KERNEL((kMaxThreads<T, M, Storage::resident>))
transform_resident(NVPFLOW_ARGUMENT TransformPlan plan, NVPFLOW_ARGUMENT Program<T> program,
                   NVPFLOW_ARGUMENT TransformCall<T> call) {
  if constexpr (M != Multiply::fma && !kHasMatrixUnits) return;
  T* weights = reinterpret_cast<T*>(shared_memory());
  copy_to_shared(weights, program.packed, program.packed_size);
  Walker<T, M, Storage::resident> walker(plan, program, call);
  const int warp = thread_index() / kWarp, warps = num_threads() / kWarp;
  walker.packed = weights;
  walker.tile.carve(
      reinterpret_cast<unsigned char*>(weights + program.packed_size) + warp * tile_bytes<T>(program.input_size, plan),
      nullptr, plan);
  copies_wait<0>();
  block_barrier();
  const std::int64_t tiles = ceil_div(call.rows, kWarpRows);
  for (std::int64_t i = static_cast<std::int64_t>(block_index()) * warps + warp; i < tiles;
       i += static_cast<std::int64_t>(num_blocks()) * warps) {
    walker.walk(i, [&](const Dense& d, const auto& rows, auto finish) { walker.dense_resident(d, rows, finish); });
  }
}

template <class T, Multiply M, Storage S>
NVPFLOW_KERNEL((kMaxThreads<T, M, S>))
transform_streamed(NVPFLOW_ARGUMENT TransformPlan plan, NVPFLOW_ARGUMENT Program<T> program,
                   NVPFLOW_ARGUMENT TransformCall<T> call, T* workspace) {
  if constexpr (M != Multiply::fma && !kHasMatrixUnits) return;
  const std::int64_t tiles = ceil_div(call.rows, plan.tile_rows);
  const std::int64_t mine = block_index() < tiles ? ceil_div(tiles - block_index(), num_blocks()) : 0;
  T* stages = reinterpret_cast<T*>(shared_memory());
  const bool one = call.conditioner >= 0;
  const int across_blocks = plan.warps_across * kOutBlocks;
  WeightStream<T, false> stream(Passes<T, false>(program, call.inverse && !one, one ? call.conditioner : 0,
                                                 one ? call.conditioner + 1 : program.num_layers, false),
                                stages, across_blocks, plan.stage_inputs, mine);
  Walker<T, M, S> walker(plan, program, call);
  walker.tile.carve(
      reinterpret_cast<unsigned char*>(stages + 2 * stream.stage_size()),
      S == Storage::workspace ? workspace + block_index() * workspace_elements(program.input_size, plan) : nullptr,
      plan);
  for (std::int64_t i = block_index(); i < tiles; i += num_blocks()) {
    walker.walk(i, [&](const Dense& d, const auto& rows, auto finish) {
      dense_streamed<M>(stream, d.in, d.out, program.packed + d.bias, rows, walker.across, plan.warps_across,
                        walker.lane, finish);
    });
  }
}

// ---- plans ---------------------------------------------------------------------------------------------------------

/// Widest hidden activations that have to be stored, and in how many buffers.
template <class T>
void size_hidden(const Program<T>& program, bool resident, TransformPlan& plan) {
  plan.hidden_width = 0;
  plan.hidden_buffers = 0;
  for (int k = 0; k < program.num_layers; ++k) {
    const Layer<T>& layer = program.layers[k];
    if (layer.kind != Kind::coupling) continue;
    const int last = layer.num_dense - 1;
    const bool joined = resident && last > 0 && program.dense[layer.first_dense + last].out <= 8 * kHeadBlocks<T>;
    const int stored = joined ? last - 1 : last;
    plan.hidden_buffers = std::max(plan.hidden_buffers, std::min(stored, 2));
    for (int j = 0; j < stored; ++j) {
      plan.hidden_width = std::max<std::int64_t>(plan.hidden_width, program.dense[layer.first_dense + j].out);
    }
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
  const std::int64_t tile = tile_bytes<T>(program.input_size, plan);
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
      plan.shared_bytes = stage_bytes<T>(plan) + tile_bytes<T>(program.input_size, plan);
      if (plan.shared_bytes > device.shared_bytes_per_block) continue;
      // Fewer rows a block keep more multiprocessors busy where the call is short; the warps across stay.
      const std::int64_t wanted = std::max<std::int64_t>(1, ceil_div(rows, kWarpRows * device.multiprocessors));
      const int along =
          static_cast<int>(std::min<std::int64_t>(rows_warps, std::bit_ceil(static_cast<std::uint64_t>(wanted))));
      plan.tile_rows = along * kWarpRows;
      plan.warps = along * plan.warps_across;
      plan.shared_bytes = stage_bytes<T>(plan) + tile_bytes<T>(program.input_size, plan);
      plan.blocks = device.multiprocessors;
      plan.workspace_bytes =
          plan.blocks * workspace_elements(program.input_size, plan) * static_cast<std::int64_t>(sizeof(T));
      return true;
    }
  }
  return false;
}

}  // namespace

Multiply choose_multiply(bool float64, const Device& device, Precision precision, bool force_fma) {
  if (float64 || force_fma || device.compute_capability < 80) return Multiply::fma;
  if (precision == Precision::tf32) return Multiply::tf32;
  if (precision == Precision::bfloat16) return Multiply::bf16;
  return Multiply::tf32x3;
}

template <class T>
TransformPlan plan_transform(const Program<T>& program, const Device& device, std::int64_t rows,
                             const TransformOptions<T>& options) {
  TransformPlan plan;
  plan.multiply = choose_multiply(sizeof(T) == 8, device, options.precision, options.force_fma);
  const auto wanted = [&](Storage storage) {
    return options.force_storage < 0 || options.force_storage == static_cast<int>(storage);
  };
  const bool forced = options.force_storage >= 0;
  if (wanted(Storage::resident) && plan_resident(program, device, rows, forced, plan)) return plan;
  if (wanted(Storage::streamed) && plan_streamed(program, device, rows, Storage::streamed, plan)) return plan;
  plan_streamed(program, device, rows, Storage::workspace, plan);
  return plan;
}

// ---- launches ------------------------------------------------------------------------------------------------------

namespace {

template <class T, Multiply M>
Status launch_transform_with(const TransformPlan& plan, const Program<T>& program, const TransformCall<T>& call,
                             void* workspace, Stream stream) {
  const std::int64_t rows_of_block = plan.storage == Storage::resident ? plan.warps * kWarpRows : plan.tile_rows;
  const std::int64_t blocks = std::min<std::int64_t>(plan.blocks, ceil_div(call.rows, rows_of_block));
  const int threads = plan.warps * kWarp;
  T* memory = static_cast<T*>(workspace);
  switch (plan.storage) {
    case Storage::resident:
      return launch(transform_resident<T, M>, blocks, threads, plan.shared_bytes, stream, plan, program, call);
    case Storage::streamed:
      return launch(transform_streamed<T, M, Storage::streamed>, blocks, threads, plan.shared_bytes, stream, plan,
                    program, call, memory);
    default:
      return launch(transform_streamed<T, M, Storage::workspace>, blocks, threads, plan.shared_bytes, stream, plan,
                    program, call, memory);
  }
}

template <class T, Multiply M>
Status prepare_transform_with(std::int64_t bytes) {
  if (const Status s = allow_shared(transform_resident<T, M>, bytes)) return s;
  if (const Status s = allow_shared(transform_streamed<T, M, Storage::streamed>, bytes)) return s;
  return allow_shared(transform_streamed<T, M, Storage::workspace>, bytes);
}

}  // namespace

template <class T>
Status launch_transform(const TransformPlan& plan, const Program<T>& program, const TransformCall<T>& call,
                        void* workspace, Stream stream) {
  if constexpr (sizeof(T) == 4) {
    switch (plan.multiply) {
      case Multiply::tf32x3:
        return launch_transform_with<T, Multiply::tf32x3>(plan, program, call, workspace, stream);
      case Multiply::tf32:
        return launch_transform_with<T, Multiply::tf32>(plan, program, call, workspace, stream);
      case Multiply::bf16:
        return launch_transform_with<T, Multiply::bf16>(plan, program, call, workspace, stream);
      default:
        break;
    }
  }
  return launch_transform_with<T, Multiply::fma>(plan, program, call, workspace, stream);
}

Status prepare_kernels(const Device& device) {
  if (const Status s = prepare_transform(device)) return s;
  return prepare_gradient(device);
}

Status prepare_transform(const Device& device) {
  const std::int64_t bytes = device.shared_bytes_per_block;
  if (const Status s = prepare_transform_with<float, Multiply::fma>(bytes)) return s;
  if (const Status s = prepare_transform_with<float, Multiply::tf32x3>(bytes)) return s;
  if (const Status s = prepare_transform_with<float, Multiply::tf32>(bytes)) return s;
  if (const Status s = prepare_transform_with<float, Multiply::bf16>(bytes)) return s;
  return prepare_transform_with<double, Multiply::fma>(bytes);
}

template TransformPlan plan_transform(const Program<float>&, const Device&, std::int64_t,
                                      const TransformOptions<float>&);
template TransformPlan plan_transform(const Program<double>&, const Device&, std::int64_t,
                                      const TransformOptions<double>&);
template Status launch_transform(const TransformPlan&, const Program<float>&, const TransformCall<float>&, void*,
                                 Stream);
template Status launch_transform(const TransformPlan&, const Program<double>&, const TransformCall<double>&, void*,
                                 Stream);

}  // namespace nvpflow::cuda

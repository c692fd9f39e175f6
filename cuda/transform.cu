// KERNEL: the layers of a flow on a tile of rows, in either direction, with their log-determinant, density and noise.
//
// A tile goes from the first layer to the last in shared memory and registers: one launch a call, no [B, H] array. A
// row costs 2 sum(in * out) FLOPs of the dense layers and reads and writes 4 D bytes of device memory. Bound: the
// multiply-adds of the path (dense.cuh) as long as the weights come from shared memory.
//
// clang-format off
// resident    All weights lie in shared memory, loaded once per block; a block stays and takes tile after tile. Each
//             warp takes 32 rows through the flow by itself, without barriers of the block. The last hidden layer never
//             leaves the registers where the head is narrow enough: 32 of its outputs at a time are multiplied into the
//             head's sums.
// streamed    Weights pass through two stages of shared memory, copied from the L2 cache while the stage before is
//             used: a tile of R rows reads all weights once, 4 sum(in * out) / R bytes a row. All warps of a block
//             share the stages; `warps_across` warps share rows and split the outputs.
// workspace   As streamed, with activations that are too wide for shared memory in a workspace of the block's own,
//             which stays in the L1 and L2 caches.
// clang-format on
//
// A row's bits depend on the row, the parameters and the plan's path only: sums over inputs run in one order, those
// over features (log-determinant, |z|^2) lane by lane in the order of the features, then over the four lanes, then over
// the warps across.

#include <algorithm>

#include "affine.cuh"
#include "dense.cuh"
#include "diagonal.cuh"
#include "linear.cuh"
#include "networks.cuh"
#include "perceptron.cuh"
#include "plan.hpp"
#include "spline.cuh"
#include "tile.cuh"

namespace nvpflow::cuda {
namespace {

template <class T>
NVPFLOW_DEVICE void copy_to_shared(T* to, const T* from, std::int64_t count) {
  constexpr int kCopy = 16 / static_cast<int>(sizeof(T));
  for (std::int64_t i = thread_index(); i < count / kCopy; i += num_threads()) {
    copy16_async(to + i * kCopy, from + i * kCopy);
  }
  copies_commit();
}

/// One team of threads (a warp, or a block) and the tile it works on. reach: Program::reach.
template <class T, Multiply M, Storage S, Reach reach>
struct Walker {
  static constexpr bool kResident = S == Storage::resident, kGeneral = reach != Reach::plain;
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
      : plan(p), program(f), call(c), tile(f), packed(f.packed), lane(thread_index() % kWarp) {
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

  NVPFLOW_DEVICE const std::int32_t* places_in() const {
    if constexpr (!kGeneral) return nullptr;
    return call.conditioner < 0 ? program.places_in(call.inverse)
                                : program.places_at(program.layers[call.conditioner].place);
  }

  NVPFLOW_DEVICE const std::int32_t* places_out() const {
    return kGeneral ? program.places_out(call.inverse) : nullptr;
  }

  NVPFLOW_DEVICE auto affine_of(const Layer<T>& layer) {
    return [this, &layer](int first, int valid, auto& sums) { affine(*this, layer, first, valid, sums); };
  }

  /// In Reach::all a layer's networks run ahead of what its kind does, in one place for all kinds, so that a kernel
  /// holds one copy of their products. That ends a coupling: its affine map is applied to their sums.
  template <class Run>
  NVPFLOW_DEVICE void networks_of(const Layer<T>& layer, Run run) {
    if constexpr (reach == Reach::all) networks<M>(*this, layer, run, affine_of(layer));
  }

  template <class Run>
  NVPFLOW_DEVICE void layer_of(Of<Kind::coupling>, const Layer<T>& layer, Run run) {
    if constexpr (reach != Reach::all) network<M>(*this, layer, run, affine_of(layer));
  }
  template <class Run>
  NVPFLOW_DEVICE void layer_of(Of<Kind::spline>, const Layer<T>& layer, Run) {
    if constexpr (reach == Reach::all) splines(*this, layer);
  }
  template <class Run>
  NVPFLOW_DEVICE void layer_of(Of<Kind::diagonal>, const Layer<T>& layer, Run) {
    barrier();
    diagonal(*this, layer);
  }
  template <class Run>
  NVPFLOW_DEVICE void layer_of(Of<Kind::linear>, const Layer<T>& layer, Run run) {
    if constexpr (reach == Reach::all) {
      barrier();
      linear<M>(*this, layer, tile.hidden(0), run, [](int, int, const Sums<T>&) {});
    }
  }

  /// Zero; of a call that wants log p of the data that come out the cost of the latents, of which the sum over the
  /// layers makes -log p: no register has to keep it meanwhile.
  NVPFLOW_DEVICE void begin_log_det() {
    NVPFLOW_UNROLL
    for (int rb = 0; rb < kRowBlocks; ++rb) log_det[rb][0] = log_det[rb][1] = T(0);
    if (!call.inverse || call.log_prob == nullptr) return;
    with_base<reach>(program, [&](auto base) {
      sum_latents(base, program.base, tile, lane, row_block, across, num_across(), places_in(), log_det);
      NVPFLOW_UNROLL
      for (int rb = 0; rb < kRowBlocks; ++rb) {
        log_det[rb][0] = latent_cost(base, log_det[rb][0]);
        log_det[rb][1] = latent_cost(base, log_det[rb][1]);
      }
    });
    barrier();  // a layer without hidden units writes to the latents at once
  }

  /// run: of network().
  template <class Run>
  NVPFLOW_DEVICE void layers(Run run) {
    const bool one = call.conditioner >= 0;
    const int first = one ? call.conditioner : 0, last = one ? call.conditioner + 1 : program.num_layers;
    for (int k = first; k < last; ++k) {
      const Layer<T>& layer = program.layers[call.inverse && !one ? program.num_layers - 1 - k : k];
      networks_of(layer, run);
      visit(layer, [&](auto kind) { layer_of(kind, layer, run); });
    }
  }

  template <class Run>
  NVPFLOW_DEVICE void walk(std::int32_t index, Run run) {
    tile.begin(index, call.rows);
    barrier();  // no thread reads the last tile any more
    tile.clear(team());
    barrier();
    if (call.in == nullptr) {
      with_base<reach>(program, [&](auto base) {
        tile.fill_noise(base, program.base, team(), call.seed, call.first_row, places_in());
      });
    } else {
      tile.load(team(), call.in, call.index, places_in());
    }
    if constexpr (reach == Reach::all) note_context_poison(*this);
    barrier();
    begin_log_det();
    layers(run);
    barrier();
    if (call.out != nullptr) tile.store(team(), call.out, places_out(), infinity<T>());
    with_base<reach>(program, [&](auto base) {
      write_row_sums(base, program.base, tile, call, team(), lane, row_block, across, num_across(), places_out(),
                     log_det, [&] { barrier(); });
    });
  }
};

template <class T, Multiply M, Reach reach>
NVPFLOW_KERNEL((kMaxThreads<T, M, Storage::resident>))
transform_resident(NVPFLOW_ARGUMENT TransformPlan plan, NVPFLOW_ARGUMENT Program<T> program,
                   NVPFLOW_ARGUMENT TransformCall<T> call) {
  if constexpr (M != Multiply::fma && !kHasMatrixUnits) return;
  T* weights = reinterpret_cast<T*>(shared_memory());
  copy_to_shared(weights, program.packed, program.packed_size);
  Walker<T, M, Storage::resident, reach> walker(plan, program, call);
  const int warp = thread_index() / kWarp, warps = num_threads() / kWarp;
  walker.packed = weights;
  walker.tile.carve(
      reinterpret_cast<unsigned char*>(weights + program.packed_size) + warp * tile_bytes<T>(program, plan), nullptr,
      program, plan);
  walker.tile.rows = kWarpRows;  // as the plan says, and a constant
  copies_wait<0>();
  block_barrier();
  const auto tiles = static_cast<std::int32_t>(ceil_div(call.rows, kWarpRows));
  for (std::int32_t i = block_index() * warps + warp; i < tiles; i += num_blocks() * warps) {
    walker.walk(i, [&](By<M>, const Dense& d, const auto& rows, auto finish) {
      dense_resident<M>(d, weights, rows, walker.lane, finish);
    });
  }
}

template <class T, Multiply M, Storage S, Reach reach>
NVPFLOW_KERNEL((kMaxThreads<T, M, S>))
transform_streamed(NVPFLOW_ARGUMENT TransformPlan plan, NVPFLOW_ARGUMENT Program<T> program,
                   NVPFLOW_ARGUMENT TransformCall<T> call, T* workspace) {
  if constexpr (M != Multiply::fma && !kHasMatrixUnits) return;
  const std::int64_t tiles = ceil_div(call.rows, plan.tile_rows);
  const std::int64_t mine = block_index() < tiles ? ceil_div(tiles - block_index(), num_blocks()) : 0;
  T* stages = reinterpret_cast<T*>(shared_memory());
  const bool one = call.conditioner >= 0;
  const int across_blocks = plan.warps_across * kOutBlocks;
  const Passes<T, false, reach> passes(program, call.inverse && !one, one ? call.conditioner : 0,
                                       one ? call.conditioner + 1 : program.num_layers);
  WeightStream<T, false, reach> stream(passes, stages, across_blocks, plan.stage_inputs, mine);
  Walker<T, M, S, reach> walker(plan, program, call);
  walker.tile.carve(reinterpret_cast<unsigned char*>(stages + 2 * stream.stage_size()),
                    S == Storage::workspace ? workspace + block_index() * workspace_elements(program, plan) : nullptr,
                    program, plan);
  for (std::int32_t i = block_index(); i < tiles; i += num_blocks()) {
    walker.walk(i, [&]<Multiply N>(By<N>, const Dense& d, const auto& rows, auto finish) {
      dense_streamed<N>(stream, d.in, d.out, program.packed + d.bias, rows, walker.across, plan.warps_across,
                        walker.lane, finish);
    });
  }
}

// ---- launches ------------------------------------------------------------------------------------------------------

template <class T, Multiply M, Reach reach>
Status launch_kernel(const TransformPlan& plan, const Program<T>& program, const TransformCall<T>& call,
                     void* workspace, Stream stream) {
  const std::int64_t rows_of_block = plan.storage == Storage::resident ? plan.warps * kWarpRows : plan.tile_rows;
  const std::int64_t blocks = std::min<std::int64_t>(plan.blocks, ceil_div(call.rows, rows_of_block));
  const int threads = plan.warps * kWarp;
  T* memory = static_cast<T*>(workspace);
  if constexpr (is_resident(reach)) {
    if (plan.storage == Storage::resident) {
      return launch(transform_resident<T, M, reach>, blocks, threads, plan.shared_bytes, stream, plan, program, call);
    }
  }
  if (plan.storage == Storage::streamed) {
    return launch(transform_streamed<T, M, Storage::streamed, reach>, blocks, threads, plan.shared_bytes, stream, plan,
                  program, call, memory);
  }
  return launch(transform_streamed<T, M, Storage::workspace, reach>, blocks, threads, plan.shared_bytes, stream, plan,
                program, call, memory);
}

template <class T, Multiply M>
Status launch_transform_with(const TransformPlan& plan, const Program<T>& program, const TransformCall<T>& call,
                             void* workspace, Stream stream) {
  switch (program.reach) {
    case Reach::plain:
      return launch_kernel<T, M, Reach::plain>(plan, program, call, workspace, stream);
    case Reach::general:
      return launch_kernel<T, M, Reach::general>(plan, program, call, workspace, stream);
    default:
      return launch_kernel<T, M, Reach::all>(plan, program, call, workspace, stream);
  }
}

template <class T, Multiply M, Reach reach>
Status allow_shared_of(std::int64_t bytes) {
  if constexpr (is_resident(reach)) {
    if (const Status s = allow_shared(transform_resident<T, M, reach>, bytes)) return s;
  }
  if (const Status s = allow_shared(transform_streamed<T, M, Storage::streamed, reach>, bytes)) return s;
  return allow_shared(transform_streamed<T, M, Storage::workspace, reach>, bytes);
}

template <class T, Multiply M>
Status prepare_transform_with(std::int64_t bytes) {
  if (const Status s = allow_shared_of<T, M, Reach::plain>(bytes)) return s;
  if (const Status s = allow_shared_of<T, M, Reach::general>(bytes)) return s;
  return allow_shared_of<T, M, Reach::all>(bytes);
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

Status prepare_transform(const Device& device) {
  const std::int64_t bytes = device.shared_bytes_per_block;
  if (const Status s = prepare_transform_with<float, Multiply::fma>(bytes)) return s;
  if (const Status s = prepare_transform_with<float, Multiply::tf32x3>(bytes)) return s;
  if (const Status s = prepare_transform_with<float, Multiply::tf32>(bytes)) return s;
  if (const Status s = prepare_transform_with<float, Multiply::bf16>(bytes)) return s;
  return prepare_transform_with<double, Multiply::fma>(bytes);
}

template Status launch_transform(const TransformPlan&, const Program<float>&, const TransformCall<float>&, void*,
                                 Stream);
template Status launch_transform(const TransformPlan&, const Program<double>&, const TransformCall<double>&, void*,
                                 Stream);

}  // namespace nvpflow::cuda

// The list of CUDA kernels, what they are called with and the plans that they run by. Launch functions allocate
// nothing, never synchronise and pass everything on `stream`, so that callers can capture them in a CUDA graph. This
// header needs no CUDA: backend, packing and tests include it.
#pragma once

#include <array>
#include <cstdint>

#include <nvpflow/precision.hpp>

#include "../cpp/src/adam_coefficients.hpp"
#include "../cpp/src/base_density.hpp"
#include "../cpp/src/host_device.hpp"
#include "program.hpp"

struct CUstream_st;

namespace nvpflow::cuda {

using Stream = CUstream_st*;  // cudaStream_t
using Status = int;           // cudaError_t; 0: launched

/// How a dense layer multiplies. tf32x3 splits each float32 operand in two TF32 numbers and adds three of the four
/// products, which keeps float32's budget; tf32 and bf16 round the operands and form one product.
enum class Multiply : std::int32_t { fma, tf32x3, tf32, bf16 };

// ---- programs ------------------------------------------------------------------------------------------------------

/// Fills what Dense and Layer leave to it, of a program whose other numbers are there; for programs of Reach::all.
template <class T>
void place_networks(const Program<T>& program, Layer<T>* layers, Dense* dense);

/// packed[i] = source[i] < 0 ? 0 : parameters[source[i]] for i < count; then, where program is given, the numbers of
/// its diagonal and linear layers that are no copies (whose source is -1). Called for packed and for transposed
/// (program: null).
template <class T>
Status launch_pack(const Program<T>* program, const std::int64_t* source, std::int64_t count, const T* parameters,
                   T* packed, Stream stream);

/// Which matrices of linear layers are formed.
enum class Matrices : std::int32_t { both, of_forward };  // of_forward: those that the way from data reads

/// Bytes that launch_pack_linear needs.
template <class T>
std::int64_t linear_workspace_bytes(const Program<T>& program);
/// After launch_pack: W and W^-1 of the linear layers into packed and, where not null, transposed.
template <class T>
Status launch_pack_linear(const Program<T>& program, Matrices wanted, T* packed, T* transposed, void* workspace,
                          Stream stream);
/// Adds the gradients of the tensors of linear layers to the flat gradient, from the products of all rows. inverse: the
/// direction of the call.
template <class T>
Status launch_linear_gradient(const Program<T>& program, bool inverse, const T* products, T* gradient, Stream stream);

// ---- what the plans need to know of a device ------------------------------------------------------------------------

struct Device {
  std::int32_t multiprocessors = 0;
  std::int32_t compute_capability = 0;                     // 10 * major + minor
  std::int64_t shared_bytes_per_block = 0;                 // opt-in maximum
  std::int64_t shared_bytes_per_processor = 0;             // of a multiprocessor
  std::int64_t workspace_bytes = std::int64_t{512} << 20;  // plans stay below, as far as one tile lets them
};

/// Whether this build has code for the current device: the status of asking for a kernel of it.
Status probe_kernels();
/// Sets the attributes of all kernels on the current device; once per device, before the first launch.
Status prepare_kernels(const Device& device);

// ---- the arrays of calls -------------------------------------------------------------------------------------------

/// An array of a call with `width` elements for each of its rows. at: the call's pointer to it, null where it has none.
template <class P>
struct RowArray {
  P* at;
  std::int64_t width;
};

/// The context rows of a call: row r, or index[r], goes with context row (first + r) / repeat, or index[r] / repeat;
/// repeat 0: all go with the first.
template <class T>
struct ContextRows {
  const T* rows = nullptr;  // null: the flow has no context
  std::int64_t first = 0, repeat = 1;
};

// ---- transform, log_prob, sample, conditioner ----------------------------------------------------------------------

/// Rows [0, rows) of one call. Any of out, log_det, log_prob may be null.
template <class T>
struct TransformCall {
  bool inverse = false;
  const T* in = nullptr;                // null: noise of `seed`, row first_row + r
  const std::int64_t* index = nullptr;  // rows of `in` to take; null: all, in order
  std::int64_t rows = 0;
  T* out = nullptr;       // [rows, D]
  T* log_det = nullptr;   // [rows]; null where log_prob of an inverse is wanted
  T* log_prob = nullptr;  // [rows], of the data: of `in`, or, of an inverse, of `out`
  std::uint64_t seed = 0, first_row = 0;
  // Where not negative: only the log-scale and shift [rows, |b|] of this coupling on its own input; out, log_det and
  // log_prob must be null.
  std::int32_t conditioner = -1;
  std::int64_t transformed = 0;  // |b| of it
  T* log_scale = nullptr;
  T* shift = nullptr;
  ContextRows<T> context;

  /// Whether `in` or `out` are rows of data, which the first layer takes or gives.
  bool is_of_data() const { return conditioner < 0; }
  /// The arrays that come in, but for the context, and go out, those of data first.
  std::array<RowArray<const T*>, 1> rows_in(std::int64_t input_size) { return {{{&in, input_size}}}; }
  std::array<RowArray<T*>, 5> rows_out(std::int64_t input_size, std::int64_t) {
    return {{{&out, input_size}, {&log_det, 1}, {&log_prob, 1}, {&log_scale, transformed}, {&shift, transformed}}};
  }
};

/// Where the weights are while a tile goes through, and where its activations are.
enum class Storage : std::int32_t {
  resident,   // all weights and the activations in shared memory: one load of the weights per block
  streamed,   // weights pass through two stages of shared memory, activations stay in it
  workspace,  // weights as above, activations in a workspace of the block's own in global memory
};

struct TransformPlan {
  Storage storage = Storage::resident;
  Multiply multiply = Multiply::fma;
  std::int32_t warps = 0;         // of a block
  std::int32_t warps_across = 0;  // that share their rows and split the outputs; a function only of the flow, since
                                  // the order of summation of the log-determinant depends on it
  std::int32_t tile_rows = 0;     // rows of a block at a time
  std::int32_t stage_inputs = 0;  // inputs of a stage of weights, a multiple of 16
  std::int32_t blocks = 0;        // most blocks that can be resident on the device together
  std::int64_t hidden_width = 0;  // features of each buffer of hidden activations
  std::int32_t hidden_buffers = 0;
  std::int64_t numbers_width = 0;                  // of the buffer for the numbers of splines, which lies behind those
  bool state_shared = true, hidden_shared = true;  // Storage::workspace: what lies in shared memory all the same
  std::int64_t shared_bytes = 0;                   // dynamic
  std::int64_t workspace_bytes = 0;                // of all blocks
};

template <class T>
struct TransformOptions {
  Precision precision = Precision::float32;
  bool force_fma = false;  // tests: the path of devices without TF32
  int force_storage = -1;  // tests: a Storage, where it is possible at all
};

/// rows: of the largest call the plan serves. Plans for different numbers of rows give the same bits.
template <class T>
TransformPlan plan_transform(const Program<T>& program, const Device& device, std::int64_t rows,
                             const TransformOptions<T>& options = {});
/// workspace: plan.workspace_bytes at a multiple of 16 bytes, not shared with a call that may run at the same time.
template <class T>
Status launch_transform(const TransformPlan& plan, const Program<T>& program, const TransformCall<T>& call,
                        void* workspace, Stream stream);

/// z [rows, D]: latents of rows first_row .. first_row + rows of `seed`.
template <class T>
Status launch_noise(const BaseDensity<T>& base, std::int64_t input_size, std::uint64_t seed, std::uint64_t first_row,
                    std::int64_t rows, T* z, Stream stream);

// ---- sums in float64, in an order that only `count` fixes ----------------------------------------------------------

/// Bytes that launch_sum and launch_sum_of_squares need.
std::int64_t sum_workspace_bytes(std::int64_t count);
/// What each row of an array counts for.
struct RowWeights {
  const double* weights = nullptr;      // null: 1
  const std::int64_t* index = nullptr;  // row r has weights[index[r]]; null: weights[r]

  NVPFLOW_HOST_DEVICE double operator()(std::int64_t r) const {
    if (weights == nullptr) return 1;
    return weights[index == nullptr ? r : index[r]];
  }
  /// Those of the rows from `first` on.
  RowWeights from(std::int64_t first) const {
    if (weights == nullptr) return {};
    return index == nullptr ? RowWeights{weights + first, nullptr} : RowWeights{weights, index + first};
  }
};

/// *result = sum(values), by weight, or += with accumulate.
template <class T>
Status launch_sum(const T* values, const RowWeights& weights, std::int64_t count, bool accumulate, double* result,
                  void* workspace, Stream stream);
template <class T>
Status launch_sum_of_squares(const T* values, std::int64_t count, bool accumulate, double* result, void* workspace,
                             Stream stream);

// ---- gradients -----------------------------------------------------------------------------------------------------

template <class T>
struct GradientCall {
  bool inverse = false;
  const T* in = nullptr;
  const std::int64_t* index = nullptr;
  std::int64_t rows = 0;
  bool nll = false;  // cotangents of nll_factor * weight * -log p instead of grad_out, grad_log_det
  double nll_factor = 0;
  RowWeights weights;               // nll only: of the rows of `in`
  const T* grad_out = nullptr;      // null: zero
  const T* grad_log_det = nullptr;  // null: zero, or one where `density`
  bool density = false;             // grad_log_det is the cotangent of log p
  T* log_prob = nullptr;            // density only, may be null: = log p of the rows
  ContextRows<T> context;
  T* grad_context = nullptr;       // [rows, C], one for each row of the call; null: not wanted
  T* grad_in = nullptr;            // null: not wanted
  T* gradient = nullptr;           // flat; null: not wanted
  bool accumulate = false;         // adds to `gradient` instead of overwriting it
  double* sum_log_prob = nullptr;  // nll only, may be null: = the sum by weight over the rows, nats

  /// As of TransformCall.
  std::array<RowArray<const T*>, 3> rows_in(std::int64_t input_size) {
    return {{{&in, input_size}, {&grad_out, input_size}, {&grad_log_det, 1}}};
  }
  std::array<RowArray<T*>, 3> rows_out(std::int64_t input_size, std::int64_t context_size) {
    return {{{&grad_in, input_size}, {&log_prob, 1}, {&grad_context, context_size}}};
  }
};

/// What one block forms of the gradient.
enum class Task : std::int32_t {
  product,  // inputs x outputs of one dense layer
  sums,     // what a layer keeps as sums of a tile
  map,      // the affine map of a residual block
  context,  // the statistics of the context
  base,     // the base's parameters, of a mixture those of component `layer`
};

struct GradientTask {
  Task task = Task::product;
  std::int32_t layer = 0, dense = 0;  // into Program::layers and dense
  std::int32_t first_in = 0, first_out = 0;
  std::int64_t input = 0, cotangent = 0;  // where the tape holds what it reads: a layer's input, its sums' cotangent
};

struct GradientPlan {
  Multiply multiply = Multiply::fma;
  std::int32_t warps = 0, warps_across = 0, tile_rows = 0, stage_inputs = 0;
  std::int32_t blocks = 0;
  std::int64_t chunk_tiles = 0;    // tiles between two passes over the parameters
  std::int64_t tape_elements = 0;  // of one tile
  std::int32_t splits = 0;         // parts into which the tiles of a chunk are cut for the parameters' gradient
  std::int32_t num_tasks = 0;
  std::int64_t shared_bytes = 0, weight_shared_bytes = 0;
  // Parts of the workspace, bytes from its start.
  std::int64_t partials_at = 0, products_at = 0, log_prob_at = 0, sums_at = 0;
  std::int64_t workspace_bytes = 0;
};

template <class T>
struct GradientOptions {
  Precision precision = Precision::float32;
  bool force_fma = false;
  std::int64_t force_chunk_tiles = 0;  // tests
};

/// rows: of the largest call. Gradients are sums over rows whose order depends on plan.chunk_tiles and plan.splits,
/// functions of the flow, the device and `rows`. The tasks depend on the flow and plan.tile_rows.
template <class T>
GradientPlan plan_gradient(const Program<T>& program, const Device& device, std::int64_t rows,
                           const GradientOptions<T>& options = {});
/// Number of tasks and, where not null, the tasks themselves: the caller keeps a copy in device memory.
template <class T>
std::int32_t gradient_tasks(const Program<T>& program, const GradientPlan& plan, GradientTask* tasks);
/// All rows of the call, chunk by chunk. tasks: in device memory.
template <class T>
Status launch_gradient(const GradientPlan& plan, const Program<T>& program, const GradientTask* tasks,
                       const GradientCall<T>& call, void* workspace, Stream stream);

// ---- Adam ---------------------------------------------------------------------------------------------------------

/// What an update does to one parameter.
enum class Update : std::uint8_t { none, plain, decayed };

template <class T>
struct AdamCall {
  AdamCoefficients coefficients;
  // Where norm_squared is given, gradients are also multiplied by min(1, clip_norm / sqrt(*norm_squared)): a clipping
  // that needs no round trip to the host. Nothing is updated where *norm_squared is not finite.
  const double* norm_squared = nullptr;
  double clip_norm = 0;             // 0: no clipping
  const Update* updates = nullptr;  // one per parameter; null: all `decayed`
  std::int64_t count = 0;
  const T* gradient = nullptr;
  T* first_moment = nullptr;
  T* second_moment = nullptr;
  T* parameters = nullptr;
};

template <class T>
Status launch_adam(const AdamCall<T>& call, Stream stream);

}  // namespace nvpflow::cuda

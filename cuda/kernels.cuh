// The list of CUDA kernels, the plain structures they read and the layout of packed weights. Launch functions allocate
// nothing, never synchronise and pass everything on `stream`, so that callers can capture them in a CUDA graph. This
// header needs no CUDA: backend, packing and tests include it.
#pragma once

#include <array>
#include <cstdint>

#include "../cpp/src/adam.hpp"
#include "../cpp/src/base_density.hpp"
#include "../cpp/src/host_device.hpp"
#include "../cpp/src/program.hpp"
#include "../cpp/src/scale.hpp"
#include "../cpp/src/spline_map.hpp"

struct CUstream_st;

namespace nvpflow::cuda {

using Stream = CUstream_st*;  // cudaStream_t
using Status = int;           // cudaError_t; 0: launched

/// What the caller asks for: the order of nvpflow::Precision. float64 flows always compute in float64.
enum class Precision : std::int32_t { float32, tf32, bfloat16 };

/// How a dense layer multiplies. tf32x3 splits each float32 operand in two TF32 numbers and adds three of the four
/// products, which keeps float32's budget; tf32 and bf16 round the operands and form one product.
enum class Multiply : std::int32_t { fma, tf32x3, tf32, bf16 };

// ---- packed weights ----------------------------------------------------------------------------------------------
// Weights [in, out] lie in blocks of 16 inputs x 8 outputs, 128 elements, blocks of one group of 8 outputs one after
// the other. A block is what one warp reads with one 16-byte access per lane: lane 4 g + t takes inputs 2t, 2t + 1,
// 8 + 2t, 9 + 2t of output g, the fragment of the m16n8k8 and m16n8k16 matrix instructions when inputs are numbered so.
// The 16-byte chunks of a block are permuted by swizzle() so that also lanes that share t hit different banks.

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

/// What becomes of the sums of a dense layer.
enum class Role : std::int32_t {
  hidden,      // activation, LayerNorm where wanted: what the next layer reads
  head,        // the coupling's heads
  scale_head,  // of two networks: that of the first, which the head of the second is added to
  // Residual networks: h = initial; per block h += [gate] outer(inner(act(A(h)))), act after inner, A an affine map.
  initial,
  inner,
  outer,
  gate,     // sigmoid of what is made of the context
  numbers,  // of splines: as they are
};

/// Where the numbers of one feature's spline lie among those of its layer: widths, heights and slopes, each from an
/// even place on, `stride` places a feature. What lies between is zero.
struct SplinePlaces {
  std::int32_t widths = 0, heights, slopes, stride;
  template <class T>
  NVPFLOW_HOST_DEVICE constexpr explicit SplinePlaces(const SplineMap<T>& map)
      : heights(map.num_bins + map.num_bins % 2),
        slopes(2 * heights),
        stride(static_cast<std::int32_t>(round_up(slopes + map.num_slopes, 8))) {}
};

/// Where the numbers of a dense layer lie on a tape of Reach::all, in elements a row from the beginning of the layer's
/// part; -1: nowhere. An array of activations takes round_up(width, 8).
struct DenseTape {
  std::int32_t input = -1;        // what it reads; of a gate the tile's context
  std::int32_t value = -1;        // what the next layer reads; of an outer layer in front of a gate its sums
  std::int32_t argument = -1;     // of the activation, where its derivative needs it; else with LayerNorm its value
  std::int32_t factors = -1;      // with LayerNorm: 1 / the standard deviation, [1]
  std::int32_t cotangent = -1;    // of its sums
  std::int32_t from_h = -1;       // what is added to its sums
  std::int32_t h = -1;            // those sums, where they are kept
  std::int32_t h_cotangent = -1;  // of h
  std::int32_t gate = -1;         // of a gate: its values
  std::int32_t scratch = -1;      // of an inner layer, on the way back; of a gate what it scales
  std::int32_t sums = -1;         // with a map: for each 32 rows the sums of the gradients of scale, then of shift
};

/// y = W^T x + c. The last dense layer of a coupling holds both heads interleaved: output 2j is u_s[j], 2j + 1 is t[j].
/// An additive coupling, and each of two networks, has zeros for the head that it has not; they are no parameters. That
/// of splines has the numbers of one feature after the other (SplinePlaces); where they are the same for all rows, it
/// is a dense layer without inputs, whose bias they are.
struct Dense {
  std::int32_t in = 0;
  std::int32_t out = 0;
  std::int64_t weights = 0;     // into Program::packed: weight_index(i, o, in)
  std::int64_t bias = 0;        // into Program::packed: [bias_size(out)]
  std::int64_t transposed = 0;  // into Program::transposed: weight_index(o, i, out)
  // Into the flat gradient; all but heads use only [0], the head scale [0] and translation [1].
  std::int64_t kernel_offset[2] = {0, 0};  // [in, out], of a head [in, out / 2]
  std::int64_t bias_offset[2] = {0, 0};
  bool listed = false;       // the gradient of a packed number goes where Program::source says instead
  bool interleaved = false;  // both heads

  // Reach::all
  Role role = Role::hidden;
  Act activation = Act::none;  // of hidden and inner layers; of those that make h the one that enters the next block
  bool first = false;          // reads the network's input: the conditioning features, then the context
  bool layer_norm = false;
  // The affine map that enters the next block, into Program::packed: scale, then shift, [bias_size(out)] each; -1:
  // none.
  std::int64_t map = -1;
  std::int64_t scale_offset = 0, shift_offset = 0;  // into the flat gradient, [out]
  // Filled by place_networks. The buffers of hidden activations that it reads and writes, -1: none, or that of numbers;
  // whether it adds to its sums what is kept in the third of them, and keeps them there.
  std::int32_t from = 0, to = -1;
  bool adds = false, keeps = false;
  DenseTape tape;
};

/// Layer::condition where the conditioning features are no part of the state.
inline constexpr std::int32_t kGathered = 2;

/// Where the tensors of a linear layer lie in the flat parameters, and in their gradient.
struct Factors {
  std::int64_t lower = 0, upper = 0, log_diagonal = 0, sign = 0, bias = 0;
};

/// The state of a row has two parts: the features in the places [0, split) and the others. A coupling takes one of them
/// to its network and transforms the other one; where its features lie otherwise, it takes both by lists of places.
template <class T>
struct Layer {
  Kind kind = Kind::coupling;
  bool inverse = false;     // the formula runs against the direction of the call
  std::int64_t place = -1;  // of each feature of the layer's input, into Program::places; -1: its own index
  // coupling, spline
  std::int32_t condition = 0;                    // the part that conditions the other one, or kGathered
  std::int32_t num_inputs = 0, num_outputs = 0;  // features that condition and that are transformed
  // Their places, into Program::places; kGathered only. linear: of the features of x and of y, as `place`.
  std::int64_t input_place = -1, output_place = -1;
  std::int64_t output_order = -1;  // which of the transformed features each output of the head is, into
                                   // Program::places; -1: one after the other
  Act activation = Act::relu;
  // Into Program::dense: hidden layers, then the head. spline: none of the constants, whose dense layer no tile runs.
  // linear: the one that is wanted of two, W and the bias or W^-1, all in the order of the features;
  // launch_pack_linear fills the matrices.
  std::int32_t first_dense = 0, num_dense = 0;
  std::int64_t tape_width = 0;  // Reach::all, filled by place_networks: elements a row of its part of the tape
  Scale<T> scale;
  SplineMap<T> spline;
  // diagonal
  std::int64_t affine = 0;  // into Program::packed: mean, std = exp(log_std), exp(-log_std), each [D], then
                            // -sum(log_std) at 3 D; affine_size(D) elements, filled by launch_pack
  std::int64_t mean_offset = 0, log_std_offset = 0;  // into the flat parameters and gradient
  // linear, y = W x + bias with W = L U
  std::int64_t log_det = 0;   // into Program::packed: sum(log_diagonal), filled by launch_pack
  std::int64_t products = 0;  // into the products (products_size), from which the gradients of the factors are formed
  std::int64_t copies = 0;    // into Program::packed: the tensors but the bias, as FactorCopies says
  Factors factors;
};

/// A kind as a type, to choose a function by.
template <Kind kind>
struct Of {};

/// f(Of<kind>()) for the kind of a layer: the only switch over kinds, so that a forgotten one does not compile.
#if defined(__CUDACC__)
#pragma nv_exec_check_disable  // f may be the device's
#endif
template <class T, class F>
NVPFLOW_HOST_DEVICE void visit(const Layer<T>& layer, F&& f) {
  switch (layer.kind) {
    case Kind::coupling:
      return f(Of<Kind::coupling>());
    case Kind::diagonal:
      return f(Of<Kind::diagonal>());
    case Kind::linear:
      return f(Of<Kind::linear>());
    case Kind::spline:
      return f(Of<Kind::spline>());
  }
}

template <BaseKind kind>
struct OfBase {
  /// It has parameters, and what a latent adds to the density is no sum that each latent knows by itself.
  static constexpr bool kByRows = kind == BaseKind::student_t || kind == BaseKind::mixture;
};

/// Elements of packed that hold what the kernels read of the base, and where base_numbers_of() finds it.
template <class T>
NVPFLOW_HOST_DEVICE std::int64_t base_numbers_size(const BaseDensity<T>& base, std::int64_t features) {
  if (base.kind == BaseKind::student_t) return kStudentNumbers * base.stride + 1;
  if (base.kind != BaseKind::mixture) return 0;
  return base.components * (3 + features + 2 * mixture_factor_size(features, base.full));
}

/// Points the density into its numbers: of student_t [kStudentNumbers][stride], then the log-density of the latents 0.
template <class T>
NVPFLOW_HOST_DEVICE void point_into(BaseDensity<T>& base, const T* numbers, std::int64_t features) {
  base.student = base.weights = numbers;
  base.cumulated = base.weights + base.components;
  base.log_peaks = base.cumulated + base.components;
  base.means = base.log_peaks + base.components;
  base.factors = base.means + base.components * features;
  base.inverses = base.factors + base.components * mixture_factor_size(features, base.full);
}

/// f(OfBase<kind>()) for the kind of a base: the only switch over bases, so that a forgotten one does not compile.
#if defined(__CUDACC__)
#pragma nv_exec_check_disable  // f may be the device's
#endif
template <class T, class F>
NVPFLOW_HOST_DEVICE void visit_base(const BaseDensity<T>& base, F&& f) {
  switch (base.kind) {
    case BaseKind::normal:
      return f(OfBase<BaseKind::normal>());
    case BaseKind::uniform:
      return f(OfBase<BaseKind::uniform>());
    case BaseKind::student_t:
      return f(OfBase<BaseKind::student_t>());
    case BaseKind::mixture:
      return f(OfBase<BaseKind::mixture>());
  }
}

/// Dense layers of a layer's networks.
template <class T>
NVPFLOW_HOST_DEVICE constexpr std::int32_t network_size(const Layer<T>& layer) {
  return facts_of(layer.kind).has_networks ? layer.num_dense : 0;
}

/// Of a layer that takes numbers, into Program::dense: the one that says them.
template <class T>
NVPFLOW_HOST_DEVICE constexpr std::int32_t numbers_dense(const Layer<T>& layer) {
  return layer.first_dense + (layer.num_dense > 0 ? layer.num_dense - 1 : 0);
}

NVPFLOW_HOST_DEVICE constexpr std::int64_t affine_size(std::int64_t input_size) {
  return round_up(3 * input_size + 1, 4);
}

/// Elements that a linear layer's number of its log-determinant takes in Program::packed.
inline constexpr std::int64_t kLogDetSize = 4;
/// Elements of the tensors lower, upper, log_diagonal and sign, rounded up; they begin at these of them.
struct FactorCopies {
  std::int64_t lower = 0, upper, log_diagonal, sign, size;
  NVPFLOW_HOST_DEVICE constexpr explicit FactorCopies(std::int64_t features)
      : upper(features * (features - 1) / 2),
        log_diagonal(2 * upper),
        sign(log_diagonal + features),
        size(round_up(sign + features, 4)) {}
};
/// Elements of the products of a linear layer: sums over the rows of x times the cotangents of y, [x][y], of these
/// cotangents [y], and of those of the log-determinant.
NVPFLOW_HOST_DEVICE constexpr std::int64_t products_size(std::int64_t input_size) {
  return input_size * input_size + input_size + 1;
}

/// What the kernels of a program know. Those that know less need fewer registers.
enum class Reach : std::int32_t {
  plain,    // networks that are perceptrons, on the two parts of the state, log-scales of tanh
  general,  // also lists of places, layers that run backwards, every log-scale
  // Also linear layers, splines, two networks for a coupling, LayerNorm, residual networks, a context, every base.
  all,
};

/// Plans read a Program whose pointers are the host's (packed and transposed may be null), launches one whose pointers
/// are the device's. Every offset into packed and transposed is a multiple of 4 elements, the arrays lie at multiples
/// of 16 bytes.
template <class T>
struct Program {
  std::int32_t input_size = 0;
  std::int32_t split = 0;  // features of the first part of the state
  std::int32_t context_size = 0;
  std::int32_t num_layers = 0;
  std::int32_t num_dense = 0;
  BaseDensity<T> base;
  const Layer<T>* layers = nullptr;
  const Dense* dense = nullptr;
  const T* packed = nullptr;
  std::int64_t packed_size = 0;   // elements, a multiple of 4
  const T* transposed = nullptr;  // only gradients read it
  std::int64_t transposed_size = 0;
  std::int64_t num_parameters = 0;  // of the flat buffer
  std::int32_t num_numbers = 0;     // layers with numbers that are no copies of parameters, and the context's
  std::int32_t num_linear = 0;      // linear layers
  std::int64_t products = 0;        // elements of all their products; a part of a gradient has them behind it
  // Of a context that is standardized: into packed, mean, then exp(-log_std), [C] each, filled by launch_pack; -1: it
  // is not. Into the flat parameters and gradient the same, [C] each.
  std::int64_t context_statistics = -1, context_mean_offset = 0, context_log_std_offset = 0;
  std::int64_t base_numbers = -1;  // into packed, of a base with parameters, filled by launch_pack; -1: it has none
  const std::int32_t* places = nullptr;
  std::int64_t data_place = -1, latent_place = -1;  // of the features of data and of the latent space, as Layer::place
  Reach reach = Reach::plain;                       // reach_of()
  const std::int64_t* source = nullptr;             // of launch_pack for packed

  /// The list that begins there; null: each its own index.
  NVPFLOW_HOST_DEVICE const std::int32_t* places_at(std::int64_t begin) const {
    return begin < 0 ? nullptr : places + begin;
  }
  /// Places of the features of what comes in and goes out.
  NVPFLOW_HOST_DEVICE const std::int32_t* places_in(bool inverse) const {
    return places_at(inverse ? latent_place : data_place);
  }
  NVPFLOW_HOST_DEVICE const std::int32_t* places_out(bool inverse) const { return places_in(!inverse); }
};

/// The least that serves a flow.
template <class T>
constexpr Reach reach_of(const Program<T>& program) {
  if (program.context_size > 0 || program.base.kind != BaseKind::normal) return Reach::all;
  for (std::int32_t i = 0; i < program.num_dense; ++i) {
    const Dense& d = program.dense[i];
    if ((d.role != Role::hidden && d.role != Role::head) || d.layer_norm) return Reach::all;
  }
  Reach reach = program.data_place >= 0 || program.latent_place >= 0 ? Reach::general : Reach::plain;
  for (std::int32_t k = 0; k < program.num_layers; ++k) {
    const Layer<T>& layer = program.layers[k];
    if (facts_of(layer.kind).beyond_affine) return Reach::all;
    const bool general = layer.inverse || layer.place >= 0 || layer.condition == kGathered || layer.output_order >= 0 ||
                         layer.scale.function != ScaleFunction::tanh;
    if (general) reach = Reach::general;
  }
  return reach;
}

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

// A flow as the CUDA kernels read it: plain structures, whose pointers are the host's or the device's, and the only
// switches over kinds of layers and of bases. No CUDA: backend, packing, plans and tests include it.
#pragma once

#include <cstdint>

#include "../cpp/src/base_density.hpp"
#include "../cpp/src/host_device.hpp"
#include "../cpp/src/kinds.hpp"
#include "../cpp/src/log_scale.hpp"
#include "../cpp/src/spline_map.hpp"
#include "block_layout.hpp"

namespace nvpflow::cuda {

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

}  // namespace nvpflow::cuda

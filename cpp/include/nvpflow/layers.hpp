/// @file
/// The layers that a FlowSpec is made of, each read in the direction data -> latent.
#pragma once

#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include <nvpflow/export.h>

namespace nvpflow {

/// What follows each hidden dense layer; leaky_relu has slope 0.01 and elu alpha 1, gelu is the exact one.
enum class Activation { relu, leaky_relu, elu, gelu, silu, tanh, sigmoid, softplus };

/// A set of features of a layer's input. Halves are split at D / 2, rounded down; odd is 1, 3, 5, ...
struct NVPFLOW_API FeatureSet {
  /// How the set is named; `indices`: by its members.
  enum class Name { first_half, second_half, even, odd, all, indices };

  Name name = Name::second_half;      ///< which set
  std::vector<std::int64_t> indices;  ///< ascending; only where name is `indices`

  /// The members, ascending, of a layer with so many features.
  std::vector<std::int64_t> of(std::int64_t input_size) const;
  /// How many of so many features are members.
  std::int64_t count(std::int64_t input_size) const;
  /// Named the same; the same features by another name are not equal.
  bool operator==(const FeatureSet&) const = default;
};

/// The log-scale s = g(u) of an affine coupling, where u is what the network says. Which fields count depends on the
/// function:
///
///     tanh      s = F tanh(u / d)
///     softsign  s = F v / (1 + |v|),  v = u / d
///     atan      s = F atan(u / d)
///     identity  s = u
///     sigmoid   s = +-log(low + (high - low) sigmoid(u + offset))
///     softplus  s = +-log(min(softplus(u + offset) + low, high))
struct LogScale {
  /// g.
  enum class Function { tanh, softsign, atan, identity, sigmoid, softplus };

  Function function = Function::tanh;                     ///< g
  double factor = 1.0;                                    ///< F > 0
  double divisor = 1.0;                                   ///< d > 0
  double low = 0.0;                                       ///< smallest scale, >= 0
  double high = std::numeric_limits<double>::infinity();  ///< largest scale, > low; sigmoid: finite
  double offset = 0.0;                                    ///< added to u
  bool negated = false;                                   ///< the sign of s is -

  /// Every field is equal.
  bool operator==(const LogScale&) const = default;
  /// B tanh(u / B): |s| <= B, slope 1 at 0.
  static LogScale bounded(double bound) { return {Function::tanh, bound, bound}; }
};

/// y = x exp(s) + t (Dinh et al., Density estimation using Real NVP, 2017, eq. 7-8). Heads: scale (u), translation (t).
struct Affine {
  LogScale log_scale;  ///< u -> s
  /// Every field is equal.
  bool operator==(const Affine&) const = default;
};

/// y = x + t (Dinh et al., NICE, 2015). Head: translation (t).
struct Additive {
  /// Two are always equal: they have no fields.
  bool operator==(const Additive&) const = default;
};

/// The slope d = g(u) of a spline at a knot, where u is what the network says, and min_derivative is added to:
///
///     softplus  d = gain softplus(u + offset)
///     exp       d = exp(v / (1 + |v / bound|)),  v = u
struct KnotSlope {
  /// g.
  enum class Function { softplus, exp };

  Function function = Function::softplus;  ///< g
  double offset = 0.539742417236952;       ///< softplus: added to u; log(e^0.999 - 1), so that d + 0.001 is 1 at u = 0
  double gain = 1.0;                       ///< softplus: > 0
  double bound = 1.0;                      ///< exp: of |log d|, > 0

  /// Every field is equal.
  bool operator==(const KnotSlope&) const = default;
};

/// A monotone rational-quadratic spline of num_bins bins on [lower, upper] (Gregory and Delbourgo 1982; Durkan et al.,
/// Neural Spline Flows, 2019). Heads for each transformed feature: num_bins widths, num_bins heights, and the slopes at
/// the inner knots (boundary one), or at all of them (free). Output p n + j of a head is parameter p of the j-th of n
/// features.
///
/// Widths and heights of bins are (upper - lower) (m + (1 - num_bins m) softmax(u)), m the smallest as a fraction.
/// A u that is more than 40 (float32) or 340 (float64) below the largest counts as that: such a bin is empty.
struct NVPFLOW_API Spline {
  /// The slopes at both ends: 1, or from the network.
  enum class Boundary { one, free };
  /// Outside [lower, upper]: y = x, or the straight line with the slope at the end.
  enum class Tails { identity, slope };

  std::int64_t num_bins = 8;                                    ///< 1 to 256
  double lower = -3.0;                                          ///< where the spline begins, of x and of y
  double upper = 3.0;                                           ///< where it ends, > lower
  double min_bin_width = 1e-3;                                  ///< of upper - lower, >= 0, below 1 / num_bins
  double min_bin_height = 1e-3;                                 ///< the same
  double min_derivative = 1e-3;                                 ///< added to every slope that the network gives, >= 0
  KnotSlope derivative;                                         ///< the slopes
  double size_bound = std::numeric_limits<double>::infinity();  ///< S: u / (1 + |u / S|) in place of u of the sizes
  Boundary boundary = Boundary::one;                            ///< slopes at the ends
  Tails tails = Tails::identity;                                ///< outside

  /// Every field is equal.
  bool operator==(const Spline&) const = default;
  /// Slopes that the network gives for each feature.
  std::int64_t num_slopes() const { return boundary == Boundary::one ? num_bins - 1 : num_bins + 1; }
  /// All that the network gives for each feature.
  std::int64_t num_parameters() const { return 2 * num_bins + num_slopes(); }
};

/// What a coupling does to the transformed features.
using Transform = std::variant<Affine, Additive, Spline>;

/// From the conditioning features and the context to the heads.
///
///     mlp       h_0 = [x_a, c];  h_{j+1} = N(act(W_j h_j + b_j)), N the identity or LayerNorm
///     residual  h = W [x_a, c] + b;  per block v = W_1 act(W_0 act(A(h)) + b_0) + b_1, h += v * gate
///
/// Heads are linear in the last h. gate is sigmoid(W_c c + b_c) with context_gates, else 1. A(h) is h * scale + shift
/// with block_affines, else h.
struct Network {
  /// Which of the two.
  enum class Kind { mlp, residual };

  Kind kind = Kind::mlp;  ///< which of them
  /// Units of each hidden layer; none: linear heads. residual: exactly one, the width of h.
  std::vector<std::int64_t> hidden_sizes;
  Activation activation = Activation::relu;  ///< after each hidden layer; residual: before each layer of a block
  /// mlp: each hidden layer's output is brought to mean 0 and variance 1 (unbiased, plus 1e-5), without an affine map.
  bool layer_norm = false;
  std::int64_t num_blocks = 2;  ///< residual
  bool context_gates = false;   ///< residual; needs a context
  bool block_affines = false;   ///< residual: an affine map before the first activation of each block

  /// Every field is equal.
  bool operator==(const Network&) const = default;
};

/// A coupling layer: the features that are not transformed, and the context, say how the others are.
///
///     y_b = transform(x_b; network([x_a, c])),  y_a = x_a,  b = transformed, a = the others
struct Coupling {
  bool inverse = false;    ///< the formula is read latent -> data
  FeatureSet transformed;  ///< b; all of them need a context
  Transform transform;     ///< of b
  Network network;         ///< of both heads, or of the scale only
  /// Affine only: the translation head has a network of its own.
  std::optional<Network> translation_network;

  /// Every field is equal.
  bool operator==(const Coupling&) const = default;
};

/// y = (x - mean) * exp(-log_std), one mean and log_std per feature, set from the data and not trained.
struct Standardize {
  /// Two standardize layers are always equal: they have no fields.
  bool operator==(const Standardize&) const = default;
};

/// y = x * exp(log_scale) + shift, per feature, trained; fit() sets it from the data where it is still all zeros
/// (Kingma and Dhariwal, Glow, 2018).
struct ActNorm {
  bool inverse = false;  ///< the formula is read latent -> data
  /// Every field is equal.
  bool operator==(const ActNorm&) const = default;
};

/// y_j = x_{order[j]}.
struct Permutation {
  std::vector<std::int64_t> order;  ///< each of 0 .. D - 1 once
  /// Every field is equal.
  bool operator==(const Permutation&) const = default;
};

/// y = L U x + bias; L is unit lower triangular, U upper triangular with diagonal sign_i exp(log_diagonal_i). It starts
/// as the identity (Kingma and Dhariwal, Glow, 2018, with the decomposition kept).
///
/// One that whitens is not trained. fit() sets it where it is still the identity, and Flow::initialize_from always.
/// They do so from the shrunk covariance of all rows (Ledoit and Wolf 2004), or from one that left-out rows are
/// likelier by. What comes out has mean 0 and, by that one, unit covariance. The heads of its flow's couplings are
/// drawn as zeros. Behind a standardize layer training so begins with a Gaussian.
struct LULinear {
  bool inverse = false;  ///< the formula is read latent -> data
  bool whitens = false;  ///< it is set from the data, and not trained
  /// Every field is equal.
  bool operator==(const LULinear&) const = default;
};

/// A spline on some features, whose parameters are the layer's own instead of a network's. Durkan et al. (2019) use it
/// for the features that a coupling leaves as they are.
struct ElementSpline {
  bool inverse = false;                               ///< the formula is read latent -> data
  FeatureSet features = {FeatureSet::Name::all, {}};  ///< which have a spline
  Spline spline;                                      ///< of each
  /// Every field is equal.
  bool operator==(const ElementSpline&) const = default;
};

/// Brings columns of data that cannot lie beyond some number to the whole line. Only as a flow's first layer:
///
///     [low, high]    y = log(x - low) - log(high - x)
///     [low, inf)     y = log(x - low)
///     (-inf, high]   y = -log(high - x)
///     neither        y = x
///
/// A row that lies outside of a column's interval, or on its edge, has log p = -inf, the log-determinant -inf, infinite
/// latents and the gradient 0. What comes back from latents lies inside, never on an edge. All of it is computed in
/// float64, also of rows of float32. Together with a standardize layer that follows it is rounded once.
///
/// A discrete column holds integers n, each of which stands for the cell from n - 1/2 to n + 1/2. Its ends are edges of
/// cells, such as -0.5. fit() adds noise that is uniform on the cell. log p of an integer is that of the cell by the
/// density at its middle. It is -inf of any other number, and samples are rounded; forward and inverse take and give
/// any number.
struct Bounds {
  std::vector<double> low;               ///< [D], -infinity: none
  std::vector<double> high;              ///< [D], infinity: none
  std::vector<std::int64_t> discrete{};  ///< columns of integers, ascending
  /// Every field is equal.
  bool operator==(const Bounds&) const = default;
};

/// The alternatives of LayerSpec, in its order.
enum class LayerKind { coupling, standardize, actnorm, permutation, lu_linear, element_spline, bounds };

/// One invertible layer; the alternatives are in the order of LayerKind.
using LayerSpec = std::variant<Coupling, Standardize, ActNorm, Permutation, LULinear, ElementSpline, Bounds>;

/// Which alternative it is.
inline LayerKind kind_of(const LayerSpec& layer) { return static_cast<LayerKind>(layer.index()); }

/// @{
/// "relu", "coupling", "odd", "tanh", "residual"; the parsers throw Error(invalid_argument) that lists the known names.
NVPFLOW_API std::string_view name_of(Activation activation);
NVPFLOW_API std::string_view name_of(LayerKind kind);
NVPFLOW_API std::string_view name_of(FeatureSet::Name name);
NVPFLOW_API std::string_view name_of(LogScale::Function function);
NVPFLOW_API std::string_view name_of(Network::Kind kind);
NVPFLOW_API std::string_view name_of(KnotSlope::Function function);
NVPFLOW_API std::string_view name_of(Spline::Boundary boundary);
NVPFLOW_API std::string_view name_of(Spline::Tails tails);
NVPFLOW_API Activation parse_activation(std::string_view name);
NVPFLOW_API LayerKind parse_layer_kind(std::string_view name);
NVPFLOW_API FeatureSet::Name parse_feature_set(std::string_view name);
NVPFLOW_API LogScale::Function parse_log_scale(std::string_view name);
NVPFLOW_API Network::Kind parse_network_kind(std::string_view name);
NVPFLOW_API KnotSlope::Function parse_knot_slope(std::string_view name);
NVPFLOW_API Spline::Boundary parse_spline_boundary(std::string_view name);
NVPFLOW_API Spline::Tails parse_spline_tails(std::string_view name);
/// @}
/// Every activation's name, in the order of the enum.
NVPFLOW_API std::vector<std::string> activation_names();

}  // namespace nvpflow

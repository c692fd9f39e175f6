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

/// What a coupling does to the transformed features.
using Transform = std::variant<Affine, Additive>;

/// From the conditioning features and the context to the heads.
///
///     mlp       h_0 = [x_a, c];  h_{j+1} = N(act(W_j h_j + b_j)), N the identity or LayerNorm;  heads linear in the
///               last h
///     residual  h = W [x_a, c] + b;  per block v = W_1 act(W_0 act(A(h)) + b_0) + b_1, h += v * gate;  heads linear
///               in h. gate = sigmoid(W_c c + b_c) with context_gates, else 1; A(h) = h * scale + shift with
///               block_affines, else h
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
struct LULinear {
  bool inverse = false;  ///< the formula is read latent -> data
  /// Every field is equal.
  bool operator==(const LULinear&) const = default;
};

/// The alternatives of LayerSpec, in its order.
enum class LayerKind { coupling, standardize, actnorm, permutation, lu_linear };

/// One invertible layer; the alternatives are in the order of LayerKind.
using LayerSpec = std::variant<Coupling, Standardize, ActNorm, Permutation, LULinear>;

/// Which alternative it is.
inline LayerKind kind_of(const LayerSpec& layer) { return static_cast<LayerKind>(layer.index()); }

/// @{
/// "relu", "coupling", "odd", "tanh", "residual"; the parsers throw Error(invalid_argument) that lists the known names.
NVPFLOW_API std::string_view name_of(Activation activation);
NVPFLOW_API std::string_view name_of(LayerKind kind);
NVPFLOW_API std::string_view name_of(FeatureSet::Name name);
NVPFLOW_API std::string_view name_of(LogScale::Function function);
NVPFLOW_API std::string_view name_of(Network::Kind kind);
NVPFLOW_API Activation parse_activation(std::string_view name);
NVPFLOW_API LayerKind parse_layer_kind(std::string_view name);
NVPFLOW_API FeatureSet::Name parse_feature_set(std::string_view name);
NVPFLOW_API LogScale::Function parse_log_scale(std::string_view name);
NVPFLOW_API Network::Kind parse_network_kind(std::string_view name);
/// @}
/// Every activation's name, in the order of the enum.
NVPFLOW_API std::vector<std::string> activation_names();

}  // namespace nvpflow

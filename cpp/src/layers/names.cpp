// The names of what layers are made of.
#include <string>
#include <string_view>
#include <type_traits>
#include <variant>
#include <vector>

#include <nvpflow/layers.hpp>

#include "../names.hpp"

namespace nvpflow {
namespace {

constexpr Names<Activation, 8> kActivations = {{{Activation::relu, "relu"},
                                                {Activation::leaky_relu, "leaky_relu"},
                                                {Activation::elu, "elu"},
                                                {Activation::gelu, "gelu"},
                                                {Activation::silu, "silu"},
                                                {Activation::tanh, "tanh"},
                                                {Activation::sigmoid, "sigmoid"},
                                                {Activation::softplus, "softplus"}}};
constexpr Names<LayerKind, 7> kLayerKinds = {{{LayerKind::coupling, "coupling"},
                                              {LayerKind::standardize, "standardize"},
                                              {LayerKind::actnorm, "actnorm"},
                                              {LayerKind::permutation, "permutation"},
                                              {LayerKind::lu_linear, "lu_linear"},
                                              {LayerKind::element_spline, "element_spline"},
                                              {LayerKind::bounds, "bounds"}}};
static_assert(std::variant_size_v<LayerSpec> == kLayerKinds.size(), "each kind of layer has a name");

template <LayerKind kind, class Layer>
constexpr bool stands_at = std::is_same_v<std::variant_alternative_t<static_cast<std::size_t>(kind), LayerSpec>, Layer>;
static_assert(stands_at<LayerKind::coupling, Coupling> && stands_at<LayerKind::standardize, Standardize> &&
                  stands_at<LayerKind::actnorm, ActNorm> && stands_at<LayerKind::permutation, Permutation> &&
                  stands_at<LayerKind::lu_linear, LULinear> && stands_at<LayerKind::element_spline, ElementSpline> &&
                  stands_at<LayerKind::bounds, Bounds>,
              "LayerKind and LayerSpec have one order");

constexpr Names<FeatureSet::Name, 6> kFeatureSets = {{{FeatureSet::Name::first_half, "first_half"},
                                                      {FeatureSet::Name::second_half, "second_half"},
                                                      {FeatureSet::Name::even, "even"},
                                                      {FeatureSet::Name::odd, "odd"},
                                                      {FeatureSet::Name::all, "all"},
                                                      {FeatureSet::Name::indices, "indices"}}};
constexpr Names<LogScale::Function, 6> kLogScales = {{{LogScale::Function::tanh, "tanh"},
                                                      {LogScale::Function::softsign, "softsign"},
                                                      {LogScale::Function::atan, "atan"},
                                                      {LogScale::Function::identity, "identity"},
                                                      {LogScale::Function::sigmoid, "sigmoid"},
                                                      {LogScale::Function::softplus, "softplus"}}};
constexpr Names<Network::Kind, 2> kNetworks = {{{Network::Kind::mlp, "mlp"}, {Network::Kind::residual, "residual"}}};
constexpr Names<KnotSlope::Function, 2> kKnotSlopes = {
    {{KnotSlope::Function::softplus, "softplus"}, {KnotSlope::Function::exp, "exp"}}};
constexpr Names<Spline::Boundary, 2> kBoundaries = {{{Spline::Boundary::one, "one"}, {Spline::Boundary::free, "free"}}};
constexpr Names<Spline::Tails, 2> kTails = {{{Spline::Tails::identity, "identity"}, {Spline::Tails::slope, "slope"}}};

}  // namespace

std::string_view name_of(Activation activation) { return find_name(kActivations, activation, "activation"); }
std::string_view name_of(LayerKind kind) { return find_name(kLayerKinds, kind, "kind"); }
std::string_view name_of(FeatureSet::Name name) { return find_name(kFeatureSets, name, "transformed"); }
std::string_view name_of(LogScale::Function function) { return find_name(kLogScales, function, "function"); }
std::string_view name_of(Network::Kind kind) { return find_name(kNetworks, kind, "kind"); }
std::string_view name_of(KnotSlope::Function function) { return find_name(kKnotSlopes, function, "function"); }
std::string_view name_of(Spline::Boundary boundary) { return find_name(kBoundaries, boundary, "boundary"); }
std::string_view name_of(Spline::Tails tails) { return find_name(kTails, tails, "tails"); }

Activation parse_activation(std::string_view name) { return find_value(kActivations, name, "activation"); }
LayerKind parse_layer_kind(std::string_view name) { return find_value(kLayerKinds, name, "kind"); }
FeatureSet::Name parse_feature_set(std::string_view name) { return find_value(kFeatureSets, name, "transformed"); }
LogScale::Function parse_log_scale(std::string_view name) { return find_value(kLogScales, name, "function"); }
Network::Kind parse_network_kind(std::string_view name) { return find_value(kNetworks, name, "kind"); }
KnotSlope::Function parse_knot_slope(std::string_view name) { return find_value(kKnotSlopes, name, "function"); }
Spline::Boundary parse_spline_boundary(std::string_view name) { return find_value(kBoundaries, name, "boundary"); }
Spline::Tails parse_spline_tails(std::string_view name) { return find_value(kTails, name, "tails"); }

std::vector<std::string> activation_names() {
  std::vector<std::string> names;
  for (const auto& [value, name] : kActivations) names.emplace_back(name);
  return names;
}

}  // namespace nvpflow

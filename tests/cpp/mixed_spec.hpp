// Random flows of many kinds of layers, for tests that compare a backend with the oracle, or two ways to call a flow.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <random>
#include <utility>
#include <variant>
#include <vector>

#include <nvpflow/spec.hpp>

namespace nvpflow {

/// Feature sets, orientations, permutations, actnorms and both transforms, such that some couplings find their features
/// one after the other and some do not.
inline FlowSpec mixed_spec(std::int64_t features, std::uint64_t seed, DType dtype) {
  std::mt19937_64 random(seed);
  const auto below = [&](std::uint64_t n) { return static_cast<std::size_t>(random() % n); };
  FlowSpec spec;
  spec.input_size = features;
  spec.dtype = dtype;
  using Name = FeatureSet::Name;
  if (below(2) == 0) spec.layers.emplace_back(Standardize{});
  for (int k = 0; k < 5; ++k) {
    if (below(2) == 0) {
      Permutation permutation;
      for (std::int64_t j = 0; j < features; ++j) permutation.order.push_back(j);
      std::shuffle(permutation.order.begin(), permutation.order.end(), random);
      spec.layers.emplace_back(permutation);
    }
    if (below(3) == 0) spec.layers.emplace_back(ActNorm{below(2) == 0});
    Coupling coupling;
    coupling.inverse = below(2) == 0;
    coupling.transformed.name = std::array{Name::first_half, Name::second_half, Name::even, Name::odd}[below(4)];
    if (below(3) == 0) {
      coupling.transformed.name = Name::indices;
      const std::size_t kept = below(static_cast<std::uint64_t>(features));
      for (std::size_t j = 0; j < static_cast<std::size_t>(features); ++j) {
        if (j != kept && (below(2) == 0 || j == (kept + 1) % static_cast<std::size_t>(features))) {
          coupling.transformed.indices.push_back(static_cast<std::int64_t>(j));
        }
      }
    }
    if (below(3) == 0) coupling.transform = Additive{};
    if (below(3) == 0) coupling.transform = Affine{{LogScale::Function::tanh, 0.7, 1.9}};
    coupling.network.hidden_sizes = below(4) == 0 ? std::vector<std::int64_t>{} : std::vector<std::int64_t>{7, 5};
    coupling.network.activation = Activation::tanh;
    spec.layers.emplace_back(coupling);
  }
  return spec;
}

/// What is particular of the networks of networks_spec().
enum class Networks { two, layer_norm, residual, affine_maps };

/// mixed_spec() with networks of one kind, of many sizes and activations.
inline FlowSpec networks_spec(std::int64_t features, std::uint64_t seed, Networks kind, DType dtype) {
  FlowSpec spec = mixed_spec(features, seed, dtype);
  std::uint64_t k = seed;
  for (LayerSpec& layer : spec.layers) {
    auto* coupling = std::get_if<Coupling>(&layer);
    if (coupling == nullptr) continue;
    Network& network = coupling->network;
    network.activation = std::array{Activation::gelu, Activation::tanh, Activation::softplus, Activation::silu}[k % 4];
    if (kind == Networks::two && std::holds_alternative<Affine>(coupling->transform)) {
      coupling->translation_network = Network{Network::Kind::mlp, {}, Activation::silu};
      if (k % 3 > 0) coupling->translation_network->hidden_sizes = {4, 11};
    }
    if (kind == Networks::layer_norm) {
      // Two units that are nearly equal are blown up, and with them what float32 rounds.
      network.hidden_sizes = {7, dtype == DType::float64 ? 2 : 11, 33};
      if (k % 2 == 0) network.hidden_sizes = {19};
      network.layer_norm = true;
    }
    if (kind == Networks::residual || kind == Networks::affine_maps) {
      network.kind = Network::Kind::residual;
      network.hidden_sizes = {k % 2 == 0 ? 19 : 5};
      network.num_blocks = static_cast<std::int64_t>(k % 3);
      network.block_affines = kind == Networks::affine_maps;
    }
    ++k;
  }
  return spec;
}

/// A residual network that the context gates.
inline Network gated_network(std::uint64_t seed) {
  Network network;
  network.kind = Network::Kind::residual;
  network.hidden_sizes = {seed % 2 == 0 ? 19 : 5};
  network.activation = seed % 2 == 0 ? Activation::gelu : Activation::tanh;
  network.num_blocks = 2;
  network.context_gates = true;
  network.block_affines = seed % 2 == 1;
  return network;
}

/// A density given a context: what mixed_spec() gives, an lu_linear layer, couplings with LayerNorm and with a network
/// for each head, and one that transforms all features, which alone stands where there is one feature only. Networks
/// are gated from seed 2 on; odd seeds standardize the context.
inline FlowSpec conditional_spec(std::int64_t features, std::uint64_t seed, std::int64_t context_size, DType dtype) {
  FlowSpec spec;
  if (features > 1) {
    spec = mixed_spec(features, seed, dtype);
    spec.layers.emplace_back(LULinear{seed % 2 == 0});
    Coupling coupling;
    coupling.network.hidden_sizes = {11, 6};
    coupling.network.activation = Activation::silu;
    coupling.network.layer_norm = true;
    spec.layers.emplace_back(coupling);
    coupling.inverse = true;
    coupling.translation_network = Network{Network::Kind::mlp, {4}, Activation::softplus};
    spec.layers.emplace_back(coupling);
  }
  Coupling of_all;
  of_all.transformed.name = FeatureSet::Name::all;
  of_all.network.hidden_sizes = seed % 2 == 0 ? std::vector<std::int64_t>{9} : std::vector<std::int64_t>{};
  if (seed >= 2) of_all.network = gated_network(seed);
  spec.layers.emplace_back(of_all);
  spec.input_size = features;
  spec.context_size = context_size;
  spec.standardize_context = seed % 2 == 1;
  spec.dtype = dtype;
  return spec;
}

/// A spline of some kind: few bins and many, both ends, tails, slopes, bounds of sizes.
inline Spline some_spline(std::uint64_t k) {
  Spline spline;
  spline.num_bins = std::array<std::int64_t, 5>{8, 1, 3, 20, 2}[k % 5];
  if (k % 3 == 1) spline.boundary = Spline::Boundary::free;
  if (k % 6 == 1) spline.tails = Spline::Tails::slope;
  if (k % 4 == 2) {  // as zuko's
    spline.derivative = {KnotSlope::Function::exp, 0, 1, 6.9};
    spline.size_bound = 3.45;
    spline.min_bin_width = spline.min_bin_height = spline.min_derivative = 0;
    spline.lower = -1.5;
    spline.upper = 2;
  }
  if (k % 4 == 3) spline.derivative.gain = 1.4;
  return spline;
}

/// mixed_spec() of fewer layers with splines in place of the transforms, and element splines.
inline FlowSpec spline_spec(std::int64_t features, std::uint64_t seed, DType dtype) {
  FlowSpec spec = mixed_spec(features, seed, dtype);
  std::uint64_t k = seed;
  std::vector<LayerSpec> layers;
  for (LayerSpec& layer : spec.layers) {
    auto* coupling = std::get_if<Coupling>(&layer);
    if (coupling != nullptr) {
      coupling->transform = some_spline(++k);
      if (k % 3 == 0) {
        coupling->network.kind = Network::Kind::residual;
        coupling->network.hidden_sizes = {6};
        coupling->network.num_blocks = 1;
      }
    }
    layers.push_back(layer);
    if (k - seed == 3) break;  // the condition numbers of splines multiply
  }
  ElementSpline element;
  element.inverse = seed % 2 == 0;
  element.features.name = std::array{FeatureSet::Name::all, FeatureSet::Name::odd, FeatureSet::Name::even}[seed % 3];
  element.spline = some_spline(seed);
  layers.insert(layers.begin() + static_cast<std::ptrdiff_t>(seed % 2), element);
  spec.layers = std::move(layers);
  return spec;
}

/// conditional_spec() with splines in place of its transforms, but for those of two networks, and one more layer of
/// constants.
inline FlowSpec conditional_spline_spec(std::int64_t features, std::uint64_t seed, std::int64_t context_size,
                                        DType dtype) {
  FlowSpec spec = conditional_spec(features, seed, context_size, dtype);
  const std::size_t couplings = 3;  // the condition numbers of splines multiply
  if (spec.layers.size() > couplings) {
    spec.layers.erase(spec.layers.begin(), spec.layers.end() - static_cast<std::ptrdiff_t>(couplings));
  }
  std::uint64_t k = seed;
  for (LayerSpec& layer : spec.layers) {
    auto* coupling = std::get_if<Coupling>(&layer);
    if (coupling != nullptr && !coupling->translation_network) coupling->transform = some_spline(k++);
  }
  ElementSpline element;
  element.features.name = FeatureSet::Name::all;
  element.spline = some_spline(k);
  spec.layers.emplace_back(element);
  return spec;
}

/// mixed_spec() behind bounds of each kind, far enough from 0 that standard normal numbers lie inside.
inline FlowSpec bounded_spec(std::int64_t features, std::uint64_t seed, DType dtype) {
  FlowSpec spec = mixed_spec(features, seed, dtype);
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  Bounds bounds;
  for (std::int64_t j = 0; j < features; ++j) {
    const auto kind = (static_cast<std::uint64_t>(j) + seed) % 4;  // both, below, above, neither
    bounds.low.push_back(kind < 2 ? -7.5 - static_cast<double>(j % 3) : -kInfinity);
    bounds.high.push_back(kind == 0 || kind == 2 ? 9.25 : kInfinity);
  }
  if (seed % 4 == 3 && features < 2) bounds.low[0] = -8;
  spec.layers.insert(spec.layers.begin(), bounds);
  return spec;
}

/// mixed_spec() with linear layers, which run either way, in front of layers and behind the last.
inline FlowSpec linear_spec(std::int64_t features, std::uint64_t seed, DType dtype) {
  FlowSpec spec = mixed_spec(features, seed, dtype);
  std::vector<LayerSpec> layers;
  for (std::size_t k = 0; k < spec.layers.size(); ++k) {
    if (k > 0 && (k + seed) % 3 == 0) layers.emplace_back(LULinear{(k + seed) % 2 == 0});
    layers.push_back(spec.layers[k]);
  }
  layers.emplace_back(LULinear{false});
  layers.emplace_back(LULinear{true});
  spec.layers = std::move(layers);
  return spec;
}

}  // namespace nvpflow

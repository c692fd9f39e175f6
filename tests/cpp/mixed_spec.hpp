// Random flows of many kinds of layers, for tests that compare a backend with the oracle.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <random>
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

}  // namespace nvpflow

/// @file
/// The distribution of latents: what data become where the flow is right, and what samples start from.
#pragma once

#include <variant>

namespace nvpflow {

/// N(0, I).
struct NormalBase {
  /// Two are always equal: they have no fields.
  bool operator==(const NormalBase&) const = default;
};

/// Every latent is uniform on [low, high], edges included: log p = -D log(high - low) + log_det inside, -inf outside,
/// and samples never lie outside. By z it has the gradient 0; a row outside has the gradient 0 by everything. A flow
/// needs layers that leave the interval as it is.
struct UniformBase {
  double low = 0.0;   ///< finite
  double high = 1.0;  ///< finite and > low, also when both are rounded to the flow's dtype
  /// Every field is equal.
  bool operator==(const UniformBase&) const = default;
};

/// What latents are.
using Base = std::variant<NormalBase, UniformBase>;

}  // namespace nvpflow

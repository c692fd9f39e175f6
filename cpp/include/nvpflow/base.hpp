/// @file
/// The distribution of latents: what data become where the flow is right, and what samples start from.
#pragma once

#include <cstdint>
#include <string_view>
#include <variant>

#include <nvpflow/export.h>

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

/// Latents are independent and follow Student's t distribution, with the degrees of freedom exp(base.log_df) of each
/// feature: heavy tails for data that have them. 1 is Cauchy's distribution, many are nearly the normal one. Numbers
/// below 1e-18 and above 1e18 count as these.
struct StudentTBase {
  double df = 4.0;        ///< what each feature's degrees of freedom start as, > 0
  bool trainable = true;  ///< training changes them; else they stay
  /// Every field is equal.
  bool operator==(const StudentTBase&) const = default;
};

/// A mixture of normal distributions, trained with the layers: for data that fall into separate groups. Component m has
/// the weight softmax(base.logits)[m], the mean base.means[m] and the covariance F F^t. F is L diag(s) with s =
/// exp(base.log_scales[m]). L is the identity, or with `full` unit lower triangular, base.lower[m] below the diagonal.
struct MixtureBase {
  /// Of each component.
  enum class Covariance { diagonal, full };
  std::int64_t components = 4;                   ///< 1 to 1,024
  Covariance covariance = Covariance::diagonal;  ///< components D^2 is at most 2^26
  /// Every field is equal.
  bool operator==(const MixtureBase&) const = default;
};

/// @{
/// "diagonal"; the parser throws Error(invalid_argument) that lists the known names.
NVPFLOW_API std::string_view name_of(MixtureBase::Covariance covariance);
NVPFLOW_API MixtureBase::Covariance parse_covariance(std::string_view name);
/// @}

/// What latents are.
using Base = std::variant<NormalBase, UniformBase, StudentTBase, MixtureBase>;

/// Whether there are latents without a density, and so rows of log-density -infinity.
NVPFLOW_API bool is_bounded(const Base& base);

}  // namespace nvpflow

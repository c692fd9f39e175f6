// Where the components of a mixture base begin: at groups of latents. Training moves a number by about its learning
// rate a step, so that components that begin elsewhere, or as wide as all rows, take long to get there.
#pragma once

#include <cstdint>
#include <span>

#include <nvpflow/spec.hpp>

namespace nvpflow {

/// Latents that are looked at, at most.
inline constexpr std::int64_t kMixtureRows = 4096;

/// Whether the flow has a mixture whose weights and covariances are as a new flow has them.
template <class T>
bool wants_mixture_start(const FlowSpec& spec, const ParamLayout& layout, std::span<const T> parameters);

/// Sets the mixture's tensors from latents [N, D]: groups of nearest means (Lloyd 1982), which begin at rows far from
/// each other (Arthur and Vassilvitskii 2007) that `seed` draws. Rows with numbers that are not finite do not count.
/// weights [N], above 0; empty: all count alike.
template <class T>
void start_mixture(const FlowSpec& spec, const ParamLayout& layout, std::span<T> parameters, std::span<const T> latents,
                   std::span<const double> weights, std::uint64_t seed);

}  // namespace nvpflow

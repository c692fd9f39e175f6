// What couplings and the element spline layer share of splines.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include <nvpflow/spec.hpp>

#include "network.hpp"

namespace nvpflow::layers {

/// Throws Error(invalid_argument) naming the field that is wrong.
void check(const Spline& spline, DType dtype, const std::string& prefix);
/// What a network says for so many features: widths, heights, and derivatives where there are any.
std::vector<NetworkHead> heads_of(const Spline& spline, std::int64_t features);

}  // namespace nvpflow::layers

/// @file
/// The limit of log p that goes with a flow's parameters.
#pragma once

#include <limits>

namespace nvpflow {

/// A limit of log p, below which a row counts as unlikely.
struct Threshold {
  /// Nats; finite.
  double log_prob = 0;
  /// The share of rows, in [0, 1], that lay below it where it was found; NaN: unknown.
  double quantile = std::numeric_limits<double>::quiet_NaN();
};

}  // namespace nvpflow

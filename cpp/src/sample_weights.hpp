// Weights of rows: their sum, and which rows count. What they may be: SampleWeights::check.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace nvpflow {

/// In order.
double sum_of(std::span<const double> weights);

/// Weights times a power of two, so that the largest is near 1; empty where they can stay as they are, as all can whose
/// sum is not near the ends of float64: there losses times weights overflow, and the inverse of a sum does.
std::vector<double> rescaled(std::span<const double> weights);

/// The rows whose weight is above 0; empty where all are.
std::vector<std::int64_t> rows_that_count(std::span<const double> weights);

}  // namespace nvpflow

// Weights of rows: their sum, and which rows count. What they may be: SampleWeights::check.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace nvpflow {

/// In order.
double sum_of(std::span<const double> weights);

/// The rows whose weight is above 0; empty where all are.
std::vector<std::int64_t> rows_that_count(std::span<const double> weights);

}  // namespace nvpflow

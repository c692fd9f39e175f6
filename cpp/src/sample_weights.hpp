// Weights of rows: what they may be, and which rows count.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace nvpflow {

/// Throws Error(invalid_argument) where they are not one for each of so many rows, finite, at least 0 and not all 0.
void check_weights(const char* name, std::span<const double> weights, std::int64_t rows);

/// In order.
double sum_of(std::span<const double> weights);

/// The rows whose weight is above 0; empty where all are.
std::vector<std::int64_t> rows_that_count(std::span<const double> weights);

}  // namespace nvpflow

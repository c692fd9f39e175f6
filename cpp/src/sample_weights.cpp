#include "sample_weights.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <span>
#include <sstream>
#include <string>
#include <vector>

#include <nvpflow/error.hpp>
#include <nvpflow/execution.hpp>

#include "float_mode.hpp"

namespace nvpflow {

double sum_of(std::span<const double> weights) { return std::accumulate(weights.begin(), weights.end(), 0.0); }

void SampleWeights::check(const char* name, std::int64_t rows) const {
  const FloatMode mode;  // in which they are added up again
  const auto refuse = [name](const std::string& what) { throw Error(ErrorCode::invalid_argument, name + what); };
  if (static_cast<std::int64_t>(values_.size()) != rows) {
    refuse(" holds " + std::to_string(values_.size()) + " weights, expected " + std::to_string(rows) +
           ", one for each row");
  }
  for (std::size_t i = 0; i < values_.size(); ++i) {
    if (std::isfinite(values_[i]) && values_[i] >= 0) continue;
    std::ostringstream value;
    value << values_[i];
    refuse(std::string("[") + std::to_string(i) + "] is " + value.str() +
           (std::isfinite(values_[i]) ? ", expected at least 0: with a row of negative weight the loss has no minimum"
                                      : ", expected a finite number, at least 0"));
  }
  if (rows == 0) return;
  const double sum = sum_of(values_);
  if (sum == 0) refuse(" is zero for all " + std::to_string(rows) + " rows, expected a weight above 0");
  if (!std::isfinite(sum)) refuse(" adds up to infinity, expected a sum that float64 holds; divide it by its largest");
}

std::vector<double> rescaled(std::span<const double> weights) {
  constexpr double kLeastSum = 1e-150;
  const double sum = sum_of(weights);
  if (weights.empty() || (sum >= kLeastSum && sum <= 1 / kLeastSum)) return {};
  std::vector<double> scaled(weights.begin(), weights.end());
  const int exponent = std::ilogb(*std::max_element(scaled.begin(), scaled.end()));
  for (double& weight : scaled) weight = std::ldexp(weight, -exponent);
  return scaled;
}

std::vector<std::int64_t> rows_that_count(std::span<const double> weights) {
  std::vector<std::int64_t> rows;
  if (std::find(weights.begin(), weights.end(), 0.0) == weights.end()) return rows;
  for (std::size_t i = 0; i < weights.size(); ++i) {
    if (weights[i] > 0) rows.push_back(static_cast<std::int64_t>(i));
  }
  return rows;
}

}  // namespace nvpflow

// What fit and initialize_from share before there is training: checks of the data, and what layers are set from.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <string>
#include <vector>

#include <nvpflow/error.hpp>
#include <nvpflow/execution.hpp>
#include <nvpflow/spec.hpp>

#include "column_statistics.hpp"
#include "row_order.hpp"

namespace nvpflow {

/// Training rows that actnorm layers are set from, and that epochs are compared by where there is no validation data.
inline constexpr std::int64_t kSelectionRows = 1 << 16;

template <class T, class Poll>
void check_finite(const char* name, std::span<const T> values, std::int64_t features, Poll poll) {
  constexpr std::int64_t kNamed = 5;
  std::int64_t bad = 0;
  std::string which;
  const auto rows = static_cast<std::int64_t>(values.size()) / features;
  for (std::int64_t r = 0; r < rows; ++r) {
    if (r % kPollRows == 0) poll();
    const T* row = values.data() + r * features;
    if (std::all_of(row, row + features, [](T v) { return std::isfinite(v); })) continue;
    if (bad < kNamed) which += (bad == 0 ? "" : ", ") + std::to_string(r);
    ++bad;
  }
  if (bad == 0) return;
  throw Error(ErrorCode::invalid_argument, std::string(name) + " has " + std::to_string(bad) + " of " +
                                               std::to_string(rows) + " rows with NaN or infinite values (row " +
                                               which + (bad > kNamed ? ", ..." : "") +
                                               ", counted from 0); remove or repair them");
}

/// Writes the means and log standard deviations of a layer; returns how they were found.
template <class T>
std::vector<std::string> set_layer(std::span<T> layer, const std::vector<ColumnScale>& scales) {
  std::vector<std::string> how;
  for (std::size_t j = 0; j < scales.size(); ++j) {
    layer[j] = static_cast<T>(scales[j].centre);
    layer[scales.size() + j] = static_cast<T>(scales[j].log_scale);
    how.push_back(scales[j].how);
  }
  return how;
}

/// Its standard deviations.
template <class T>
std::vector<double> units_of(std::span<const T> layer) {
  std::vector<double> units;
  for (const T log_scale : layer.subspan(layer.size() / 2)) units.push_back(std::exp(static_cast<double>(log_scale)));
  return units;
}

/// Below this part of the standard deviation it does not matter what float32 does not hold of a mean.
inline constexpr double kMeanTolerance = 1.0 / 128;

/// Flow::mean_low of these means: what float32 does not hold of them, where it matters.
inline std::vector<float> mean_low_of(const std::vector<ColumnScale>& scales) {
  std::vector<float> low;
  for (const ColumnScale& scale : scales) {
    const double rest = scale.centre - static_cast<double>(static_cast<float>(scale.centre));
    const bool matters = std::abs(rest) > kMeanTolerance * std::exp(scale.log_scale);
    low.push_back(matters ? static_cast<float>(rest) : 0.0f);
  }
  return low;
}

/// One context row for each of so many rows, of the flow's type T; none where the flow has no context.
template <class T>
std::span<const T> checked_context(const FlowSpec& spec, const char* name, const Context& context, std::int64_t rows) {
  const auto refuse = [&](const std::string& what, ErrorCode code = ErrorCode::invalid_argument) {
    throw Error(code, name + what);
  };
  const std::int64_t size = spec.context_size, wanted = rows * size;
  if (context.element() == 0 && wanted == 0) return {};
  const std::string shape =
      size == 0 ? "none: the flow has no context"
                : "[" + std::to_string(rows) + ", " + std::to_string(size) + "], a row for each row of its data";
  if (context.element() == 0) refuse(" is missing, expected " + shape);
  if (size == 0 || context.size() != wanted) {
    refuse(" holds " + std::to_string(context.size()) + " elements, expected " + shape);
  }
  if (context.element() != sizeof(T)) {
    refuse(" is of another type, expected the flow's " + std::string(name_of(spec.dtype)), ErrorCode::type_mismatch);
  }
  return {static_cast<const T*>(context.data()), static_cast<std::size_t>(context.size())};
}

/// Where a flow that standardizes its context keeps the means and log standard deviations [2 C].
template <class T>
std::span<T> context_statistics(const FlowSpec& spec, const ParamLayout& layout, std::span<T> parameters) {
  const TensorInfo& mean = *layout.find("context.mean");
  return parameters.subspan(static_cast<std::size_t>(mean.offset), static_cast<std::size_t>(2 * spec.context_size));
}

/// Mean and log standard deviation of each number of the context of rows order(0) .. order(count - 1): statistics [2
/// C]. A number that never changes keeps its unit. weights: as of ColumnScales.
template <class T, class Poll>
void set_context_statistics(std::span<T> statistics, std::span<const T> context, std::span<const double> weights,
                            const RowOrder& order, std::int64_t count, Poll poll) {
  const std::size_t size = statistics.size() / 2;
  std::vector<double> means(size), squares(size);
  const auto add = [&](auto&& term, std::vector<double>& sums) {
    double total = 0;
    order.each(0, count, [&](std::int64_t i, std::int64_t at) {
      if (i % kPollRows == 0) poll();
      const double weight = weights.empty() ? 1.0 : weights[static_cast<std::size_t>(at)];
      const T* row = context.data() + at * static_cast<std::int64_t>(size);
      for (std::size_t j = 0; j < size; ++j) sums[j] += weight * term(static_cast<double>(row[j]), j);
      total += weight;
    });
    for (double& sum : sums) sum /= total;
  };
  add([](double c, std::size_t) { return c; }, means);
  add([&](double c, std::size_t j) { return (c - means[j]) * (c - means[j]); }, squares);
  for (std::size_t j = 0; j < size; ++j) {
    statistics[j] = static_cast<T>(means[j]);
    const double log_std = 0.5 * std::log(squares[j]);
    // A spread that float32 does not see is none, nor is one whose inverse T does not hold.
    const double spread = std::sqrt(squares[j]);
    const bool varies = spread > 1e-6 * std::abs(means[j]) && std::isfinite(log_std) &&
                        spread >= static_cast<double>(std::numeric_limits<T>::min());
    statistics[size + j] = varies ? static_cast<T>(log_std) : T(0);
  }
}

}  // namespace nvpflow

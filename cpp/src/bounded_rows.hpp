// Rows of data as they come out of a flow's bounds: what fit and initialize_from see in place of the rows.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <string>
#include <vector>

#include <nvpflow/error.hpp>
#include <nvpflow/layers.hpp>

#include "bounded_columns.hpp"
#include "bounds_map.hpp"
#include "column_statistics.hpp"
#include "layers/check.hpp"

namespace nvpflow {

struct BoundedRows {
  std::vector<double> rows;     // [N, D]
  std::vector<double> log_det;  // [N], of the bounds
};

/// "more than 0 and less than 1"
inline std::string describe_interval(double low, double high) {
  const BoundsMap column(low, high);
  const std::string above = column.has_low() ? "more than " + layers::text_of(low) : "";
  const std::string below = column.has_high() ? "less than " + layers::text_of(high) : "";
  return above + (column.has_both() ? " and " : "") + below;
}

/// What is wrong with a column: "column 'share' in 3 rows (0, 7, 8, counted from 0; the first holds 1, expected more
/// than 0 and less than 1)"; "" where all its finite numbers are inside.
template <class X>
std::string describe_column_outside(std::span<const X> rows, const Bounds& bounds, std::size_t column,
                                    const std::string& name) {
  constexpr std::int64_t kNamed = 5;
  const std::size_t features = bounds.low.size();
  const BoundsMap map(bounds.low[column], bounds.high[column]);
  std::int64_t outside = 0;
  std::string which;
  double first = 0;
  for (std::size_t row = 0; row < rows.size() / features; ++row) {
    const auto x = static_cast<double>(rows[row * features + column]);
    if (map.contains(x)) continue;
    if (outside == 0) first = x;
    if (outside < kNamed) which += (outside == 0 ? "" : ", ") + std::to_string(row);
    ++outside;
  }
  if (outside == 0) return "";
  return name + " in " + std::to_string(outside) + (outside == 1 ? " row (" : " rows (") + which +
         (outside > kNamed ? ", ..." : "") + ", counted from 0; the first holds " + layers::text_of(first) +
         ", expected " + describe_interval(bounds.low[column], bounds.high[column]) + ")";
}

/// Finite rows [N, D], called `name`, on the other side of the bounds. Throws Error(invalid_argument) where some lie
/// outside or on an edge. `names` of the columns may be empty.
template <class X, class Poll>
BoundedRows through_bounds(const char* name, std::span<const X> rows, const Bounds& bounds,
                           const std::vector<std::string>& names, Poll poll) {
  const std::size_t features = bounds.low.size();
  const std::size_t count = rows.size() / features;
  const BoundedColumns columns(bounds);
  BoundedRows found = {std::vector<double>(rows.size()), std::vector<double>(count)};
  for (std::size_t row = 0; row < count; ++row) {
    if (row % static_cast<std::size_t>(kPollRows) == 0) poll();
    found.log_det[row] = columns.apply(rows.data() + row * features, found.rows.data() + row * features);
  }
  const auto is_outside = [](double log_det) { return log_det == -std::numeric_limits<double>::infinity(); };
  const auto outside = std::count_if(found.log_det.begin(), found.log_det.end(), is_outside);
  if (outside == 0) return found;
  std::string bad;
  for (std::size_t j = 0; j < features; ++j) {
    const std::string label = "column " + (names.empty() ? std::to_string(j + 1) : "'" + names[j] + "'");
    const std::string one = describe_column_outside(rows, bounds, j, label);
    if (!one.empty()) bad += (bad.empty() ? "" : "; ") + one;
  }
  throw Error(ErrorCode::invalid_argument,
              std::string(name) + " has " + std::to_string(outside) + " of " + std::to_string(count) +
                  " rows outside the bounds or on their edge, where a density is 0: " + bad +
                  ". Remove or repair them, or make the bounds wider; where many rows hold the edge itself, give "
                  "them a model of their own");
}

}  // namespace nvpflow

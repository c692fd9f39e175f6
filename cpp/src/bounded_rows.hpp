// Rows of data as they come out of a flow's bounds, with noise on discrete columns: what fit and initialize_from see in
// place of the rows.
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
#include <nvpflow/spec.hpp>

#include "bounded_columns.hpp"
#include "bounds_map.hpp"
#include "column_statistics.hpp"
#include "layers/check.hpp"
#include "random.hpp"

namespace nvpflow {

struct BoundedRows {
  std::vector<double> rows;     // [N, D]
  std::vector<double> log_det;  // [N], of the bounds
};

/// Which noise discrete columns get.
struct Dither {
  std::uint64_t seed;
  std::uint32_t stream;
  std::uint64_t first_row = 0;  // what rows are counted from
};

/// Uniform in (-1/2, 1/2), a function of its arguments. Of 24 bits: with an integer of float32 it makes a float64.
inline double noise_of(const Dither& dither, std::size_t row, std::size_t column) {
  const std::uint64_t at = dither.first_row + static_cast<std::uint64_t>(row);
  const std::uint32_t counter[4] = {static_cast<std::uint32_t>(at), static_cast<std::uint32_t>(at >> 32),
                                    static_cast<std::uint32_t>(column), dither.stream};
  std::uint32_t words[4];
  philox4x32(dither.seed, counter, words);
  return (static_cast<double>(words[0] >> 8) + 0.5) * 0x1p-24 - 0.5;
}

/// "more than 0 and less than 1"
inline std::string describe_interval(double low, double high) {
  const BoundsMap column(low, high);
  const std::string above = column.has_low() ? "more than " + layers::text_of(low) : "";
  const std::string below = column.has_high() ? "less than " + layers::text_of(high) : "";
  return above + (column.has_both() ? " and " : "") + below;
}

/// What is wrong with a column: "column 'share' in 3 rows (0, 7, 8, counted from 0; the first holds 1, expected more
/// than 0 and less than 1)"; "" where all its numbers are good.
template <class X, class IsGood>
std::string describe_bad_rows(std::span<const X> rows, std::size_t features, std::size_t column,
                              const std::string& label, const std::string& expected, IsGood&& is_good) {
  constexpr std::int64_t kNamed = 5;
  std::int64_t bad = 0;
  std::string which;
  double first = 0;
  for (std::size_t row = 0; row < rows.size() / features; ++row) {
    const auto x = static_cast<double>(rows[row * features + column]);
    if (is_good(x)) continue;
    if (bad == 0) first = x;
    if (bad < kNamed) which += (bad == 0 ? "" : ", ") + std::to_string(row);
    ++bad;
  }
  if (bad == 0) return "";
  return label + " in " + std::to_string(bad) + (bad == 1 ? " row (" : " rows (") + which +
         (bad > kNamed ? ", ..." : "") + ", counted from 0; the first holds " + layers::text_of(first) + ", expected " +
         expected + ")";
}

/// describe(column, "column 'share'") of all columns that it says something of, or "".
template <class Describe>
std::string describe_columns(std::size_t features, const std::vector<std::string>& names, Describe&& describe) {
  std::string all;
  for (std::size_t j = 0; j < features; ++j) {
    const std::string one = describe(j, "column " + (names.empty() ? std::to_string(j + 1) : "'" + names[j] + "'"));
    if (!one.empty()) all += (all.empty() ? "" : "; ") + one;
  }
  return all;
}

/// The largest integer of a discrete column. Noise of less than 1 keeps its digits beside it: in float64, or in a flow
/// that gets rows as float32.
inline double largest_integer(const FlowSpec& spec) {
  if (spec.dtype == DType::float64) return 0x1p40;
  return takes_float64_rows(spec) ? 0x1p24 : 0x1p16;
}

/// Throws Error(invalid_argument) where discrete columns hold other numbers than integers, or too large ones.
template <class X>
void require_integers(const char* name, std::span<const X> rows, const FlowSpec& spec,
                      const std::vector<std::string>& names) {
  const std::vector<std::int64_t>& discrete = spec.bounds()->discrete;
  const double most = largest_integer(spec);
  const std::string expected = "an integer of at most " + layers::text_of(most) + " in size";
  const std::string bad =
      describe_columns(spec.bounds()->low.size(), names, [&](std::size_t j, const std::string& label) {
        if (!std::binary_search(discrete.begin(), discrete.end(), static_cast<std::int64_t>(j))) return std::string();
        return describe_bad_rows(rows, spec.bounds()->low.size(), j, label, expected,
                                 [&](double x) { return std::nearbyint(x) == x && std::abs(x) <= most; });
      });
  if (bad.empty()) return;
  throw Error(ErrorCode::invalid_argument, std::string(name) + " has numbers that a discrete column cannot hold: " +
                                               bad + ". Round them, or leave the column out of the discrete ones");
}

/// Finite rows [N, D], called `name`, with noise on discrete columns, on the other side of the bounds of `spec`. Throws
/// Error(invalid_argument) where some lie outside or on an edge, or are no integers. `names` of the columns may be
/// empty.
template <class X, class Poll>
BoundedRows through_bounds(const char* name, std::span<const X> rows, const FlowSpec& spec,
                           const std::vector<std::string>& names, const Dither& dither, Poll poll) {
  require_integers(name, rows, spec, names);
  const Bounds& bounds = *spec.bounds();
  const std::size_t features = bounds.low.size();
  const std::size_t count = rows.size() / features;
  const BoundedColumns columns(bounds);
  BoundedRows found = {std::vector<double>(rows.begin(), rows.end()), std::vector<double>(count)};
  std::size_t outside = 0;
  for (std::size_t row = 0; row < count; ++row) {
    if (row % static_cast<std::size_t>(kPollRows) == 0) poll();
    double* const values = found.rows.data() + row * features;
    for (const std::size_t j : columns.discrete()) {
      const double integer = values[j], moved = integer + noise_of(dither, row, j);
      if (std::abs(moved - integer) < 0.5) values[j] = moved;  // not where it was rounded onto the cell's edge
    }
    found.log_det[row] = columns.apply(values, values, Holding::numbers);
    if (found.log_det[row] == -std::numeric_limits<double>::infinity()) ++outside;
  }
  if (outside == 0) return found;
  const std::string bad = describe_columns(features, names, [&](std::size_t j, const std::string& label) {
    return describe_bad_rows(rows, features, j, label, describe_interval(bounds.low[j], bounds.high[j]),
                             [&](double x) { return columns[j].contains(x); });
  });
  throw Error(ErrorCode::invalid_argument,
              std::string(name) + " has " + std::to_string(outside) + " of " + std::to_string(count) +
                  " rows outside the bounds or on their edge, where a density is 0: " + bad +
                  ". Remove or repair them, or make the bounds wider; where many rows hold the edge itself, give "
                  "them a model of their own");
}

}  // namespace nvpflow

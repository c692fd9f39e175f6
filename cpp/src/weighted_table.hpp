// A table to train on, without the rows that count for nothing.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <nvpflow/error.hpp>
#include <nvpflow/execution.hpp>
#include <nvpflow/spec.hpp>

#include "fit_start.hpp"
#include "sample_weights.hpp"

namespace nvpflow {

/// Rows, their contexts and their weights: the caller's own, or copies of those of weight above 0 where some have 0,
/// and of weights that are rescaled. Without weights it looks at nothing. T: of the flow, and so of contexts; X: of the
/// rows.
template <class T, class X>
class WeightedTable {
 public:
  struct Names {
    const char *rows, *context, *weights;
  };

  /// is_part: others have the rest of the table, so that no row of this one need count.
  WeightedTable(const FlowSpec& spec, const Names& names, std::span<const X> rows, const Context& context,
                std::span<const double> weights, bool is_part = false)
      : rows_(rows), context_(context), weights_(weights) {
    if (weights.empty()) return;
    const auto features = static_cast<std::size_t>(spec.input_size);
    const auto count = static_cast<std::int64_t>(rows.size() / features);
    const bool none_counts = is_part && static_cast<std::int64_t>(weights.size()) == count &&
                             std::all_of(weights.begin(), weights.end(), [](double weight) { return weight == 0; });
    if (!none_counts) {
      SampleWeights(weights).check(names.weights, count);
      own_weights_ = rescaled(weights);
    }
    if (is_part && !own_weights_.empty()) {
      throw Error(ErrorCode::invalid_argument, std::string(names.weights) +
                                                   " adds up to less than 1e-150 or more than 1e150 in one process, "
                                                   "expected a sum between; divide the weights of all by the largest");
    }
    if (!own_weights_.empty()) weights_ = own_weights_;
    std::vector<std::int64_t> counting = rows_that_count(weights_);
    if (counting.empty() && !none_counts) return;
    const std::span<const T> contexts = checked_context<T>(spec, names.context, context, count);
    check_finite(names.rows, rows, spec.input_size, [] {});  // all of them, by the numbers that the caller knows
    take(rows, features, counting, own_rows_);
    if (spec.context_size > 0) {
      check_finite(names.context, contexts, spec.context_size, [] {});
      take(contexts, static_cast<std::size_t>(spec.context_size), counting, own_context_);
      context_ = Context(own_context_);
    }
    std::vector<double> of_counting;
    take(weights_, 1, counting, of_counting);
    own_weights_ = std::move(of_counting);
    rows_ = own_rows_, weights_ = own_weights_;
    counting_ = std::move(counting);
  }
  WeightedTable(const WeightedTable&) = delete;
  WeightedTable& operator=(const WeightedTable&) = delete;

  std::span<const X> rows() const { return rows_; }
  const Context& context() const { return context_; }
  std::span<const double> weights() const { return weights_; }
  /// How many rows are left of the first `count` that were given.
  std::int64_t left_of_first(std::int64_t count) const {
    if (!counting_) return count;
    return std::lower_bound(counting_->begin(), counting_->end(), count) - counting_->begin();
  }

 private:
  template <class V>
  static void take(std::span<const V> from, std::size_t width, const std::vector<std::int64_t>& which,
                   std::vector<V>& to) {
    for (const std::int64_t row : which) {
      const auto begin = from.begin() + static_cast<std::ptrdiff_t>(static_cast<std::size_t>(row) * width);
      to.insert(to.end(), begin, begin + static_cast<std::ptrdiff_t>(width));
    }
  }

  std::span<const X> rows_;
  Context context_;
  std::span<const double> weights_;
  std::vector<X> own_rows_;
  std::vector<T> own_context_;
  std::vector<double> own_weights_;
  std::optional<std::vector<std::int64_t>> counting_;  // the rows that are left; none: all
};

}  // namespace nvpflow

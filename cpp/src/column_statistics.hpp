// Centre and scale of every column, for a standardize layer; the same for any number of threads.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <nvpflow/base.hpp>
#include <nvpflow/error.hpp>
#include <nvpflow/flow.hpp>
#include <nvpflow/spec.hpp>

#include "layers/layer.hpp"
#include "row_order.hpp"

namespace nvpflow {

/// Rows that a pass over the data goes through between two looks at the observer.
inline constexpr std::int64_t kPollRows = 1 << 16;
/// Rows between two looks at whether all columns have varied.
inline constexpr std::int64_t kFirstRows = 1 << 10;
/// Rows that quantiles are taken from: every k-th where there are more. Bounds memory, and errs by a thousandth of the
/// standard deviation.
inline constexpr std::int64_t kQuantileRows = 1 << 20;
/// Where the standard deviation is so many times that of a normal distribution with the column's quartiles, far rows
/// decide it, and Statistics::automatic takes the quartiles.
inline constexpr double kDisagreement = 10;
/// ... and where the farthest row is so many times further from the median than 98 % of the rows: a column that is
/// nearly always zero and now and then large has a large standard deviation, too, but no outliers.
inline constexpr double kBeyond = 5;

/// A central range of a column, and its width in standard deviations of a normal distribution.
struct CentralRange {
  double low, high, normal_width;
  const char* name;
};
/// The interquartile range, and the ranges for a column of which half of the values or more are equal.
inline constexpr CentralRange kCentralRanges[] = {{0.25, 0.75, 1.3489795003921636, "robust"},
                                                  {0.05, 0.95, 3.2897072539029446, "robust (5 to 95 %)"},
                                                  {0.01, 0.99, 4.6526957480816815, "robust (1 to 99 %)"}};

/// What is asked for, of a flow of this base: Student's t distribution need not have a standard deviation.
inline Statistics statistics_for(const Base& base, Statistics asked) {
  const bool robust = asked == Statistics::automatic && layers::facts_of(base).has_heavy_tails;
  return robust ? Statistics::robust : asked;
}

/// One column's centre and logarithm of its scale, and how they were found: "mean" or a range's name.
struct ColumnScale {
  double centre, log_scale;
  std::string how;
};

/// Numbers, and what each counts for; no weights: all count alike.
template <class T>
struct Sample {
  std::vector<T> values;
  std::vector<double> weights;

  void clear() { values.clear(), weights.clear(); }
};

/// Quantiles of numbers, linear between them: NumPy's default, or, by weight, with steps as wide as the mean weight of
/// the two numbers that a step is between.
template <class T>
class Quantiles {
 public:
  /// Sorts the sample, which must outlive this.
  explicit Quantiles(Sample<T>& sample) : values_(sample.values) {
    if (sample.weights.empty()) {
      std::sort(sample.values.begin(), sample.values.end());
    } else {
      sort_with_places(sample);
    }
  }

  double operator()(double q) const {
    const std::size_t last = values_.size() - 1;
    if (places_.empty()) {
      const double place = q * static_cast<double>(last);
      const auto below = static_cast<std::size_t>(place);
      return between(below, place - static_cast<double>(below));
    }
    const double place = q * places_.back();
    const auto above = std::upper_bound(places_.begin(), places_.end(), place);
    if (above == places_.end()) return static_cast<double>(values_[last]);
    const auto below = static_cast<std::size_t>(above - places_.begin()) - 1;
    return between(below, (place - places_[below]) / (places_[below + 1] - places_[below]));
  }

 private:
  double between(std::size_t below, double share) const {
    const auto low = static_cast<double>(values_[below]);
    const auto high = static_cast<double>(values_[std::min(below + 1, values_.size() - 1)]);
    return low + (high - low) * share;
  }

  void sort_with_places(Sample<T>& sample) {
    std::vector<std::pair<T, double>> pairs;
    for (std::size_t i = 0; i < sample.values.size(); ++i) pairs.emplace_back(sample.values[i], sample.weights[i]);
    std::sort(pairs.begin(), pairs.end());
    double place = 0;
    for (std::size_t i = 0; i < pairs.size(); ++i) {
      if (i > 0) place += 0.5 * (pairs[i - 1].second + pairs[i].second);
      places_.push_back(place);
      sample.values[i] = pairs[i].first;
    }
  }

  const std::vector<T>& values_;
  std::vector<double> places_;
};

/// Median and the narrowest central range that is not empty; `how` is empty if all ranges are.
template <class T>
ColumnScale robust_scale(const Quantiles<T>& quantile) {
  for (const CentralRange& range : kCentralRanges) {
    const double width = quantile(range.high) - quantile(range.low);
    if (!(width > 0) || !std::isfinite(width)) continue;
    return {quantile(0.5), std::log(width / range.normal_width), range.name};
  }
  return {0, 0, ""};
}

/// The rows order(0) .. order(count - 1) of x [N, D], column by column. poll() is called often enough for a person.
template <class T, class Poll>
class ColumnScales {
 public:
  /// dtype: of the flow, which holds the scales. `names` of the columns are for messages, and may be empty. weights:
  /// above 0, of the rows of x; empty: all count alike.
  ColumnScales(DType dtype, std::span<const T> x, std::span<const double> weights, std::vector<std::string> names,
               std::int64_t features, const RowOrder& order, std::int64_t count, Poll poll)
      : is_narrow_(dtype == DType::float32),
        x_(x),
        weights_(weights),
        names_(std::move(names)),
        width_(static_cast<std::size_t>(features)),
        order_(order),
        count_(count),
        poll_(poll) {}

  /// Throws Error(invalid_argument), naming the columns, where one is constant; reads rows until all have varied.
  void require_variation() {
    take_extremes();
    refuse_constant();
  }

  /// Throws Error(invalid_argument), naming the columns, where one is constant or has no finite variance.
  std::vector<ColumnScale> take(Statistics statistics) {
    take_moments();
    if (statistics != Statistics::mean) take_quantiles(statistics == Statistics::robust);
    const auto constant = [this](std::size_t j) { return low_[j] == high_[j]; };
    const auto wild = [this](std::size_t j) {
      return !std::isfinite(rounded(scales_[j].log_scale)) || !std::isfinite(rounded(scales_[j].centre));
    };
    const auto narrow = [&](std::size_t j) {  // its reciprocal would be infinite
      if (constant(j) || wild(j)) return false;
      const double largest =
          is_narrow_ ? double{std::numeric_limits<float>::max()} : std::numeric_limits<double>::max();
      return std::exp(-rounded(scales_[j].log_scale)) > largest / 2;
    };
    const std::string dtype = is_narrow_ ? "float32" : "float64";
    refuse("x has a standard deviation too small for " + dtype + " in ",
           ", so that it cannot be standardized; rescale it", narrow);
    refuse_constant();
    const bool both = is_narrow_ && sizeof(T) == 8;  // float64 rows of a float32 flow, which has to hold their mean
    refuse(both ? "x has a mean or a variance beyond float32 in " : "x has a variance beyond float64 in ",
           ", so that it cannot be standardized; rescale it", [&](std::size_t j) { return !constant(j) && wild(j); });
    return std::move(scales_);
  }

 private:
  /// As the flow holds it.
  double rounded(double value) const { return is_narrow_ ? static_cast<double>(static_cast<float>(value)) : value; }

  /// f(i, row, weight) for every row.
  template <class F>
  void each_row(F&& f) {
    order_.each(0, count_, [&](std::int64_t i, std::int64_t row) {
      if (i % kPollRows == 0) poll_();
      const auto at = static_cast<std::size_t>(row);
      f(i, x_.data() + at * width_, weights_.empty() ? 1.0 : weights_[at]);
    });
  }

  double sum_of_weights() {
    if (weights_.empty()) return static_cast<double>(count_);
    double sum = 0;
    each_row([&](std::int64_t, const T*, double weight) { sum += weight; });
    return sum;
  }

  void refuse_constant() const {
    refuse("x is constant in ", ": a column without variation has no density; remove it",
           [this](std::size_t j) { return low_[j] == high_[j]; });
  }

  /// Least and largest number of every column, of the first rows in which all have varied.
  void take_extremes() {
    low_.assign(width_, std::numeric_limits<T>::max());
    high_.assign(width_, std::numeric_limits<T>::lowest());
    for (std::int64_t first = 0; first < count_ && !vary(); first += kFirstRows) {
      poll_();
      order_.each(first, std::min(count_ - first, kFirstRows), [&](std::int64_t, std::int64_t row) {
        const T* values = x_.data() + static_cast<std::size_t>(row) * width_;
        for (std::size_t j = 0; j < width_; ++j) {
          low_[j] = std::min(low_[j], values[j]);
          high_[j] = std::max(high_[j], values[j]);
        }
      });
    }
  }

  bool vary() const {
    for (std::size_t j = 0; j < width_; ++j) {
      if (!(low_[j] < high_[j])) return false;
    }
    return true;
  }

  void take_moments() {
    std::vector<double> centre(width_), square(width_);
    low_.assign(width_, std::numeric_limits<T>::max());
    high_.assign(width_, std::numeric_limits<T>::lowest());
    const double n = sum_of_weights();
    each_row([&](std::int64_t, const T* row, double weight) {
      for (std::size_t j = 0; j < width_; ++j) {
        centre[j] += weight * static_cast<double>(row[j]) / n;
        low_[j] = std::min(low_[j], row[j]);
        high_[j] = std::max(high_[j], row[j]);
      }
    });
    each_row([&](std::int64_t, const T* row, double weight) {
      for (std::size_t j = 0; j < width_; ++j) {
        square[j] += weight * std::pow(static_cast<double>(row[j]) - centre[j], 2) / n;
      }
    });
    for (std::size_t j = 0; j < width_; ++j) scales_.push_back({centre[j], 0.5 * std::log(square[j]), "mean"});
  }

  /// Replaces the scales of all columns, or of those whose two measures disagree.
  void take_quantiles(bool all) {
    const std::int64_t stride = (count_ + kQuantileRows - 1) / kQuantileRows;
    // A group of columns at once: each pass over the rows reads whole cache lines.
    const std::size_t group = 64 / sizeof(T);
    std::vector<Sample<T>> columns(std::min(group, width_));
    for (std::size_t first = 0; first < width_; first += group) {
      const std::size_t size = std::min(group, width_ - first);
      for (Sample<T>& column : columns) column.clear();
      each_row([&](std::int64_t i, const T* row, double weight) {
        for (std::size_t j = 0; i % stride == 0 && j < size; ++j) {
          columns[j].values.push_back(row[first + j]);
          if (!weights_.empty()) columns[j].weights.push_back(weight);
        }
      });
      for (std::size_t j = 0; j < size; ++j) {
        poll_();
        const Quantiles<T> quantile(columns[j]);
        ColumnScale robust = robust_scale(quantile);
        ColumnScale& scale = scales_[first + j];
        const bool disagree = scale.log_scale - robust.log_scale >= std::log(kDisagreement) &&
                              has_outliers(quantile, robust.centre, first + j);
        if (!robust.how.empty() && (all || disagree)) scale = std::move(robust);
      }
    }
  }

  bool has_outliers(const Quantiles<T>& quantile, double median, std::size_t j) const {
    const double farthest = std::max(static_cast<double>(high_[j]) - median, median - static_cast<double>(low_[j]));
    const double ordinary = std::max(quantile(0.99) - median, median - quantile(0.01));
    return farthest > kBeyond * ordinary;
  }

  template <class Bad>
  void refuse(const std::string& before, const char* after, Bad&& bad) const {
    std::string columns;
    for (std::size_t j = 0; j < width_; ++j) {
      if (bad(j)) columns += (columns.empty() ? "" : ", ") + column(j);
    }
    if (!columns.empty()) throw Error(ErrorCode::invalid_argument, before + columns + after);
  }

  /// A column's name in messages, or its number, counted from 1.
  std::string column(std::size_t j) const {
    return "column " + (names_.empty() ? std::to_string(j + 1) : "'" + names_[j] + "'");
  }

  bool is_narrow_;
  std::span<const T> x_;
  std::span<const double> weights_;
  std::vector<std::string> names_;
  std::size_t width_;
  const RowOrder& order_;
  std::int64_t count_;
  Poll poll_;
  std::vector<T> low_, high_;
  std::vector<ColumnScale> scales_;
};

}  // namespace nvpflow

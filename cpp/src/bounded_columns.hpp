// All columns of rows, through their bounds and back, row by row.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <vector>

#include <nvpflow/layers.hpp>

#include "bounds_map.hpp"

namespace nvpflow {

/// What rows may hold: any number inside the bounds, or in discrete columns integers only, which have a log p.
enum class Holding { numbers, integers };

/// A row outside of its bounds, or on an edge, becomes zeros, with the log-determinant -infinity. One with NaN or
/// infinity keeps it, and its log-determinant is NaN. X: of rows of data, Y: of rows behind the bounds.
class BoundedColumns {
 public:
  explicit BoundedColumns(const Bounds& bounds) : discrete_(bounds.discrete.begin(), bounds.discrete.end()) {
    for (std::size_t j = 0; j < bounds.low.size(); ++j) columns_.emplace_back(bounds.low[j], bounds.high[j]);
  }

  std::size_t size() const { return columns_.size(); }
  const BoundsMap& operator[](std::size_t column) const { return columns_[column]; }
  /// Those that hold integers, ascending.
  const std::vector<std::size_t>& discrete() const { return discrete_; }

  /// y [D]; returns the log-determinant. Finite numbers stay finite: those too large for Y become its largest.
  template <class X, class Y>
  double apply(const X* x, Y* y, Holding holding) const {
    constexpr double kLargest = std::numeric_limits<Y>::max();
    double log_det = 0;
    bool inside = holding == Holding::numbers || holds_integers(x), finite = true;
    for (std::size_t j = 0; j < columns_.size(); ++j) {
      const auto from = static_cast<double>(x[j]);
      finite = finite && std::isfinite(from);
      BoundsMap::Value mapped = {0, 0};
      if (columns_[j].contains(from)) {
        mapped = columns_[j].forward(from);
      } else {
        inside = false;
      }
      log_det += mapped.log_slope;
      const double value = mapped.value > kLargest ? kLargest : mapped.value < -kLargest ? -kLargest : mapped.value;
      y[j] = static_cast<Y>(value + 0.0 * from);
    }
    if (!finite) return std::numeric_limits<double>::quiet_NaN();
    if (inside) return log_det;
    for (std::size_t j = 0; j < columns_.size(); ++j) y[j] = Y(0);
    return -std::numeric_limits<double>::infinity();
  }

  /// x [D]; returns the log-determinant of this direction.
  template <class X, class Y>
  double undo(const Y* y, X* x) const {
    double log_det = 0;
    for (std::size_t j = 0; j < columns_.size(); ++j) {
      const BoundsMap::Value mapped = columns_[j].inverse(static_cast<double>(y[j]));
      x[j] = columns_[j].is_free() ? static_cast<X>(mapped.value) : columns_[j].inside(X()).nearest(mapped.value);
      log_det += mapped.log_slope;
    }
    return log_det;
  }

  /// The discrete columns of a row become integers; there is no -0.
  template <class X>
  void round(X* x) const {
    for (const std::size_t j : discrete_) x[j] = std::nearbyint(x[j]) + X(0);
  }

  /// From the cotangents g [D] of what apply() gives to those of x, in place. Nothing moves around a row outside.
  template <class X, class T>
  void apply_backward(const X* x, Holding holding, double g_log_det, T* g) const {
    bool inside = holding == Holding::numbers || holds_integers(x), finite = true;
    for (std::size_t j = 0; j < columns_.size(); ++j) {
      const auto from = static_cast<double>(x[j]);
      finite = finite && std::isfinite(from);
      inside = inside && columns_[j].contains(from);
    }
    for (std::size_t j = 0; j < columns_.size(); ++j) {
      if (!finite || !inside) {
        g[j] = finite ? T(0) : std::numeric_limits<T>::quiet_NaN();
        continue;
      }
      const BoundsMap::Slopes slopes = columns_[j].forward_slopes(static_cast<double>(x[j]));
      g[j] = static_cast<T>(static_cast<double>(g[j]) * slopes.of_value + g_log_det * slopes.of_log_slope);
    }
  }

  /// From the cotangents of x (null: zero) to those of y.
  template <class Y, class T>
  void undo_backward(const Y* y, const T* g_x, double g_log_det, T* g_y) const {
    for (std::size_t j = 0; j < columns_.size(); ++j) {
      const BoundsMap::Slopes slopes = columns_[j].inverse_slopes(static_cast<double>(y[j]));
      const double of_value = g_x == nullptr ? 0 : static_cast<double>(g_x[j]) * slopes.of_value;
      g_y[j] = static_cast<T>(of_value + g_log_det * slopes.of_log_slope);
    }
  }

 private:
  template <class X>
  bool holds_integers(const X* x) const {
    return std::all_of(discrete_.begin(), discrete_.end(), [&](std::size_t j) { return std::nearbyint(x[j]) == x[j]; });
  }

  std::vector<BoundsMap> columns_;
  std::vector<std::size_t> discrete_;
};

}  // namespace nvpflow

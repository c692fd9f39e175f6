// One column with bounds, to the whole line and back, in float64; its formulas are those of Bounds in
// <nvpflow/layers.hpp>. Whatever lies near an edge is computed from its distance to that edge: nothing cancels.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

namespace nvpflow {

/// The numbers of X between two edges, neither of which is one of them.
template <class X>
struct Inside {
  X lowest = std::numeric_limits<X>::lowest(), highest = std::numeric_limits<X>::max();

  Inside(double low, double high) {
    constexpr X kInfinity = std::numeric_limits<X>::infinity();
    const auto least = static_cast<double>(lowest), most = static_cast<double>(highest);
    if (std::isfinite(low)) {
      lowest = static_cast<X>(std::clamp(low, least, most));
      if (!(static_cast<double>(lowest) > low)) lowest = std::nextafter(lowest, kInfinity);
    }
    if (std::isfinite(high)) {
      highest = static_cast<X>(std::clamp(high, least, most));
      if (!(static_cast<double>(highest) < high)) highest = std::nextafter(highest, -kInfinity);
    }
  }

  /// The nearest one; NaN stays NaN.
  X nearest(double x) const {
    const auto least = static_cast<double>(lowest), most = static_cast<double>(highest);
    return static_cast<X>(x < least ? least : x > most ? most : x);
  }
};

/// low, high: -infinity and infinity where there is none.
class BoundsMap {
 public:
  BoundsMap(double low, double high)
      : low_(low),
        high_(high),
        width_(has_both() ? high - low : 1),
        log_width_(std::log(width_)),
        inside32_(low, high),
        inside64_(low, high) {}

  /// What comes out for a number, with the log-derivative there.
  struct Value {
    double value, log_slope;
  };
  /// The derivatives of both.
  struct Slopes {
    double of_value, of_log_slope;
  };

  bool has_low() const { return std::isfinite(low_); }
  bool has_high() const { return std::isfinite(high_); }
  bool has_both() const { return has_low() && has_high(); }
  bool is_free() const { return !has_low() && !has_high(); }

  /// Neither outside nor on an edge; false for NaN.
  bool contains(double x) const { return x > low_ && x < high_; }
  const Inside<float>& inside(float) const { return inside32_; }
  const Inside<double>& inside(double) const { return inside64_; }

  /// To the whole line, of a number that the interval contains.
  Value forward(double x) const {
    if (has_both()) {
      const double u = std::log(x - low_), v = std::log(high_ - x);
      return {u - v, log_width_ - u - v};
    }
    if (is_free()) return {x, 0};
    const double distance = std::log(distance_of(x));
    return {has_low() ? distance : -distance, -distance};
  }

  Slopes forward_slopes(double x) const {
    if (has_both()) {
      const double u = reciprocal(x - low_), v = reciprocal(high_ - x);
      return {u + v, v - u};
    }
    if (is_free()) return {1, 0};
    const double slope = reciprocal(distance_of(x));
    return {slope, has_low() ? -slope : slope};
  }

  /// Back; what is next to an edge may be rounded onto it (Inside::nearest). y may be infinite.
  Value inverse(double y) const {
    if (has_both()) {
      const double e = std::exp(-std::abs(y)), share = e / (1 + e);  // of the width, from the nearer edge
      return {y < 0 ? low_ + width_ * share : high_ - width_ * share, log_width_ - std::abs(y) - 2 * std::log1p(e)};
    }
    if (has_low()) return {low_ + std::exp(y), y};
    if (has_high()) return {high_ - std::exp(-y), -y};
    return {y, 0};
  }

  Slopes inverse_slopes(double y) const {
    if (has_both()) {
      const double e = std::exp(-std::abs(y)), share = e / (1 + e);
      return {width_ * share / (1 + e), (y < 0 ? 1 - e : e - 1) / (1 + e)};
    }
    if (has_low()) return {std::exp(y), 1};
    if (has_high()) return {std::exp(-y), -1};
    return {1, 0};
  }

 private:
  /// From the only edge; finite.
  double distance_of(double x) const {
    return std::min(has_low() ? x - low_ : high_ - x, std::numeric_limits<double>::max());
  }

  /// Finite, so that two of them never give NaN.
  static double reciprocal(double distance) { return 1 / std::max(distance, std::numeric_limits<double>::min()); }

  double low_, high_, width_, log_width_;
  Inside<float> inside32_;
  Inside<double> inside64_;
};

}  // namespace nvpflow

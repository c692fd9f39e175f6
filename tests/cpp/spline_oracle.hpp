// A rational-quadratic spline in long double, from the formulas of Durkan et al., Neural Spline Flows, 2019, section 3
// and appendix A.1: knots by cumulated softmax, a search, the quadratic's root.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <utility>
#include <vector>

#include <nvpflow/layers.hpp>

namespace oracle {

using Long = long double;

/// What a spline makes of a number, and the logarithm of its derivative there.
struct SplineResult {
  Long value, log_derivative;
};

class Spline {
 public:
  /// raw: what the network says for one feature: widths, heights, slopes.
  Spline(const nvpflow::Spline& spline, const std::vector<double>& raw)
      : spline_(spline),
        x_(knots(raw, 0, spline.min_bin_width)),
        y_(knots(raw, static_cast<std::size_t>(spline.num_bins), spline.min_bin_height)),
        slope_(x_.size(), Long{1}) {
    const bool free = spline.boundary == nvpflow::Spline::Boundary::free;
    const std::size_t first = free ? 0 : 1;
    for (std::size_t i = 0; i < static_cast<std::size_t>(spline.num_slopes()); ++i) {
      slope_[first + i] = slope(raw[2 * static_cast<std::size_t>(spline.num_bins) + i]);
    }
  }

  SplineResult forward(Long x) const {
    if (!(x >= x_.front() && x <= x_.back())) return tail(x, false);
    const std::size_t k = bin_of(x_, x);
    const Long xi = (x - x_[k]) / (x_[k + 1] - x_[k]), s = mean_slope(k), c = slope_[k] + slope_[k + 1] - 2 * s;
    const Long height = y_[k + 1] - y_[k];
    const Long value = y_[k] + height * (s * xi * xi + slope_[k] * xi * (1 - xi)) / (s + c * xi * (1 - xi));
    return {value, log_derivative(k, xi)};
  }

  SplineResult inverse(Long y) const {
    if (!(y >= y_.front() && y <= y_.back())) return tail(y, true);
    const std::size_t k = bin_of(y_, y);
    const Long s = mean_slope(k), from = y - y_[k], height = y_[k + 1] - y_[k];
    const Long sum = from * (slope_[k] + slope_[k + 1] - 2 * s);
    const Long a = height * (s - slope_[k]) + sum, b = height * slope_[k] - sum, c = -s * from;
    const Long xi = 2 * c / (-b - std::sqrt(b * b - 4 * a * c));
    return {x_[k] + xi * (x_[k + 1] - x_[k]), -log_derivative(k, xi)};
  }

 private:
  std::vector<Long> knots(const std::vector<double>& raw, std::size_t first, Long least) const {
    const auto bins = static_cast<std::size_t>(spline_.num_bins);
    std::vector<Long> size;
    for (std::size_t i = first; i < first + bins; ++i) {
      const Long u = raw[i];
      size.push_back(std::isinf(spline_.size_bound) ? u : u / (1 + std::fabs(u / spline_.size_bound)));
    }
    const Long most = *std::max_element(size.begin(), size.end());
    Long sum = 0;
    for (Long& u : size) sum += u = std::exp(u - most);
    const Long lower = spline_.lower, span = static_cast<Long>(spline_.upper) - lower;
    std::vector<Long> at = {lower};
    for (const Long e : size) {
      at.push_back(at.back() + span * (least + (1 - static_cast<Long>(bins) * least) * e / sum));
    }
    at.back() = spline_.upper;
    return at;
  }

  Long slope(Long u) const {
    const nvpflow::KnotSlope& g = spline_.derivative;
    if (g.function == nvpflow::KnotSlope::Function::exp) {
      return spline_.min_derivative + std::exp(u / (1 + std::fabs(u / g.bound)));
    }
    u += g.offset;
    return spline_.min_derivative + g.gain * (std::fmax(u, Long{0}) + std::log1p(std::exp(-std::fabs(u))));
  }

  static std::size_t bin_of(const std::vector<Long>& knots, Long at) {
    std::size_t k = 0;
    while (k + 2 < knots.size() && at >= knots[k + 1]) ++k;
    return k;
  }

  Long mean_slope(std::size_t k) const { return (y_[k + 1] - y_[k]) / (x_[k + 1] - x_[k]); }

  Long log_derivative(std::size_t k, Long xi) const {
    const Long s = mean_slope(k), den = s + (slope_[k] + slope_[k + 1] - 2 * s) * xi * (1 - xi);
    const Long up = slope_[k + 1] * xi * xi + 2 * s * xi * (1 - xi) + slope_[k] * (1 - xi) * (1 - xi);
    return std::log(s * s * up / (den * den));
  }

  SplineResult tail(Long at, bool inverse) const {
    const bool low = at < x_.front();
    const Long edge = low ? x_.front() : x_.back();
    const Long d = spline_.tails == nvpflow::Spline::Tails::slope ? (low ? slope_.front() : slope_.back()) : Long{1};
    return {edge + (inverse ? (at - edge) / d : (at - edge) * d), inverse ? -std::log(d) : std::log(d)};
  }

  nvpflow::Spline spline_;
  std::vector<Long> x_, y_, slope_;
};

}  // namespace oracle

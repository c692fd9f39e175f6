// What a Student t distribution is normalized by, in double: its logarithm and the derivative of that. Once for each
// feature whenever parameters change.
#pragma once

#include <cmath>

#include "host_device.hpp"

namespace nvpflow {

/// Of nu degrees of freedom: ln G((nu + 1) / 2) - ln G(nu / 2) - ln(nu pi) / 2, G the gamma function, and nu times its
/// derivative by nu.
struct StudentNorm {
  double value, slope;
};

/// With x = nu / 2, ln G(x + 1/2) - ln G(x) = ln(x) / 2 - 1 / (8 x) + 1 / (192 x^3) - ... for large x, where the
/// logarithm cancels that of nu. G(x + 1) = x G(x) brings a small x there. Differences of two ln G would lose all
/// digits for large nu.
NVPFLOW_HOST_DEVICE inline StudentNorm student_norm(double nu) {
  constexpr double kLargeX = 16;
  constexpr double kSeries[] = {-1.0 / 8, 1.0 / 192, -1.0 / 640, 17.0 / 14336, -31.0 / 18432, 691.0 / 180224};
  constexpr double kPi = 3.14159265358979323846;
  const double first = nu / 2;
  double x = first, value = 0, slope = 0;
  for (; x < kLargeX; x += 1) {
    value -= std::log1p(0.5 / x);
    slope += 0.5 / (x * (x + 0.5));
  }
  value += 0.5 * std::log(x / (nu * kPi));
  slope -= (x - first) / (2 * first * x);  // what is left of (1 / x - 1 / first) / 2
  double power = 1 / x;
  for (int k = 0; k < 6; ++k) {
    value += kSeries[k] * power;
    slope -= (2 * k + 1) * kSeries[k] * power / x;
    power /= x * x;
  }
  return {value, first * slope};
}

/// exp(log_df), within what kernels compute with: beyond, the distribution is as good as degenerate, or normal.
NVPFLOW_HOST_DEVICE inline double degrees_of_freedom(double log_df) {
  constexpr double kMost = 41.446531673892822;  // ln 1e18
  return std::exp(log_df > kMost ? kMost : log_df < -kMost ? -kMost : log_df);
}

}  // namespace nvpflow

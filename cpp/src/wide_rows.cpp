#include "wide_rows.hpp"

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>

namespace nvpflow {
namespace {

/// y = (x - mean) * inverse_std in float64, rounded once. Finite numbers stay finite: those too large for float32
/// become its largest. NaN and inf become NaN.
template <class X>
void standardize_rows(const double* mean, const double* inverse_std, std::int64_t features, const X* x,
                      std::int64_t count, float* y) {
  constexpr double kLargest = std::numeric_limits<float>::max();
  for (std::int64_t r = 0; r < count; ++r, x += features, y += features) {
    for (std::int64_t j = 0; j < features; ++j) {
      const auto from = static_cast<double>(x[j]);
      double v = (from - mean[j]) * inverse_std[j];
      v = v < -kLargest ? -kLargest : v;
      v = v > kLargest ? kLargest : v;
      y[j] = static_cast<float>(v + 0.0 * from);
    }
  }
}

/// x = y * std + mean in float64, rounded once.
template <class X>
void restore_rows(const double* mean, const double* std, std::int64_t features, const float* y, std::int64_t count,
                  X* x) {
  for (std::int64_t r = 0; r < count; ++r, x += features, y += features) {
    for (std::int64_t j = 0; j < features; ++j) x[j] = static_cast<X>(static_cast<double>(y[j]) * std[j] + mean[j]);
  }
}

}  // namespace

void WideRows::set(std::int64_t features, const float* mean, const float* log_std, const float* mean_low) {
  const auto width = static_cast<std::size_t>(features);
  features_ = features;
  mean_.resize(width);
  std_.resize(width);
  inverse_std_.resize(width);
  log_det_ = 0;
  is_split_ = false;
  for (std::size_t j = 0; j < width; ++j) {
    const double low = mean_low == nullptr ? 0.0 : static_cast<double>(mean_low[j]);
    const auto s = static_cast<double>(log_std[j]);
    mean_[j] = static_cast<double>(mean[j]) + low;
    std_[j] = std::exp(s);
    inverse_std_[j] = std::exp(-s);
    log_det_ -= s;
    is_split_ = is_split_ || low != 0;
  }
}

void WideRows::standardize(const void* x, bool float64, const std::int64_t* index, std::int64_t begin,
                           std::int64_t count, float* y) const {
  const auto some = [&](std::int64_t first, std::int64_t rows, float* to) {
    const void* from = static_cast<const unsigned char*>(x) + first * row_bytes(float64);
    if (float64) {
      standardize_rows(mean_.data(), inverse_std_.data(), features_, static_cast<const double*>(from), rows, to);
    } else {
      standardize_rows(mean_.data(), inverse_std_.data(), features_, static_cast<const float*>(from), rows, to);
    }
  };
  if (index == nullptr) return some(begin, count, y);
  for (std::int64_t r = 0; r < count; ++r) some(index[begin + r], 1, y + r * features_);
}

void WideRows::restore(const float* y, std::int64_t count, void* x, bool float64, std::int64_t begin) const {
  void* to = static_cast<unsigned char*>(x) + begin * row_bytes(float64);
  if (float64) {
    restore_rows(mean_.data(), std_.data(), features_, y, count, static_cast<double*>(to));
  } else {
    restore_rows(mean_.data(), std_.data(), features_, y, count, static_cast<float*>(to));
  }
}

void WideRows::scale_gradient(float* g, std::int64_t rows) const {
  for (std::int64_t r = 0; r < rows; ++r, g += features_) {
    for (std::int64_t j = 0; j < features_; ++j) {
      g[j] = static_cast<float>(static_cast<double>(g[j]) * inverse_std_[static_cast<std::size_t>(j)]);
    }
  }
}

}  // namespace nvpflow

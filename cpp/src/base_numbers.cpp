#include "base_numbers.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "base_density.hpp"
#include "cpu/round_up.hpp"
#include "kinds.hpp"
#include "lower.hpp"
#include "student_t.hpp"

namespace nvpflow {
namespace {

constexpr double kHalfLogTwoPi = 0.91893853320467274178;

/// The rows of the inverse of a unit lower triangular matrix, both with their ones.
void invert_unit_lower(const std::vector<double>& matrix, std::int64_t size, std::vector<double>& inverse) {
  const auto at = [](std::int64_t i, std::int64_t j) { return static_cast<std::size_t>(i * (i + 1) / 2 + j); };
  for (std::int64_t i = 0; i < size; ++i) {
    inverse[at(i, i)] = 1;
    for (std::int64_t j = 0; j < i; ++j) {
      double sum = 0;
      for (std::int64_t k = j; k < i; ++k) sum -= matrix[at(i, k)] * inverse[at(k, j)];
      inverse[at(i, j)] = sum;
    }
  }
}

}  // namespace

template <class T>
BaseNumbers<T>::BaseNumbers(const LoweredBase& base, std::int64_t features, std::int64_t lanes)
    : features_(features), density_(density_of<T>(base)) {
  const std::int64_t components = base.components;
  const std::int64_t factors = components * mixture_factor_size(features, base.full);
  switch (base.kind) {
    case BaseKind::normal:
    case BaseKind::uniform:
      break;
    case BaseKind::student_t:
      density_.stride = cpu::round_up(features, lanes);
      numbers_.assign(static_cast<std::size_t>(kStudentNumbers * density_.stride), T(0));
      density_.student = numbers_.data();
      break;
    case BaseKind::mixture:
      numbers_.assign(static_cast<std::size_t>(components * (3 + features) + 2 * factors), T(0));
      density_.weights = numbers_.data();
      density_.cumulated = density_.weights + components;
      density_.log_peaks = density_.cumulated + components;
      density_.means = density_.log_peaks + components;
      density_.factors = density_.means + components * features;
      density_.inverses = density_.factors + factors;
      break;
  }
}

template <class T>
void BaseNumbers<T>::pack(const T* parameters) {
  switch (density_.kind) {
    case BaseKind::normal:
    case BaseKind::uniform:
      break;
    case BaseKind::student_t:
      pack_student(parameters + density_.offset);
      break;
    case BaseKind::mixture:
      pack_mixture(parameters);
      break;
  }
}

template <class T>
void BaseNumbers<T>::pack_student(const T* log_df) {
  double log_density = 0;
  for (std::int64_t j = 0; j < features_; ++j) {
    const double df = degrees_of_freedom(static_cast<double>(log_df[j]));
    const StudentNorm norm = student_norm(df);
    log_density += norm.value;
    const double root = std::sqrt(df);
    const double values[kStudentNumbers] = {1 / root, (df + 1) / 2, (df + 1) / root, df / 2, norm.slope, root, 2 / df};
    for (int number = 0; number < kStudentNumbers; ++number) {
      numbers_[static_cast<std::size_t>(number * density_.stride + j)] = static_cast<T>(values[number]);
    }
  }
  density_.log_density = static_cast<T>(log_density);
}

template <class T>
void BaseNumbers<T>::pack_mixture(const T* parameters) {
  const std::int64_t components = density_.components, features = features_;
  const T* logits = parameters + density_.offset;
  const auto most = static_cast<double>(*std::max_element(logits, logits + components));
  double sum = 0;
  for (std::int64_t m = 0; m < components; ++m) sum += std::exp(static_cast<double>(logits[m]) - most);
  double cumulated = 0;
  for (std::int64_t m = 0; m < components; ++m) {
    const double log_weight = static_cast<double>(logits[m]) - most - std::log(sum), weight = std::exp(log_weight);
    const T* log_scales = parameters + density_.log_scales_offset + m * features;
    double log_peak = log_weight - static_cast<double>(features) * kHalfLogTwoPi;
    for (std::int64_t j = 0; j < features; ++j) log_peak -= static_cast<double>(log_scales[j]);
    cumulated += weight;
    const_cast<T*>(density_.weights)[m] = static_cast<T>(weight);
    const_cast<T*>(density_.cumulated)[m] = static_cast<T>(cumulated);
    const_cast<T*>(density_.log_peaks)[m] = static_cast<T>(log_peak);
    pack_component(m, log_scales, parameters + density_.lower_offset + m * (features * (features - 1) / 2));
  }
  std::copy_n(parameters + density_.means_offset, components * features, const_cast<T*>(density_.means));
}

/// F = L diag(s) and F^-1 = diag(1 / s) L^-1.
template <class T>
void BaseNumbers<T>::pack_component(std::int64_t component, const T* log_scales, const T* lower) {
  const std::int64_t size = mixture_factor_size(features_, density_.full);
  T* factor = const_cast<T*>(density_.factors) + component * size;
  T* inverse = const_cast<T*>(density_.inverses) + component * size;
  const auto log_scale = [&](std::int64_t j) { return static_cast<double>(log_scales[j]); };
  if (!density_.full) {
    for (std::int64_t j = 0; j < features_; ++j) {
      factor[j] = static_cast<T>(std::exp(log_scale(j)));
      inverse[j] = static_cast<T>(std::exp(-log_scale(j)));
    }
    return;
  }
  std::vector<double> unit(static_cast<std::size_t>(size)), inverted(unit.size());
  std::size_t next = 0;
  for (std::int64_t i = 0; i < features_; ++i) {
    for (std::int64_t j = 0; j < i; ++j) unit[next++] = static_cast<double>(*lower++);
    unit[next++] = 1;
  }
  invert_unit_lower(unit, features_, inverted);
  next = 0;
  for (std::int64_t i = 0; i < features_; ++i) {
    for (std::int64_t j = 0; j <= i; ++j, ++next) {
      factor[next] = static_cast<T>(unit[next] * std::exp(log_scale(j)));
      inverse[next] = static_cast<T>(inverted[next] * std::exp(-log_scale(i)));
    }
  }
}

template class BaseNumbers<float>;
template class BaseNumbers<double>;

}  // namespace nvpflow

// KERNEL PART: what the kernels read of a base with parameters, formed on the device, by one block, whenever these
// change. In double and rounded once, as cpp/src/base_numbers.cpp does; but for the inverses of full factors, whose
// elements are rounded one by one.
#pragma once

#include "../cpp/src/student_t.hpp"
#include "elementary.cuh"
#include "kernels.hpp"

namespace nvpflow::cuda {

template <class T>
NVPFLOW_DEVICE void pack_student(const BaseDensity<T>& base, int features, const T* parameters, T* to) {
  const T* log_df = parameters + base.offset;
  for (int f = thread_index(); f < base.stride; f += num_threads()) {
    if (f >= features) {
      for (int number = 0; number < kStudentNumbers; ++number) to[number * base.stride + f] = T(0);
      continue;
    }
    const double df = degrees_of_freedom(static_cast<double>(log_df[f])), root = std::sqrt(df);
    const double values[kStudentNumbers] = {1 / root, (df + 1) / 2, (df + 1) / root, df / 2, student_norm(df).slope,
                                            root,     2 / df};
    for (int number = 0; number < kStudentNumbers; ++number) {
      to[number * base.stride + f] = static_cast<T>(values[number]);
    }
  }
  if (thread_index() != 0) return;
  double log_density = 0;
  for (int f = 0; f < features; ++f) {
    log_density += student_norm(degrees_of_freedom(static_cast<double>(log_df[f]))).value;
  }
  to[kStudentNumbers * base.stride] = static_cast<T>(log_density);
}

/// Weights and peaks, by one thread.
template <class T>
NVPFLOW_DEVICE void pack_weights(const BaseDensity<T>& of, int features, const T* parameters) {
  const T* logits = parameters + of.offset;
  double most = static_cast<double>(logits[0]), sum = 0, cumulated = 0;
  for (int m = 1; m < of.components; ++m) {
    const double logit = static_cast<double>(logits[m]);
    most = logit > most ? logit : most;
  }
  for (int m = 0; m < of.components; ++m) sum += exponential(static_cast<double>(logits[m]) - most);
  for (int m = 0; m < of.components; ++m) {
    const double log_weight = static_cast<double>(logits[m]) - most - std::log(sum);
    const double weight = exponential(log_weight);
    double log_peak = log_weight - static_cast<double>(features) * 0.91893853320467274178;
    for (int f = 0; f < features; ++f) {
      log_peak -= static_cast<double>(parameters[of.log_scales_offset + std::int64_t{m} * features + f]);
    }
    cumulated += weight;
    const_cast<T*>(of.weights)[m] = static_cast<T>(weight);
    const_cast<T*>(of.cumulated)[m] = static_cast<T>(cumulated);
    const_cast<T*>(of.log_peaks)[m] = static_cast<T>(log_peak);
  }
}

/// Column j of F and of F^-1 of component m.
template <class T>
NVPFLOW_DEVICE void pack_column(const BaseDensity<T>& of, int features, const T* parameters, std::int64_t m, int j) {
  const std::int64_t size = mixture_factor_size(features, of.full);
  T* factor = const_cast<T*>(of.factors) + m * size;
  T* inverse = const_cast<T*>(of.inverses) + m * size;
  const T* log_scales = parameters + of.log_scales_offset + m * features;
  const double scale = exponential(static_cast<double>(log_scales[j]));
  if (!of.full) {
    factor[j] = static_cast<T>(scale);
    inverse[j] = static_cast<T>(exponential(-static_cast<double>(log_scales[j])));
    return;
  }
  const auto at = [](std::int64_t i, std::int64_t k) { return i * (i + 1) / 2 + k; };
  const T* lower = parameters + of.lower_offset + m * (std::int64_t{features} * (features - 1) / 2);
  const auto unit = [&](std::int64_t i, std::int64_t k) { return static_cast<double>(lower[i * (i - 1) / 2 + k]); };
  for (int i = j; i < features; ++i) {
    double sum = i == j ? 1 : 0;
    for (int k = j; k < i; ++k) {
      const double scale_k = exponential(static_cast<double>(log_scales[k]));
      sum -= unit(i, k) * (static_cast<double>(inverse[at(k, j)]) * scale_k);
    }
    factor[at(i, j)] = static_cast<T>(i == j ? scale : unit(i, j) * scale);
    inverse[at(i, j)] = static_cast<T>(sum * exponential(-static_cast<double>(log_scales[i])));
  }
}

/// to: Program::base_numbers of what is being packed.
template <class T>
NVPFLOW_DEVICE void pack_base(const Program<T>& program, const T* parameters, T* to) {
  const int features = program.input_size;
  if (program.base.kind == BaseKind::student_t) return pack_student(program.base, features, parameters, to);
  BaseDensity<T> of = program.base;
  point_into(of, to, features);
  if (thread_index() == 0) pack_weights(of, features, parameters);
  const std::int64_t columns = of.components * features;
  for (std::int64_t i = thread_index(); i < columns; i += num_threads()) {
    const_cast<T*>(of.means)[i] = parameters[of.means_offset + i];
    pack_column(of, features, parameters, i / features, static_cast<int>(i % features));
  }
}

}  // namespace nvpflow::cuda

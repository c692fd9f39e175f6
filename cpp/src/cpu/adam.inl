// KERNEL: one Adam update (Kingma and Ba 2015) with decoupled weight decay (Loshchilov and Hutter 2019).
//
// Reads 4 and writes 3 arrays once, 28 bytes a float parameter; about 12 FLOPs: bound by the cache the arrays fit in.
#pragma once

#include <stdint.h>

#include "kernels.hpp"
#include "simd.hpp"

namespace nvpflow::cpu {
namespace {

template <class T>
void adam(const AdamCoefficients& c, int64_t count, const T* gradient, T* first_moment, T* second_moment,
          T* parameters) {
  const Vec<T> factor = set1(static_cast<T>(c.gradient_factor));
  const Vec<T> beta1 = set1(static_cast<T>(c.beta1)), beta2 = set1(static_cast<T>(c.beta2));
  const Vec<T> rest1 = set1(static_cast<T>(1 - c.beta1)), rest2 = set1(static_cast<T>(1 - c.beta2));
  const Vec<T> correction = set1(static_cast<T>(c.root_correction)), epsilon = set1(static_cast<T>(c.epsilon));
  const Vec<T> step = set1(static_cast<T>(c.step_size)), keep = set1(static_cast<T>(1 - c.decay));
  for (int64_t i = 0; i < count; i += kLanes<T>) {
    const int64_t n = count - i;
    const Vec<T> g = load_upto<T>(gradient + i, n) * factor;
    const Vec<T> m = fma(beta1, load_upto<T>(first_moment + i, n), rest1 * g);
    const Vec<T> v = fma(beta2, load_upto<T>(second_moment + i, n), rest2 * (g * g));
    const Vec<T> update = step * m / fma(sqrt(v), correction, epsilon);
    store_upto<T>(first_moment + i, m, n);
    store_upto<T>(second_moment + i, v, n);
    store_upto<T>(parameters + i, fma(load_upto<T>(parameters + i, n), keep, -update), n);
  }
}

/// In float64 and in one fixed order: sixteen partial sums over i mod 16, then added up.
template <class T>
double sum_of_squares(const T* values, int64_t count) {
  constexpr int kPartials = 16;
  double partial[kPartials] = {};
  int64_t i = 0;
  for (; i + kPartials <= count; i += kPartials) {
    for (int l = 0; l < kPartials; ++l) {
      const double v = static_cast<double>(values[i + l]);
      partial[l] += v * v;
    }
  }
  for (; i < count; ++i) partial[i % kPartials] += static_cast<double>(values[i]) * static_cast<double>(values[i]);
  double sum = 0;
  for (const double p : partial) sum += p;
  return sum;
}

}  // namespace
}  // namespace nvpflow::cpu

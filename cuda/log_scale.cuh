// KERNEL PART: the log-scale functions s = g(u) of affine couplings, LogScale of <nvpflow/layers.hpp>, and their
// derivatives.
#pragma once

#include "elementary.cuh"

namespace nvpflow::cuda {

/// F tanh(u / d), what nearly all flows have: from u where it is needed.
template <class T>
struct TanhScale {
  static constexpr bool kHasSlope = true;
  const Scale<T>& c;

  NVPFLOW_DEVICE T log_scale(T u) const { return hyperbolic_tangent(u * c.inverse_divisor) * c.factor; }
  NVPFLOW_DEVICE T slope(T s) const {
    const T tanh_u = s * c.inverse_factor;
    return multiply_add(-tanh_u, tanh_u, T(1)) * c.slope;
  }
};

/// What log_scales() has put in the place of u.
template <class T>
struct GivenScale {
  static constexpr bool kHasSlope = false;

  NVPFLOW_DEVICE T log_scale(T s) const { return s; }
};

/// s and ds / du.
template <class T>
struct LogScaleAt {
  T s, slope;
};

/// +-log v, v = low + (high - low) sigmoid(x), x = u + offset. Where low is 0, log v is log high - softplus(-x): v
/// underflows far below 0, and its logarithm does not.
template <class T>
NVPFLOW_DEVICE LogScaleAt<T> sigmoid_scale_at(const Scale<T>& c, T u) {
  const T x = u + c.offset, e = exponential(-absolute(x)), sum = e + T(1);
  const T larger = T(1) / sum, smaller = e * larger;
  const T of_x = x < T(0) ? smaller : larger, of_minus_x = x < T(0) ? larger : smaller;
  const T v = multiply_add(of_x, c.range, c.low);
  if (c.low == T(0)) return {c.sign * ((at_most(x, T(0)) + c.log_high) - logarithm(sum)), c.sign * of_minus_x};
  return {c.sign * (v == v ? logarithm(v) : v), c.sign * (of_x * of_minus_x * c.range / v)};
}

/// +-log v, v = min(softplus(x) + low, high), x = u + offset. Where low is 0 and x far below 0, log v is x - e^x / 2 to
/// the last bit.
template <class T>
NVPFLOW_DEVICE LogScaleAt<T> softplus_scale_at(const Scale<T>& c, T u) {
  const T x = u + c.offset, uncapped = softplus(x) + c.low, v = at_most(uncapped, c.high);
  T log_v = v < infinity<T>() ? logarithm(v) : v, slope = sigmoid(x) / v;  // NaN and infinity stay
  if (x < c.tail) {
    const T e = exponential(x);
    log_v = at_most(multiply_add(e, T(-0.5), x), c.log_high);
    slope = multiply_add(e, T(-0.5), T(1));
  }
  return {c.sign * log_v, uncapped > c.high ? T(0) : c.sign * slope};
}

/// Of the functions other than tanh: the formulas of cpp/src/cpu/log_scale.inl.
template <class T>
NVPFLOW_DEVICE LogScaleAt<T> log_scale_at(const Scale<T>& c, T u) {
  const T v = u * c.inverse_divisor;
  switch (c.function) {
    case ScaleFunction::softsign: {
      const T a = at_most(absolute(v), T(0x1p60)), r = T(1) / (a + T(1));  // beyond: 1 to the last bit
      return {copy_sign(a * r, v) * c.factor, r * r * c.slope};
    }
    case ScaleFunction::atan:
      return {arctangent(v) * c.factor, c.slope / multiply_add(v, v, T(1))};
    case ScaleFunction::identity:
      return {u, T(1)};
    case ScaleFunction::sigmoid:
      return sigmoid_scale_at(c, u);
    case ScaleFunction::softplus:
      return softplus_scale_at(c, u);
    default:  // additive
      return {T(0), T(0)};
  }
}

/// Replaces every u among the sums of the heads by s; keep(n, low, slope) takes the slope at sums[n][2 low]. One copy
/// of the text serves all sums, which move past it.
template <class T, int N, class Keep>
NVPFLOW_DEVICE void log_scales(const Scale<T>& c, T (&sums)[N][4], Keep keep) {
  NVPFLOW_ROLLED
  for (int turn = 0; turn < N; ++turn) {
    T first[4];
    NVPFLOW_UNROLL
    for (int low = 0; low < 2; ++low) {
      const LogScaleAt<T> at = log_scale_at(c, sums[0][2 * low]);
      keep(turn, low, at.slope);
      first[2 * low] = at.s;
      first[2 * low + 1] = sums[0][2 * low + 1];
    }
    NVPFLOW_UNROLL
    for (int n = 0; n + 1 < N; ++n) {
      NVPFLOW_UNROLL
      for (int i = 0; i < 4; ++i) sums[n][i] = sums[n + 1][i];
    }
    NVPFLOW_UNROLL
    for (int i = 0; i < 4; ++i) sums[N - 1][i] = first[i];
  }
}

}  // namespace nvpflow::cuda

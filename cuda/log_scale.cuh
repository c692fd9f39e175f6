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

/// Of the functions other than tanh.
template <class T>
NVPFLOW_DEVICE LogScaleAt<T> log_scale_at(const Scale<T>& c, T u) {
  switch (c.function) {
    case ScaleFunction::softsign: {
      const T v = u * c.inverse_divisor, inverse = T(1) / (T(1) + absolute(v));
      // Where u is infinite, so is v; its sign is what is left.
      return {c.factor * (absolute(v) < Real<T>::kSoftsignHigh ? v * inverse : copy_sign(T(1), v)),
              c.slope * inverse * inverse};
    }
    case ScaleFunction::identity:
      return {u, T(1)};
    default:
      return {T(0), T(0)};
  }
}

/// Replaces every u among the sums of the heads by s; keep(n, low, slope) takes the slope at sums[n][2 low]. One copy
/// of the text serves all sums, which move past it.
template <class T, int N, class Keep>
NVPFLOW_DEVICE void log_scales(const Scale<T>& c, T (&sums)[N][4], Keep keep) {
#if !defined(NVPFLOW_SIMT)
#pragma unroll 1
#endif
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

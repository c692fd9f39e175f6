// KERNEL: the log-scale functions s = g(u) of affine couplings: LogScale of <nvpflow/layers.hpp>. Each is a struct with
// the same functions:
//
//   log_scale(u)   s
//   scale(s)       exp(s), of a log-scale or of its negative
//   slope(u, s)    ds / du
#pragma once

#include "elementary.hpp"
#include "kernels.hpp"
#include "simd.hpp"

namespace nvpflow::cpu {
namespace {

/// F tanh(u / d).
template <class T>
struct TanhScale {
  static constexpr bool kIsZero = false;
  const Scale<T>& c;

  template <class V>
  NVPFLOW_INLINE V log_scale(V u) const {
    return tanh<T>(u * set1(c.inverse_divisor)) * set1(c.factor);
  }
  /// |s| <= F, and 1 is what nearly all flows have.
  template <class V>
  NVPFLOW_INLINE V scale(V s) const {
    return c.factor <= T(1) ? exp_within_one<T>(s) : exp<T>(s);
  }
  template <class V>
  NVPFLOW_INLINE V slope(V, V s) const {
    const V tanh_u = s * set1(c.inverse_factor);
    return fma(-tanh_u, tanh_u, set1(T(1))) * set1(c.slope);
  }
};

/// s = 0: an additive coupling.
template <class T>
struct ZeroScale {
  static constexpr bool kIsZero = true;
  const Scale<T>& c;
};

/// f(the function of the coupling). No default: the compiler names a function that is missing here.
template <class T, class F>
NVPFLOW_INLINE void with_log_scale(const Scale<T>& scale, F&& f) {
  switch (scale.function) {
    case ScaleFunction::tanh:
      return f(TanhScale<T>{scale});
    case ScaleFunction::none:
      return f(ZeroScale<T>{scale});
    case ScaleFunction::softsign:
    case ScaleFunction::atan:
    case ScaleFunction::identity:
    case ScaleFunction::sigmoid:
    case ScaleFunction::softplus:
      return;
  }
  __builtin_unreachable();
}

}  // namespace
}  // namespace nvpflow::cpu

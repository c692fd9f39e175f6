// KERNEL: the log-scale functions s = g(u) of affine couplings: LogScale of <nvpflow/layers.hpp>. Each is a struct with
// the same members:
//
//   at(u)                s, and what the two others are made from; V: a vector or several in step
//   scale(at, inverse)   exp(s), inverse: exp(-s)
//   slope(at)            ds / du
//
// tanh, which nearly all flows have, is a part of the loops of affine.inl. The others take a pass of their own
// (log_scales), so that each is there once for all loops; KnownScale then gives the loops what it has written.
// sigmoid and softplus know exp(s) before s: they take a logarithm instead of an exponential, and exp(-s) is one
// division.
#pragma once

#include <stdint.h>

#include "elementary.hpp"
#include "kernels.hpp"
#include "poison.inl"
#include "simd.hpp"
#include "steps.hpp"

namespace nvpflow::cpu {
namespace {

/// F tanh(u / d).
template <class T>
struct TanhScale {
  static constexpr bool kIsZero = false, kIsKnown = false;
  template <class V>
  struct At {
    V s;
  };
  const Scale<T>& c;

  template <class V>
  NVPFLOW_INLINE At<V> load(const T* u, int64_t stride, int64_t n) const {
    return at(load_steps<T, V>(u, stride, n));
  }
  template <class V>
  NVPFLOW_INLINE At<V> at(V u) const {
    return {tanh<T>(u * set1(c.inverse_divisor)) * set1(c.factor)};
  }
  /// |s| <= F, and 1 is what nearly all flows have.
  template <class V>
  NVPFLOW_INLINE V scale(At<V> at, bool inverse) const {
    const V s = inverse ? -at.s : at.s;
    return c.factor <= T(1) ? exp_within_one<T>(s) : exp<T>(s);
  }
  template <class V>
  NVPFLOW_INLINE V slope(At<V> at) const {
    const V tanh_u = at.s * set1(c.inverse_factor);
    return fma(-tanh_u, tanh_u, set1(T(1))) * set1(c.slope);
  }
};

/// s = 0: an additive coupling.
template <class T>
struct ZeroScale {
  static constexpr bool kIsZero = true, kIsKnown = false;
};

/// What log_scales has written: s in place of u, and the scale for the direction.
template <class T>
struct KnownScale {
  static constexpr bool kIsZero = false, kIsKnown = true;
  template <class V>
  struct At {
    V s, scale;
  };
  const T *s, *scale_of_s;

  template <class V>
  NVPFLOW_INLINE At<V> load(const T* u, int64_t stride, int64_t n) const {
    return {load_steps<T, V>(u, stride, n), load_steps<T, V>(scale_of_s + (u - s), stride, n)};
  }
  template <class V>
  NVPFLOW_INLINE V scale(At<V> at, bool) const {
    return at.scale;
  }
};

/// exp(s) or exp(-s).
template <class T, class V>
NVPFLOW_INLINE V exp_of(V s, bool inverse) {
  return exp<T>(s * set1(inverse ? T(-1) : T(1)));
}

/// F v / (1 + |v|), v = u / d.
template <class T>
struct SoftsignScale {
  template <class V>
  struct At {
    V s, r;  // r = 1 / (1 + |v|)
  };
  const Scale<T>& c;

  template <class V>
  NVPFLOW_INLINE At<V> at(V u) const {
    const V v = u * set1(c.inverse_divisor);
    const V a = at_most(absolute<T>(v), T(0x1p60));  // beyond: 1 to the last bit, also at infinity
    const V r = T(1) / (a + T(1));
    return {copy_sign<T>(a * r, v) * set1(c.factor), r};
  }
  template <class V>
  NVPFLOW_INLINE V scale(At<V> at, bool inverse) const {
    return exp_of<T>(at.s, inverse);
  }
  template <class V>
  NVPFLOW_INLINE V slope(At<V> at) const {
    return at.r * at.r * set1(c.slope);
  }
};

/// F atan(u / d).
template <class T>
struct AtanScale {
  template <class V>
  struct At {
    V s, v;  // v = u / d
  };
  const Scale<T>& c;

  template <class V>
  NVPFLOW_INLINE At<V> at(V u) const {
    const V v = u * set1(c.inverse_divisor);
    return {atan<T>(v) * set1(c.factor), v};
  }
  template <class V>
  NVPFLOW_INLINE V scale(At<V> at, bool inverse) const {
    return exp_of<T>(at.s, inverse);
  }
  template <class V>
  NVPFLOW_INLINE V slope(At<V> at) const {
    return c.slope / fma(at.v, at.v, set1(T(1)));
  }
};

/// u.
template <class T>
struct IdentityScale {
  template <class V>
  struct At {
    V s;
  };
  const Scale<T>& c;

  template <class V>
  NVPFLOW_INLINE At<V> at(V u) const {
    return {u};
  }
  template <class V>
  NVPFLOW_INLINE V scale(At<V> at, bool inverse) const {
    return exp_of<T>(at.s, inverse);
  }
  template <class V>
  NVPFLOW_INLINE V slope(At<V> at) const {
    return fma(at.s, set1(T(0)), set1(T(1)));
  }
};

/// exp(s) or exp(-s) from v, which is exp(s), or exp(-s) where the function is negated.
template <class T, class V>
NVPFLOW_INLINE V scale_from(const Scale<T>& c, V v, bool inverse) {
  return inverse == c.negated ? v : T(1) / v;
}

/// +-log v, v = low + (high - low) sigmoid(x), x = u + offset, from e = exp(-|x|). Where low is 0, log v is
/// log high - softplus(-x): v underflows far below 0, and its logarithm does not.
template <class T>
struct SigmoidScale {
  template <class V>
  struct At {
    V s, v, sigmoid, complement;  // sigmoid(x), sigmoid(-x)
  };
  const Scale<T>& c;

  template <class V>
  NVPFLOW_INLINE At<V> at(V u) const {
    const V x = u + set1(c.offset);
    const V e = exp<T>(-absolute<T>(x));
    const V sum = e + T(1), r = T(1) / sum, er = e * r;
    const V sigmoid = select<T>(x < T(0), er, r), complement = select<T>(x < T(0), r, er);
    const V v = fma(sigmoid, set1(c.range), set1(c.low));
    const bool from_zero = c.low == T(0);
    const V log_of = log<T>(from_zero ? sum : v);
    const V log_v =
        from_zero ? (at_most(x, T(0)) + set1(c.log_high)) - log_of : fma(v, set1(T(0)), log_of);  // NaN: of v
    return {log_v * set1(c.sign), v, sigmoid, complement};
  }
  template <class V>
  NVPFLOW_INLINE V scale(At<V> at, bool inverse) const {
    return scale_from<T>(c, at.v, inverse);
  }
  template <class V>
  NVPFLOW_INLINE V slope(At<V> at) const {
    const V slope = c.low == T(0) ? at.complement : at.sigmoid * at.complement * set1(c.range) / at.v;
    return slope * set1(c.sign);
  }
};

/// +-log v, v = min(softplus(x) + low, high), x = u + offset, from e = exp(-|x|). Where low is 0 and x far below 0,
/// log v is x - e / 2 to the last bit.
template <class T>
struct SoftplusScale {
  template <class V>
  struct At {
    V s, v, x, e, uncapped;
  };
  const Scale<T>& c;

  template <class V>
  NVPFLOW_INLINE At<V> at(V u) const {
    const V x = u + set1(c.offset);
    const V e = exp<T>(-absolute<T>(x));
    const V uncapped = at_least(x, T(0)) + log1p_unit<T>(e) + set1(c.low);
    const V v = at_most(uncapped, c.high);
    const V log_v = select<T>(v < kInfinity<T>, log<T>(v), v);  // keeps NaN and infinity
    const V in_tail = at_most(fma(e, set1(T(-0.5)), x), c.log_high);
    return {select<T>(x < c.tail, in_tail, log_v) * set1(c.sign), v, x, e, uncapped};
  }
  template <class V>
  NVPFLOW_INLINE V scale(At<V> at, bool inverse) const {
    return scale_from<T>(c, at.v, inverse);
  }
  template <class V>
  NVPFLOW_INLINE V slope(At<V> at) const {
    const V r = T(1) / (at.e + T(1));
    const V sigmoid = select<T>(at.x < T(0), at.e * r, r);
    const V in_tail = fma(at.e, set1(T(-0.5)), set1(T(1)));
    const V open = select<T>(at.x < c.tail, in_tail, sigmoid / at.v);
    return select<T>(at.uncapped > c.high, set1(T(0)), open) * set1(c.sign);
  }
};

/// Rows of n numbers: of u, and of what log_scales makes of them.
template <class T>
struct LogScales {
  const T* u;
  int64_t u_stride;
  T *s, *scale, *slope;  // slope: null if not wanted
  int64_t stride;        // whole vectors, which are written to the end
  int64_t n, rows;
};

/// s, exp(s) (inverse: exp(-s)) and ds / du.
template <class T, class G>
NVPFLOW_NOINLINE void write_log_scales(const G& g, bool inverse, const LogScales<T>& to) {
  constexpr int64_t L = kLanes<T>;
  for (int64_t r = 0; r < to.rows; ++r) {
    const auto step = [&](auto u, int64_t at) __attribute__((always_inline)) {
      const auto values = g.at(u);
      store_steps<T>(to.s + at, L, values.s, L);
      store_steps<T>(to.scale + at, L, g.scale(values, inverse), L);
      if (to.slope != nullptr) store_steps<T>(to.slope + at, L, g.slope(values), L);
    };
    const T* u = to.u + r * to.u_stride;
    int64_t j = 0;
    for (; j + 2 * L <= to.n; j += 2 * L) step(load_steps<T, Pair<Vec<T>>>(u + j, L, L), r * to.stride + j);
    for (; j < to.n; j += L) step(load<T>(u + j), r * to.stride + j);
  }
}

/// Of a coupling that is neither additive nor one of tanh. No default: the compiler names a function that is missing.
template <class T>
NVPFLOW_NOINLINE void log_scales(const Scale<T>& scale, bool inverse, const LogScales<T>& to) {
  switch (scale.function) {
    case ScaleFunction::softsign:
      return write_log_scales<T>(SoftsignScale<T>{scale}, inverse, to);
    case ScaleFunction::atan:
      return write_log_scales<T>(AtanScale<T>{scale}, inverse, to);
    case ScaleFunction::identity:
      return write_log_scales<T>(IdentityScale<T>{scale}, inverse, to);
    case ScaleFunction::sigmoid:
      return write_log_scales<T>(SigmoidScale<T>{scale}, inverse, to);
    case ScaleFunction::softplus:
      return write_log_scales<T>(SoftplusScale<T>{scale}, inverse, to);
    case ScaleFunction::tanh:
    case ScaleFunction::none:
      return;
  }
}

template <class T>
NVPFLOW_INLINE KnownScale<T> known_scale(const Scale<T>& scale, bool inverse, const LogScales<T>& to) {
  log_scales<T>(scale, inverse, to);
  return {to.s, to.scale};
}

/// f(the function of the coupling), to be used in a loop.
template <class T, class F>
NVPFLOW_INLINE void with_log_scale(const Scale<T>& scale, F&& f) {
  switch (scale.function) {
    case ScaleFunction::tanh:
      return f(TanhScale<T>{scale});
    case ScaleFunction::none:
      return f(ZeroScale<T>{});
    default:
      return f(KnownScale<T>{nullptr, nullptr});
  }
}

}  // namespace
}  // namespace nvpflow::cpu

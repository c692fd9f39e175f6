// KERNEL: the activations of hidden layers, and their derivatives.
#pragma once

#include <stdint.h>

#include "elementary.hpp"
#include "kernels.hpp"
#include "simd.hpp"

namespace nvpflow::cpu {
namespace {

template <class T>
NVPFLOW_INLINE Vec<T> rectify(Vec<T> x, Act act) {
  if (act == Act::relu) return at_least(x, T(0));
  if (act == Act::leaky_relu) return x < T(0) ? x * T(0.01) : x;
  return x;
}

/// relu and leaky_relu are applied to the sums while they are in registers; the others in a pass of their own.
NVPFLOW_INLINE bool needs_pass(Act act) { return act != Act::relu && act != Act::leaky_relu && act != Act::none; }

template <class T, class F>
NVPFLOW_INLINE void map(const T* in, T* out, int64_t count, F f) {
  for (int64_t i = 0; i < count; i += kLanes<T>) store<T>(out + i, f(load<T>(in + i)));
}

/// count: a multiple of the lanes.
template <class T>
void activate(Act act, const T* in, T* out, int64_t count) {
  switch (act) {
    case Act::relu:
      return map(in, out, count, [](Vec<T> v) { return rectify<T>(v, Act::relu); });
    case Act::leaky_relu:
      return map(in, out, count, [](Vec<T> v) { return rectify<T>(v, Act::leaky_relu); });
    case Act::elu:
      return map(in, out, count, [](Vec<T> v) { return elu<T>(v); });
    case Act::gelu:
      return map(in, out, count, [](Vec<T> v) { return gelu<T>(v); });
    case Act::silu:
      return map(in, out, count, [](Vec<T> v) { return silu<T>(v); });
    case Act::tanh:
      return map(in, out, count, [](Vec<T> v) { return tanh<T>(v); });
    case Act::sigmoid:
      return map(in, out, count, [](Vec<T> v) { return sigmoid<T>(v); });
    case Act::softplus:
      return map(in, out, count, [](Vec<T> v) { return softplus<T>(v); });
    default:
      return;
  }
}

/// gelu and silu need their argument for the derivative; the others' derivative follows from their value.
NVPFLOW_INLINE bool keeps_argument(Act act) { return act == Act::gelu || act == Act::silu; }

template <class T>
NVPFLOW_INLINE Vec<T> activation_derivative(Act act, Vec<T> value, Vec<T> argument) {
  const Vec<T> one = set1(T(1));
  switch (act) {
    case Act::relu:
      return value > T(0) ? one : set1(T(0));
    case Act::leaky_relu:
      return value > T(0) ? one : set1(T(0.01));
    case Act::elu:
      return value > T(0) ? one : value + T(1);
    case Act::gelu:
      return gelu_derivative<T>(argument);
    case Act::silu:
      return silu_derivative<T>(argument);
    case Act::tanh:
      return fma(-value, value, one);
    case Act::sigmoid:
      return value * (one - value);
    case Act::softplus:
      return -expm1_bounded<T>(-value);
    default:
      return one;
  }
}

}  // namespace
}  // namespace nvpflow::cpu

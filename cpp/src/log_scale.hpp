// The numbers of a log-scale, as the kernels of both backends read them. Like kinds.hpp it includes nothing that
// could emit a function.
#pragma once

#include "kinds.hpp"

namespace nvpflow {

/// s = g(u), the log-scale of an affine coupling: LogScale of <nvpflow/layers.hpp>.
template <class T>
struct Scale {
  ScaleFunction function = ScaleFunction::tanh;  // none: additive
  T factor = 1, inverse_factor = 1, inverse_divisor = 1;
  T slope = 1;                                 // factor / divisor
  T low = 0, high = 0, range = 0, offset = 0;  // range = high - low
  T log_high = 0;
  T tail = 0;  // softplus: log v is u + offset, all but a trifle, where that sum is below this
  T sign = 1;  // of s: -1 where negated
  bool negated = false;
};

}  // namespace nvpflow

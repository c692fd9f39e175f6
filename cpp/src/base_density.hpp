// The numbers of a base density, as the kernels of both backends read them. Like program.hpp it includes nothing that
// could emit a function.
#pragma once

#include "program.hpp"

namespace nvpflow {

/// Base of <nvpflow/base.hpp>.
template <class T>
struct BaseDensity {
  BaseKind kind = BaseKind::normal;
  T low = 0, high = 0, range = 0;  // uniform; range = high - low
  T log_density = 0;               // uniform: of a row inside
};

}  // namespace nvpflow

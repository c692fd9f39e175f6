// The elementary functions of one instruction set, for test_elementary.cpp. elementary_functions.cpp includes this
// header and is built with instruction-set flags, so it includes nothing but integers.
#pragma once

#include <stdint.h>

namespace nvpflow_test {

enum class Function : int32_t {
  exp,
  exp_within_one,
  tanh,
  sigmoid,
  softplus,
  gelu,
  silu,
  elu,
  log,
  atan,
  sin_quarter,
  cos_quarter
};

/// out[i] = function(in[i]).
template <class T>
using Evaluate = void (*)(Function, const T* in, T* out, int64_t count);

struct ElementaryFunctions {
  const char* isa;
  Evaluate<float> float32;
  Evaluate<double> float64;
};

}  // namespace nvpflow_test
